"""The names of a checkpoint's blobs: the metadata, and data blobs and their digests, which no two saves share."""

from __future__ import annotations

import calendar
import os
import re
import time

METADATA = ".metadata"

_DATA_NAME = re.compile(r"__([0-9]{1,9})_([0-9]{1,9})\.([0-9]{14})-[0-9a-f]{16}(-own)?\.(?:distcp|digests)")
_RANK_METADATA = re.compile(r"__([0-9]{1,9})\.metadata")


def metadata_name(rank: int | None = None) -> str:
    """The blob with the metadata: of the whole checkpoint, or of *rank* where ranks do not coordinate."""
    return METADATA if rank is None else f"__{rank}{METADATA}"


def is_rank_metadata(name: str) -> bool:
    """Whether *name* is that of metadata of a single rank."""
    return _RANK_METADATA.fullmatch(name) is not None


def is_metadata(name: str) -> bool:
    """Whether *name* is that of metadata, which never holds data."""
    return name == METADATA or is_rank_metadata(name)


def new_save_id() -> str:
    """What sets the data blobs of one save apart from those of all others: the time in UTC and 64 random bits."""
    return f"{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{os.urandom(8).hex()}"


def data_name(rank: int, number: int, save_id: str, *, is_own: bool = False) -> str:
    """The name of a data blob of *rank*, which no other save uses.

    *is_own* says that the metadata of that rank alone will refer to it, since the ranks do not coordinate.
    """
    return f"__{rank}_{number}.{save_id}{'-own' if is_own else ''}.distcp"


def digests_name(rank: int, save_id: str, *, is_own: bool = False) -> str:
    """The name of the side blob with the digests, of the save *save_id* that *rank* commits."""
    return f"__{rank}_0.{save_id}{'-own' if is_own else ''}.digests"


def is_digests(name: object) -> bool:
    """Whether *name* is that of a side blob with digests."""
    return type(name) is str and name.endswith(".digests") and _DATA_NAME.fullmatch(name) is not None


def metadata_of(name: str) -> str:
    """The one metadata blob that can ever refer to *name*, a data blob or side blob."""
    found = _DATA_NAME.fullmatch(name)
    assert found is not None
    return metadata_name(int(found.group(1)) if found.group(4) else None)


def rank_of(name: str) -> int | None:
    """The rank that the metadata blob *name* is of; None for that of the whole checkpoint."""
    found = _RANK_METADATA.fullmatch(name)
    return int(found.group(1)) if found is not None else None


def saved_at(name: str) -> float | None:
    """When the save began that wrote *name*, a data blob or side blob (seconds since 1970); None for other names."""
    found = _DATA_NAME.fullmatch(name)
    if found is None:
        return None
    stamp = found.group(3)
    fields = (int(stamp[:4]), *(int(stamp[at : at + 2]) for at in range(4, 14, 2)))
    try:
        return float(calendar.timegm((*fields, 0, 0, 0)))
    except ValueError:
        return None
