"""The description of a manifest: what it lists, and the files that hold its rows. No I/O, and no pyarrow.

A manifest is a folder: ``manifest.json``, which this module reads and writes, and Parquet files with 65,536 rows each.
The document is written last and has the digest of each file's contents, so a manifest is complete or does not exist.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

from azstoragetorch.exceptions import ManifestError

DOCUMENT = "manifest.json"
PART_ROWS = 1 << 16  # of a part: about 1 MB as a file, 5 MB in memory, and 13 pages of a listing
_FORMAT = "azstoragetorch manifest"
_VERSION = 1
_DIGEST = re.compile("[0-9a-f]{32}")
_PART = re.compile(r"parts-[0-9a-z]+/[0-9]+\.parquet")


class Row(NamedTuple):
    """One blob of a manifest."""

    name: str
    size: int
    etag: str | None
    """The quoted ETag; None if it is not known."""


Columns: TypeAlias = tuple[list[str], list[int], list["str | None"]]
"""Rows as names, sizes, and ETags."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a manifest."""

    name: str
    """Relative to the folder of the manifest."""
    rows: int
    size: int
    """Bytes of the file."""
    digest: str
    """Of its contents."""


@dataclass(frozen=True)
class Description:
    """What ``manifest.json`` says."""

    container: str
    """The URL of the container that was listed."""
    prefix: str
    """The beginning that all names have."""
    made: str
    """When the listing began, in UTC: ``2026-11-27T12:00:00Z``."""
    total: int
    """Bytes of all blobs."""
    parts: tuple[Part, ...]

    @cached_property
    def ends(self) -> list[int]:
        """The row after the last one of each part."""
        return list(accumulate(part.rows for part in self.parts))

    @property
    def rows(self) -> int:
        """Number of blobs."""
        return self.ends[-1] if self.parts else 0

    @cached_property
    def digest(self) -> str:
        """Equal for manifests with the same names, sizes, and ETags."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            digest.update(bytes.fromhex(part.digest))
        return digest.hexdigest()

    def locate(self, row: int) -> tuple[int, int]:
        """The part that has *row*, and its index there."""
        number = bisect_right(self.ends, row)
        return number, row - (self.ends[number - 1] if number else 0)

    def to_bytes(self) -> bytes:
        """The document."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "container": self.container,
            "prefix": self.prefix,
            "made": self.made,
            "rows": self.rows,
            "size": self.total,
            "digest": self.digest,
            "parts": [{"name": p.name, "rows": p.rows, "size": p.size, "digest": p.digest} for p in self.parts],
        }
        return json.dumps(document, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Description:
        """The description in the document *data*, which is at *where*.

        Raises:
            ManifestError: it is truncated, not a manifest, or of a newer version.
        """
        document = parse_document(data, where)
        if document.get("format") != _FORMAT:
            raise ManifestError(f"{where}: it is not a manifest; `azstoragetorch manifest make` makes one")
        if document.get("version") != _VERSION:
            raise ManifestError(
                f"{where}: version {document.get('version')!r} is not supported; this release reads {_VERSION}"
            )
        try:
            parts = tuple(_part_of(entry) for entry in document["parts"])
            description = cls(
                _text(document["container"]),
                _text(document["prefix"]),
                _text(document["made"]),
                _count(document["size"]),
                parts,
            )
            is_complete = (document["rows"], document["digest"]) == (description.rows, description.digest)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{where}: the manifest is damaged ({type(error).__name__}: {error})") from error
        if not is_complete:
            raise ManifestError(f"{where}: the manifest is damaged: its parts do not add up to its rows and digest")
        return description


def parse_document(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in *data*.

    Raises:
        ManifestError: *data* is not a JSON object.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: the manifest is truncated or is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: it is not a manifest")
    return document


def check_ascends(where: str, before: str, after: str) -> None:
    """Check that the name *after* comes after *before*, by their UTF-8 bytes.

    Raises:
        ManifestError: it does not; the message says whether a name is there twice.
    """
    if before == after:
        raise ManifestError(f"{where}: the name {before!r} is there twice")
    if before > after:
        raise ManifestError(f"{where}: the name {after!r} comes after {before!r}: rows must be in order")


def _part_of(entry: Any) -> Part:
    name, digest = _text(entry["name"]), _text(entry["digest"])
    if not _PART.fullmatch(name) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"a part with the name {name!r} and the digest {digest!r}")
    rows = _count(entry["rows"])
    if not 0 < rows <= PART_ROWS:
        raise ValueError(f"a part of {rows} rows")
    return Part(name, rows, _count(entry["size"]), digest)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, not {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a number, not {value!r}")
    return value
