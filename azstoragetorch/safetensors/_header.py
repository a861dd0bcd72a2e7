"""The header of a safetensors file: 8 bytes with its length, then JSON. Parsed entry by entry, and never executed.

A header comes from the network. Every entry is checked before the next one is looked at, so a hostile header costs no
more memory than its own bytes, and nothing that it claims is allocated: the tensors of a valid header are exactly the
rest of the file, whose length the service has reported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from azstoragetorch._engine.config import KiB
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._dtypes import BITS, RANK

LENGTH = 8  # bytes before the JSON, with its length, little-endian
LARGEST = 100_000_000  # bytes of JSON; the format has this limit
_DIMENSIONS = 64  # no tensor of torch has more
_DIGITS = 19  # of a number that fits into 64 bits
_ENTRY = re.compile(rf"\{{[^{{}}]{{0,{8 * KiB}}}\}}")
_SPACE = re.compile(r"[ \t\n\r]*")
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """A tensor as the header describes it: its type and shape, and its bytes ``start <= i < stop`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """A valid header. The entries are in the order of their bytes."""

    metadata: dict[str, str] | None
    entries: dict[str, Entry]


def header_length(head: bytes, size: int, url: str) -> int:
    """The length of the JSON, from the first bytes of a file of *size* bytes.

    Raises:
        SafetensorsError: the file cannot have a header of that length.
    """
    if len(head) < LENGTH:
        raise SafetensorsError(f"{url} is not a safetensors file: it has only {size} bytes", url=url)
    length = int.from_bytes(head[:LENGTH], "little")
    if not 2 <= length <= LARGEST or length > size - LENGTH:
        raise SafetensorsError(
            f"{url} is not a safetensors file, or it is truncated: its header claims to have {length:,} bytes, and the "
            f"file has {size:,}",
            url=url,
        )
    return length


def parse_header(content: bytes, size: int, url: str) -> Header:
    """Parse the JSON of a file of *size* bytes and check that its tensors are exactly the rest of the file.

    Raises:
        SafetensorsError: it is not a valid header.
    """
    return _Parser(content, size, url).parse()


class _Parser:
    def __init__(self, content: bytes, size: int, url: str) -> None:
        self._url = url
        self._begin = LENGTH + len(content)
        self._rest = size - self._begin
        self._at = 0
        try:
            self._text = content.decode("utf-8")
        except UnicodeDecodeError:
            self._fail("the header is not UTF-8")

    def parse(self) -> Header:
        metadata: dict[str, str] | None = None
        entries: dict[str, Entry] = {}
        for name in self._keys():
            if name == _METADATA:
                if metadata is not None:
                    self._fail(f"{_METADATA} is there twice")
                metadata = self._metadata()
            elif name in entries:
                self._fail("the tensor is there twice", name)
            else:
                entries[name] = self._entry(name)
        self._skip()
        if self._at != len(self._text):
            self._fail("bytes follow the JSON of the header")
        return Header(metadata, self._in_order(entries))

    def _keys(self) -> Iterable[str]:
        """The keys of the object that begins here; the caller reads the value of each before it takes the next."""
        if not self._takes("{"):
            self._fail("the header is not a JSON object")
        if self._takes("}"):
            return
        while True:
            name = self._string()
            if not self._takes(":"):
                self._fail("a ':' is missing", name)
            yield name
            if self._takes("}"):
                return
            if not self._takes(","):
                self._fail("a ',' is missing", name)

    def _metadata(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for key in self._keys():
            if key in found:
                self._fail(f"{_METADATA} has {key!r:.100} twice")
            found[key] = self._string()
        return found

    def _string(self) -> str:
        self._skip()
        if not self._text.startswith('"', self._at):
            self._fail(f"there is no string at character {self._at:,} of the header")
        try:
            found, self._at = _DECODER.raw_decode(self._text, self._at)
            found.encode()
        except ValueError:
            self._fail(f"the string at character {self._at:,} of the header is not valid")
        return str(found)

    def _entry(self, name: str) -> Entry:
        self._skip()
        found = _ENTRY.match(self._text, self._at)
        if found is None:
            self._fail("it is not described by an object with dtype, shape and data_offsets", name)
        self._at = found.end()
        try:
            pairs: Any = _DECODER.decode(found[0])
        except (ValueError, RecursionError):
            self._fail("its description is not valid JSON", name)
        fields = dict(pairs)
        if len(fields) != len(pairs) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            self._fail("it is not described by exactly dtype, shape and data_offsets", name)
        return self._checked(name, **fields)

    def _checked(self, name: str, dtype: Any, shape: Any, data_offsets: Any) -> Entry:
        if type(dtype) is not str or dtype not in BITS:
            self._fail(f"its type {dtype!r:.100} is not one of safetensors", name)
        if type(shape) is not list or len(shape) > _DIMENSIONS or not all(type(length) is int for length in shape):
            self._fail(f"its shape {shape!r:.100} is not a list of at most {_DIMENSIONS} integers", name)
        if type(data_offsets) is not list or [type(offset) for offset in data_offsets] != [int, int]:
            self._fail(f"its data_offsets {data_offsets!r:.100} are not two integers", name)
        start, stop = data_offsets
        if start > stop or stop > self._rest:
            self._fail(f"its bytes {start:,} to {stop:,} are not inside of the {self._rest:,} bytes of data", name)
        bits = math.prod(shape) * BITS[dtype]
        if bits != 8 * (stop - start):
            self._fail(
                f"a tensor of type {dtype} and shape {shape!r:.200} does not have {stop - start:,} bytes, which is "
                "what data_offsets says",
                name,
            )
        return Entry(dtype, tuple(shape), self._begin + start, self._begin + stop)

    def _in_order(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """*entries* by their bytes, which must be one after the other, without gaps, up to the end of the file."""
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        at, before = self._begin, ""
        for name, entry in ordered.items():
            if entry.start != at:
                what = "overlaps" if entry.start < at else "leaves a gap after"
                self._fail(f"it {what} {before!r:.200}" if before else "it does not begin where the data does", name)
            at, before = entry.stop, name
        if at != self._begin + self._rest:
            self._fail(
                f"the file has {self._rest:,} bytes of data, and the tensors of the header have "
                f"{at - self._begin:,}: it is truncated, or not complete"
            )
        return ordered

    def _takes(self, character: str) -> bool:
        """Whether *character* is next, after white space; it is passed then."""
        self._skip()
        if not self._text.startswith(character, self._at):
            return False
        self._at += 1
        return True

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _fail(self, what: str, name: str | None = None) -> NoReturn:
        of = f" of {name!r:.200}" if name is not None else ""
        raise SafetensorsError(
            f"{self._url}: the safetensors header{of} is not valid: {what}", url=self._url, tensor=name
        )


def _number(text: str) -> int:
    """A number of the JSON; lengths and offsets are not negative, and a number of many digits takes long to parse."""
    if not (text.isdigit() and len(text) <= _DIGITS):
        raise ValueError("not a length or an offset")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"not a length or an offset: {text:.20}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=list, parse_int=_number, parse_float=_no_number, parse_constant=_no_number
)


class Layout(NamedTuple):
    """A file that is to be written: the bytes before its data, and the names of its tensors in the order of these."""

    head: bytes
    names: list[str]
    size: int


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> Layout:
    """Lay out a file with *tensors*, given as type and shape by name, as the package safetensors does."""
    names = sorted(tensors, key=lambda name: (RANK[tensors[name][0]], name.encode()))
    described: dict[str, Any] = {_METADATA: dict(metadata)} if metadata is not None else {}
    at = 0
    for name in names:
        dtype, shape = tensors[name]
        stop = at + math.prod(shape) * BITS[dtype] // 8
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Layout(len(text).to_bytes(LENGTH, "little") + text, names, LENGTH + len(text) + at)
