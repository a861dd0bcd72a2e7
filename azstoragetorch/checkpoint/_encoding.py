"""Items as bytes: what a data blob consists of, piece by piece, from tensor memory.

With digests, the bytes of an item are read once for the digest before any of them is sent. An item that the base has
as well becomes an `Unchanged`: a range of the base, for the service to copy.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.scope import Scope
from azstoragetorch._tensors.hashing import digest_of
from azstoragetorch._tensors.host import Copiers, host_bytes, is_in_place
from azstoragetorch._tensors.planning import contiguous_strides
from azstoragetorch._tensors.progress import ProgressCounter
from azstoragetorch.checkpoint._base import Digesting
from azstoragetorch.checkpoint._format import Item, Payload, envelope, has_payload
from azstoragetorch.checkpoint._unchanged import Part, Unchanged, merged

ENVELOPE = 4 * KiB  # at most, around the payload of an item
_SMALL = 32 * KiB  # pieces below are copied together: a system call for each would cost more


@dataclass(frozen=True, slots=True)
class _Encoded:
    """An item as bytes: its content, which the digest is of, between a head and a tail if it is a dense tensor.

    *content* makes the pieces of the content again and again, with the given copiers.
    """

    content: Callable[[Copiers], Iterable[memoryview]]
    nbytes: int
    head: bytes = b""
    tail: bytes = b""
    payload: Payload | None = None
    transforms: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Bytes of the whole item."""
        return len(self.head) + self.nbytes + len(self.tail)

    def pieces(self, copiers: Copiers) -> Iterator[memoryview]:
        """The bytes of the whole item."""
        if self.head:
            yield memoryview(self.head)
        yield from self.content(copiers)
        if self.tail:
            yield memoryview(self.tail)

    def pieces_again(self) -> Iterator[memoryview]:
        """The same, for any thread."""
        return self.pieces(Copiers())


def _held(data: memoryview, transforms: tuple[str, ...] = ()) -> _Encoded:
    """An item whose bytes are in memory."""
    return _Encoded(lambda _copiers: (data,), data.nbytes, transforms=transforms)


class Encoder:
    """Turns items into the bytes of one blob, and notes where each of them went.

    `pieces` is drawn by several threads in turn; ``key`` is the item that it is at, ``error`` what it raised, and
    ``is_done`` says that there are no more.
    """

    def __init__(
        self,
        name: str,
        items: Sequence[WriteItem],
        planner: SavePlanner,
        planner_calls: AbstractContextManager[Any],
        extensions: tuple[Any, ...],
        chunk: int,
        counter: ProgressCounter,
        digesting: Digesting | None = None,
    ) -> None:
        self.name = name
        self.size_hint = sum(size_hint(item) + ENVELOPE for item in items)
        self._items = items
        self._planner = planner
        self._planner_calls = planner_calls
        self._extensions = extensions
        self._chunk = chunk
        self._counter = counter
        self._digesting = digesting
        self._copiers = Copiers()
        self._at = 0
        self.written: list[tuple[MetadataIndex, Item]] = []
        self.key: str | None = None
        self.error: Exception | None = None
        self.is_done = False

    def pieces(self, scope: Scope) -> Iterator[Part]:
        """The bytes of all items, until *scope* is cancelled, and ranges of the base in the place of unchanged ones.

        Small pieces come together in a copy, large ones are the items' own memory.
        """
        parts = self._parts(scope)
        if self._digesting is not None and self._digesting.base is not None:
            parts = merged(parts)
        yield from _joined(parts)
        self.is_done = True

    def _parts(self, scope: Scope) -> Iterator[Part]:
        try:
            for item in self._items:
                scope.check()
                self.key = item.index.fqn
                begin = self._at
                encoded = self._encode(item)
                self._at += encoded.length
                noted = Item(self.name, begin, encoded.length, encoded.transforms, encoded.payload)
                if self._digesting is None:
                    self.written.append((item.index, noted))
                    yield from encoded.pieces(self._copiers)
                else:
                    yield from self._digested(item.index, noted, encoded, self._digesting)
                self._counter.add(min(size_hint(item), self._at - begin))
        except Exception as error:
            self.error = error
            raise

    def _digested(self, index: MetadataIndex, noted: Item, encoded: _Encoded, digesting: Digesting) -> Iterator[Part]:
        """Compute the digest of an item, and take it from the base if it is there."""
        noted = noted._replace(digest=digest_of(encoded.content(self._copiers), digesting.algorithm))
        self.written.append((index, noted))
        found = digesting.base.find(noted) if digesting.base is not None else None
        if found is None or found.etag is None:
            yield from encoded.pieces(self._copiers)
        else:
            yield Unchanged(found.path, found.etag, found.offset, found.offset + found.length, encoded.pieces_again)

    def _encode(self, item: WriteItem) -> _Encoded:
        with self._planner_calls:
            value = self._planner.resolve_data(item)
        if isinstance(value, torch.Tensor):
            value = value.detach()
        if self._extensions:
            return _held(*self._transform(value))
        if not isinstance(value, torch.Tensor):
            return _held(value.getbuffer())
        if not has_payload(value):
            return _held(_saved(value))
        shape = value.shape
        around = envelope(value.dtype, shape)
        payload = Payload(len(around.head), value.dtype, tuple(shape), contiguous_strides(shape))
        content = partial(_content, value, self._chunk)
        encoded = _Encoded(content, payload.nbytes, around.head, around.tail, payload)
        if self._digesting is not None and not is_in_place(value) and payload.nbytes <= self._chunk:
            held = tuple(content(self._copiers))  # copied once, for the digest and the upload
            encoded = replace(encoded, content=lambda _copiers: held)
        return encoded

    def _transform(self, value: Any) -> tuple[memoryview, tuple[str, ...]]:
        sink = _Unclosed()
        stream: Any = sink
        for extension in self._extensions:
            stream = extension.transform_to(stream)
        if isinstance(value, torch.Tensor):
            torch.save(_compact(value), stream)
        else:
            stream.write(value.getbuffer())
        stream.close()
        return sink.getbuffer(), tuple(extension.get_descriptor() for extension in reversed(self._extensions))


def _content(tensor: torch.Tensor, chunk: int, copiers: Copiers) -> Iterator[memoryview]:
    return host_bytes(tensor, copiers.of(tensor.device), chunk)


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    """*parts*, with small pieces joined to larger ones."""
    small = bytearray()
    for part in parts:
        if isinstance(part, Unchanged) or part.nbytes >= _SMALL:
            if small:
                yield memoryview(small)
                small = bytearray()
            yield part
            continue
        small += part
        if len(small) >= _SMALL:
            yield memoryview(small)
            small = bytearray()
    if small:
        yield memoryview(small)


class _Unclosed(io.BytesIO):
    """Extensions close the stream below their own; what it holds is wanted after that."""

    def close(self) -> None:
        """Keep the content."""


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """*tensor* on the CPU, with no more memory than its own."""
    tensor = tensor.cpu()
    is_view = has_payload(tensor) and tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_view else tensor


def _saved(tensor: torch.Tensor) -> memoryview:
    sink = io.BytesIO()
    torch.save(_compact(tensor), sink)
    return sink.getbuffer()


def size_hint(item: WriteItem) -> int:
    """About the bytes of *item* on this rank: of its shard, not of the whole tensor; bytes items count as one."""
    data = item.tensor_data
    if item.type == WriteItemType.BYTE_IO or data is None:
        return 1
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
