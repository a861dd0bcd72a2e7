"""Parse the headers of a tar: pure functions over blocks and records. Every number is bounded before it is used.

The message of `DamagedHeaderError` describes the damage; the caller adds the position of the header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 512
MAX_SIZE = 1 << 60  # bytes of one file; beyond it a header is damaged
_MAX_DIGITS = 19  # of MAX_SIZE
_SPARSE_IN_HEADER, _SPARSE_IN_BLOCK, _ENTRY = 386, 0, 24  # of GNU's old format: where the map is, bytes of an entry
_USED = frozenset({"path", "size"})
_HIGH = bytes(range(128))
_SPARSE_PAIR = ("GNU.sparse.offset", "GNU.sparse.numbytes")
_LENGTH = re.compile(rb"([0-9]+) ")


class DamagedHeaderError(Exception):
    """A header that contradicts itself or claims what cannot be."""


class Header(NamedTuple):
    """The part of a header that describes what follows it."""

    kind: int
    size: int
    block: bytes

    @property
    def name(self) -> str:
        """The name in the block itself; an extended header before it may hold a longer one."""
        name = text(self.block[:100])
        prefix = text(self.block[345:500]) if self.block[257:263] == b"ustar\0" else ""
        return f"{prefix}/{name}" if prefix else name


@dataclass(frozen=True, slots=True)
class Holes:
    """A sparse file: its size with the holes, and the pieces that are stored, as offset and length, in order."""

    size: int
    pieces: list[tuple[int, int]]

    def check(self, stored: int) -> None:
        """Refuse pieces that overlap, lie outside the file, or are more than the *stored* bytes."""
        end = 0
        for offset, length in self.pieces:
            if offset < end:
                raise DamagedHeaderError("its map of holes is not in order")
            end = offset + length
        if end > self.size:
            raise DamagedHeaderError(f"its map of holes ends at byte {end} of {self.size}")
        if sum(length for _, length in self.pieces) > stored:
            raise DamagedHeaderError(f"its map of holes describes more than the {stored} bytes that are stored")


def parse(block: bytes) -> Header | None:
    """The header in *block*, or None if its checksum or its size is wrong."""
    if len(block) != BLOCK:
        return None
    try:
        total = sum(block) - sum(block[148:156]) + 256
        expected = number(block[148:156])
        if total == expected or _as_signed(block, total) == expected:
            size = number(block[124:136])
            if 0 <= size <= MAX_SIZE:
                return Header(block[156], size, block)
    except ValueError:
        pass
    return None


def _as_signed(block: bytes, total: int) -> int:
    """The checksum of old systems whose characters are signed."""
    counted = block[:148] + block[156:]
    return total - 256 * len(counted.translate(None, _HIGH))


def number(field: bytes) -> int:
    """A number in a header: octal digits up to a NUL, or GNU's base 256."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False)
        return value - (1 << (8 * len(field) - 1)) if field[0] == 0x80 else value - (1 << 8 * len(field))
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _bounded(field: bytes) -> int:
    """A number in the old format of sparse files."""
    try:
        value = number(field)
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_SIZE:
        raise DamagedHeaderError(f"its map of holes has the impossible number {field!r}")
    return value


def decimal(digits: str, what: str) -> int:
    """A number in an extended header, of at most `MAX_SIZE`."""
    if digits.isascii() and digits.isdigit() and len(digits.lstrip("0")) <= _MAX_DIGITS:
        value = int(digits[-_MAX_DIGITS:])
        if value <= MAX_SIZE:
            return value
    raise DamagedHeaderError(f"{what} is {digits[:30]!r}")


def text(field: bytes) -> str:
    """A string up to its NUL."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def records(data: bytes) -> dict[str, str]:
    """The records of a PAX header that matter to a reader: lines of ``<length> <key>=<value>``, up to a NUL.

    In the first of GNU's sparse formats keys repeat, for one piece each; they become the one map of the second.
    """
    found = {}
    pieces: list[str] = []
    at = 0
    while at < len(data) and data[at]:
        length = _LENGTH.match(data, at)
        if length is None:
            raise DamagedHeaderError("a record begins without a length")
        end = at + decimal(length[1].decode(), "the length of a record")
        key, equals, value = data[length.end() : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(data):
            raise DamagedHeaderError("a record has no value or a wrong length")
        name, content = key.decode("utf-8", "surrogateescape"), value[:-1].decode("utf-8", "surrogateescape")
        if name in _SPARSE_PAIR:
            if name != _SPARSE_PAIR[len(pieces) % 2]:
                raise DamagedHeaderError("its map of holes is not in order")
            pieces.append(content)
        elif name in _USED or name.startswith("GNU.sparse."):
            found[name] = content
        at = end
    if pieces:
        found.setdefault("GNU.sparse.map", ",".join(pieces))
    return found


def is_sparse(header: Header, fields: Mapping[str, str]) -> bool:
    """Whether the file has holes that are not stored."""
    return header.kind == ord("S") or any(key.startswith("GNU.sparse.") for key in fields)


def holes_in_fields(fields: Mapping[str, str]) -> Holes | None:
    """The map of PAX formats 0.0 and 0.1; None for 1.0, where it is in front of the data."""
    if "GNU.sparse.map" in fields or "GNU.sparse.major" not in fields:
        digits = fields.get("GNU.sparse.map") or ""
        numbers = [decimal(part, "its map of holes") for part in digits.split(",")] if digits else []
        return Holes(sparse_size(fields), pairs(numbers))
    version = fields["GNU.sparse.major"], fields.get("GNU.sparse.minor")
    if version != ("1", "0"):
        raise DamagedHeaderError(
            f"its sparse format has the unknown version {version[0][:10]!r}.{(version[1] or '')[:10]!r}"
        )
    return None


def sparse_size(fields: Mapping[str, str]) -> int:
    """The size of a sparse file, holes and all."""
    digits = fields.get("GNU.sparse.realsize") or fields.get("GNU.sparse.size") or ""
    return decimal(digits, "its size with holes")


def old_sparse_size(block: bytes) -> int:
    """The size of a file in GNU's old format of sparse files, holes and all."""
    return _bounded(block[483:495])


def pieces_in(block: bytes, is_first: bool) -> tuple[list[tuple[int, int]], bool]:
    """The part of GNU's old map in a header or in a block behind it, and whether another block follows."""
    begin, count, more = (_SPARSE_IN_HEADER, 4, 482) if is_first else (_SPARSE_IN_BLOCK, 21, 504)
    found = []
    for at in range(begin, begin + count * _ENTRY, _ENTRY):
        if not block[at + 12]:
            break
        found.append((_bounded(block[at : at + 12]), _bounded(block[at + 12 : at + _ENTRY])))
    return found, bool(block[more])


def pairs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Offsets and lengths that follow each other."""
    flat = list(numbers)
    if len(flat) % 2:
        raise DamagedHeaderError("its map of holes has an offset without a length")
    return list(zip(flat[::2], flat[1::2], strict=True))
