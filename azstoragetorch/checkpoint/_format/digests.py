"""The side blob of digests: what the bytes of each item were when they were saved.

It is a line with the SHA-256 of the rest, and JSON. The metadata names it and holds no digest. So a digest never comes
from the pickle, and a side blob that is damaged is known as such.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from azstoragetorch.checkpoint._format.items import Item
from azstoragetorch.checkpoint._format.records import LARGEST
from azstoragetorch.exceptions import CheckpointError

_VERSION = 1
_HEAD = 65  # bytes of the first line
_PLACE_SIZE = 192  # bytes; at most, of one digest with its place: two numbers and 512 bits in hexadecimal
_ROOM = 1 << 20  # bytes for everything else
_HEX = re.compile(r"[0-9a-f]{32,128}")
_ALGORITHM = re.compile(r"[a-z0-9_]{1,32}")

Place = tuple[str, int, int]
"""Bytes ``start <= i < stop`` of a data blob."""


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests of one checkpoint, as ``algorithm:hexadecimal``, by the place of the bytes."""

    save_id: str
    by_place: Mapping[Place, str]

    def of(self, item: Item) -> str | None:
        """The digest of *item*, if there is one."""
        return self.by_place.get(place_of(item))


def place_of(item: Item) -> Place:
    """The bytes of *item* that its digest is of: those of the tensor, or all if the item has to be decoded."""
    payload = item.payload
    if payload is None or item.transforms:
        return item.path, item.offset, item.offset + item.length
    start = item.offset + payload.offset
    return item.path, start, start + payload.nbytes


def largest_digests(items: int) -> int:
    """No side blob of a checkpoint with as many *items* is longer; in bytes."""
    return items * (_PLACE_SIZE + 1024) + _ROOM


def dump_digests(save_id: str, by_place: Mapping[Place, str]) -> bytes:
    """The content of the side blob of the save *save_id*."""
    blobs: dict[str, dict[str, list[list[object]]]] = {}
    for (path, start, stop), digest in sorted(by_place.items()):
        algorithm, _, value = digest.partition(":")
        blobs.setdefault(path, {}).setdefault(algorithm, []).append([start, stop, value])
    whole = {"version": _VERSION, "save_id": save_id, "blobs": blobs}
    body = json.dumps(whole, separators=(",", ":")).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def load_digests(data: bytes) -> Digests:
    """Read *data*, the content of a side blob.

    Raises:
        CheckpointError: it is damaged, or of a later format.
    """
    head, body = data[:_HEAD], data[_HEAD:]
    if head != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise CheckpointError("the digests do not match their own checksum")
    try:
        whole: Any = json.loads(body)
        if whole["version"] != _VERSION:
            raise CheckpointError("the digests have a format that this version does not know")
        found: dict[Place, str] = {}
        for path, by_algorithm in whole["blobs"].items():
            for algorithm, places in by_algorithm.items():
                for start, stop, value in places:
                    found[path, start, stop] = _checked(algorithm, start, stop, value)
        return Digests(str(whole["save_id"]), found)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the digests cannot be read: {type(error).__name__}") from None


def _checked(algorithm: str, start: Any, stop: Any, value: Any) -> str:
    is_place = type(start) is type(stop) is int and 0 <= start <= stop <= LARGEST
    if not (is_place and _ALGORITHM.fullmatch(algorithm) and type(value) is str and _HEX.fullmatch(value)):
        raise CheckpointError("the digests hold something that is not a digest")
    return f"{algorithm}:{value}"
