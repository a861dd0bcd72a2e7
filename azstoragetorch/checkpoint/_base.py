"""The base of a save: an earlier checkpoint, of which unchanged items are copied by the service.

A base makes a save faster and never makes it fail: whatever is wrong with it, everything is uploaded. Its content is
used only if it is certain. Items are compared by digests of the side blob, which has a checksum. Requests to
copy have the ETag as a condition that the data blobs had when the base was committed, so what is copied is what the
digests are of.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from azure.core.exceptions import AzureError
from torch.distributed.checkpoint.metadata import Metadata

from azstoragetorch._engine.config import MiB
from azstoragetorch._tensors.hashing import algorithm_of, best_algorithm, is_available
from azstoragetorch.checkpoint._catalog import names_in
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._format import Digests, Item, read_item
from azstoragetorch.exceptions import AZStorageTorchError

log = logging.getLogger("azstoragetorch")

LATEST = "latest"

_SPREAD = 16 * MiB  # of what is uploaded are sent in blocks of
_SPREAD_BLOCK = 1 * MiB  # so that the little that changed is not sent by one connection while the others are idle


def _form(item: Item) -> tuple[Any, ...]:
    """What two items with equal bytes must also share so that one can replace the other."""
    payload = item.payload
    return item.length, item.transforms, (payload.offset, payload.dtype, payload.shape) if payload is not None else None


class Base:
    """The items of the checkpoint in *folder*, by their digests."""

    def __init__(self, folder: Folder, items: list[Item], digests: Digests) -> None:
        self.folder = folder
        self._items: dict[tuple[str, Any], Item] = {}
        self._refusals: list[str] = []  # why it is not used any more
        self._uploaded = 0  # bytes; about, since several threads add to it
        for item in items:
            digest = digests.of(item)
            if digest is not None and item.etag is not None:
                self._items.setdefault((digest, _form(item)), item)

    @property
    def algorithm(self) -> str | None:
        """The algorithm that most of its digests are probably of, if it is installed here."""
        first = next(iter(self._items), None)
        algorithm = algorithm_of(first[0]) if first is not None else None
        return algorithm if algorithm is not None and is_available(algorithm) else None

    @property
    def is_usable(self) -> bool:
        """Whether the service has not refused to copy from it."""
        return not self._refusals

    def find(self, item: Item) -> Item | None:
        """The item of the base that holds the same bytes as *item*, which has a digest."""
        if item.digest is None or self._refusals:
            return None
        return self._items.get((item.digest, _form(item)))

    def cut(self, size: int) -> int:
        """The bytes of the next block of changed items, at most *size*."""
        length = min(size, _SPREAD_BLOCK) if self._uploaded < _SPREAD else size
        self._uploaded += length
        return length

    def refused(self, error: Exception) -> None:
        """Stop using the base. The first time, warn."""
        self._refusals.append(str(error))
        if len(self._refusals) == 1:
            log.warning("%s: the base is not used, and the rest is uploaded: %s", self.folder.url, error)


@dataclass(frozen=True)
class Digesting:
    """How the items of a save get digests, and the base that these are looked up in."""

    algorithm: str
    base: Base | None = None


def digesting(folder: Folder, rank: int | None, base: Folder | str | None) -> Digesting:
    """How a save to *folder* gets digests, with the checkpoint *base*: a folder, or the latest.

    *rank* is that of a save of one rank alone.
    """
    found = _find(folder, rank, base) if base is not None else None
    algorithm = found.algorithm if found is not None else None
    if found is not None and algorithm is None:
        log.warning(
            "%s: the base is not used, and everything is uploaded: it has no digests of tensors, or they are of "
            "BLAKE3, which is not installed: pip install blake3",
            found.folder.url,
        )
        found = None
    return Digesting(algorithm or best_algorithm(), found)


def _find(folder: Folder, rank: int | None, base: Folder | str) -> Base | None:
    """The base, or None with a reason in the log."""
    place = folder.url
    try:
        if isinstance(base, str):
            found = _latest(folder, rank)
            if found is None:
                log.info("%s: no checkpoint exists yet that could be the base, so everything is uploaded", place)
                return None
            source, metadata = found
        else:
            place = base.url
            if base.address.account_url != folder.address.account_url:
                raise ValueError(f"it is in another account than {folder.url}")
            source = folder.reach(base)
            metadata = source.metadata()
        return _read(source, metadata)
    except (AzureError, AZStorageTorchError, ValueError) as error:
        log.warning("%s: the base is not used, and everything is uploaded: %s", place, error)
        return None


def _latest(folder: Folder, rank: int | None) -> tuple[Folder, Metadata] | None:
    """The checkpoint that is in *folder*, or else the newest in the folders next to it."""
    parent = folder.parent()
    own: list[Metadata] = []
    names: list[str] = []

    def look_here() -> None:
        found = folder.find(rank)
        own.extend(found[:1] if found is not None else ())

    def look_around() -> None:
        names.extend(names_in(parent) if parent is not None else ())

    folder.each(lambda look: look(), [look_here, look_around])
    if own:
        return folder, own[0]
    for name in reversed(names):
        assert parent is not None
        other = parent.child(name)
        found = other.find() if other.url != folder.url else None
        if found is not None:
            return other, found[0]
    return None


def _read(folder: Folder, metadata: Metadata) -> Base | None:
    saved_to = getattr(metadata.storage_meta, "checkpoint_id", None)
    if str(saved_to) != folder.url:
        log.warning(
            "%s: the base is not used, and everything is uploaded: it was copied here from %s, so it is not certain "
            "that its data is what its digests are of",
            folder.url,
            saved_to,
        )
        return None
    digests = folder.digests(metadata)
    if isinstance(digests, str):
        log.warning("%s: the base is not used, and everything is uploaded: %s", folder.url, digests)
        return None
    return Base(folder, [read_item(info) for info in metadata.storage_data.values()], digests)
