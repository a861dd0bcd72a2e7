"""The blobs of a stream of weights: full ones, deltas, and the pointer that names the current chain. No I/O.

A full blob or delta begins with the length of its header (8 bytes, little-endian) and the header, JSON. Then come the
bytes of the tensors. The pointer is JSON, too: the last full blob and the deltas after it, with the size and the digest
of each. Everything comes from a network: it is parsed and checked, never executed.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from azstoragetorch.exceptions import WeightsError

POINTER = "latest.json"
ALIGNMENT = 64  # bytes; tensors are used where they lie in the blob
_VERSION = 1
_NAME = re.compile(r"(?:full|delta)-[0-9]{14}-[0-9]{1,12}-[0-9a-f]{16}\.weights")
_DIGEST = re.compile(r"[a-z0-9_]{1,32}:[0-9a-f]{32,128}")
_LARGEST = 1 << 60  # bytes of anything
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}


@dataclass(frozen=True)
class Link:
    """One blob of a chain, and what it leads to."""

    name: str
    size: int
    digest: str
    step: int
    sequence: int

    @property
    def is_full(self) -> bool:
        """Whether it needs no other blob."""
        return self.name.startswith("full-")


@dataclass(frozen=True)
class Pointer:
    """What is current: a full blob and the deltas after it; and *previous*, which late readers may still fetch."""

    chain: tuple[Link, ...]
    previous: tuple[str, ...] = ()

    @property
    def last(self) -> Link:
        """The newest blob."""
        return self.chain[-1]


@dataclass(frozen=True)
class Part:
    """A tensor in a blob: ``length`` bytes at ``offset``, counted from the end of the header, in one of the forms."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: str
    count: int
    offset: int
    length: int
    digest: str
    """Of the tensor afterwards."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the tensor."""
        return _DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


def new_name(kind: str, sequence: int) -> str:
    """A name that no other blob has: the kind, the time in UTC, the number in the stream, and random bits."""
    stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime())
    return f"{kind}-{stamp}-{sequence}-{os.urandom(8).hex()}.weights"


def is_name(name: str) -> bool:
    """Whether *name* is that of a full blob or a delta."""
    return _NAME.fullmatch(name) is not None


def dump_pointer(pointer: Pointer) -> bytes:
    """*pointer* as the content of its blob."""
    whole = {"version": _VERSION, "chain": [asdict(link) for link in pointer.chain], "previous": pointer.previous}
    return json.dumps(whole).encode()


def load_pointer(data: bytes) -> Pointer:
    """Read the content of a pointer.

    Raises:
        WeightsError: it is damaged or of a later version.
    """
    try:
        whole = json.loads(data)
        if whole["version"] != _VERSION:
            raise WeightsError("it has a format that this version does not know")
        chain = tuple(_link(values) for values in whole["chain"])
        previous = tuple(str(name) for name in whole["previous"] if is_name(name))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise WeightsError(f"it cannot be read: {type(error).__name__}") from None
    numbers = [link.sequence for link in chain]
    is_chain = chain and chain[0].is_full and not any(link.is_full for link in chain[1:])
    if not is_chain or numbers != list(range(numbers[0], numbers[0] + len(chain))):
        raise WeightsError("its chain has a gap")
    return Pointer(chain, previous)


def _link(values: Mapping[str, Any]) -> Link:
    link = Link(**{name: values[name] for name in ("name", "size", "digest", "step", "sequence")})
    are_numbers = all(_is_count(number) for number in (link.size, link.sequence)) and type(link.step) is int
    are_names = type(link.name) is type(link.digest) is str
    if not (are_numbers and are_names and is_name(link.name) and _DIGEST.fullmatch(link.digest)):
        raise WeightsError("it names something that is not part of a stream")
    return link


def dump_header(base: str | None, parts: Sequence[Part]) -> bytes:
    """The beginning of a blob with *parts*: a delta to the blob *base*, or a full one."""
    header = json.dumps({"version": _VERSION, "base": base, "parts": [asdict(part) for part in parts]}).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def load_header(data: memoryview) -> tuple[str | None, list[Part], memoryview]:
    """Read the beginning of a blob: its base, its parts, and the bytes after the header.

    Raises:
        WeightsError: it is damaged or of a later version.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise WeightsError("it is truncated")
    rest = data[8 + length :]
    try:
        whole = json.loads(bytes(data[8 : 8 + length]))
        if whole["version"] != _VERSION:
            raise WeightsError("it has a format that this version does not know")
        parts = [_part(values, len(rest)) for values in whole["parts"]]
        base = whole["base"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise WeightsError(f"its header cannot be read: {type(error).__name__}") from None
    if base is not None and not (type(base) is str and is_name(base)):
        raise WeightsError("its base is not part of a stream")
    return base, parts, rest


def _part(values: Mapping[str, Any], size: int) -> Part:
    part = Part(**{**values, "shape": tuple(values["shape"])})
    are_counts = all(_is_count(number) for number in (*part.shape, part.count, part.offset, part.length))
    are_strings = all(type(text) is str for text in (part.name, part.dtype, part.form, part.digest))
    if not (are_counts and are_strings and len(part.shape) <= 64 and _DIGEST.fullmatch(part.digest)):
        raise WeightsError("its header describes something that is not a tensor")
    if part.dtype not in _DTYPES or part.offset + part.length > size or part.nbytes > _LARGEST:
        raise WeightsError(f"it is truncated, or {part.name!r:.200} is not a tensor that exists")
    return part


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST
