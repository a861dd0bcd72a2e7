"""The mark on a metadata blob whose folder was cleaned. `_commit` explains its purpose. No I/O."""

from __future__ import annotations

import os
from collections.abc import Mapping

_HEADER = "x-ms-meta-azstoragetorch_cleaned"
_TOMBSTONE = b"azstoragetorch: not a checkpoint; data of interrupted saves is being deleted. "
TOMBSTONE_SIZE = len(_TOMBSTONE) + 32  # bytes; no metadata is as short as that


def new_tombstone() -> bytes:
    """Content that stands in the place of metadata while a folder without a checkpoint is cleaned."""
    return _TOMBSTONE + os.urandom(16).hex().encode()


def is_tombstone(content: bytes) -> bool:
    """Whether *content* is that of a tombstone."""
    return len(content) == TOMBSTONE_SIZE and content.startswith(_TOMBSTONE)


def cleaned_headers(cutoff: float) -> dict[str, str]:
    """Headers that say: data of saves that began up to *cutoff*, in seconds since 1970, is deleted."""
    return {_HEADER: f"{cutoff:.0f}"}


def cleaned_until(headers: Mapping[str, str]) -> float | None:
    """The cutoff in the *headers* of a metadata blob; None if it has none."""
    value = headers.get(_HEADER, "")
    return float(value) if value.isascii() and value.isdigit() else None
