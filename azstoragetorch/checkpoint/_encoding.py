"""Items as bytes: what a data blob consists of, piece by piece, from tensor memory."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.scope import Scope
from azstoragetorch._tensors.host import Copiers, host_bytes
from azstoragetorch._tensors.planning import contiguous_strides
from azstoragetorch._tensors.progress import ProgressCounter
from azstoragetorch.checkpoint._format import Item, Payload, envelope, has_payload

ENVELOPE = 4 * KiB  # at most, around the payload of an item
_SMALL = 32 * KiB  # pieces below are copied together: a system call for each would cost more


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
    ) -> None:
        self.name = name
        self.size_hint = sum(size_hint(item) + ENVELOPE for item in items)
        self._items = items
        self._planner = planner
        self._planner_calls = planner_calls
        self._extensions = extensions
        self._chunk = chunk
        self._counter = counter
        self._copiers = Copiers()
        self._at = 0
        self.written: list[tuple[MetadataIndex, Item]] = []
        self.key: str | None = None
        self.error: Exception | None = None
        self.is_done = False

    def pieces(self, scope: Scope) -> Iterator[memoryview]:
        """The bytes of all items, until *scope* is cancelled.

        Small pieces come together in a copy, large ones are the items' own memory.
        """
        small = bytearray()
        try:
            for item in self._items:
                scope.check()
                self.key = item.index.fqn
                begin = self._at
                for piece in self._encode(item):
                    self._at += piece.nbytes
                    if piece.nbytes < _SMALL:
                        small += piece
                        if len(small) < _SMALL:
                            continue
                    if small and piece.nbytes >= _SMALL:
                        yield memoryview(small)
                        small = bytearray()
                        yield piece
                    elif small:
                        yield memoryview(small)
                        small = bytearray()
                    else:
                        yield piece
                self._counter.add(min(size_hint(item), self._at - begin))
        except Exception as error:
            self.error = error
            raise
        if small:
            yield memoryview(small)
        self.is_done = True

    def _encode(self, item: WriteItem) -> Iterator[memoryview]:
        with self._planner_calls:
            value = self._planner.resolve_data(item)
        if isinstance(value, torch.Tensor):
            value = value.detach()
        if self._extensions:
            data, transforms = self._transform(value)
            self._note(item, data.nbytes, transforms=transforms)
            yield data
        elif not isinstance(value, torch.Tensor):
            data = value.getbuffer()
            self._note(item, data.nbytes)
            yield data
        elif not has_payload(value):
            data = _saved(value)
            self._note(item, data.nbytes)
            yield data
        else:
            shape = value.shape
            around = envelope(value.dtype, shape)
            payload = Payload(len(around.head), value.dtype, tuple(shape), contiguous_strides(shape))
            self._note(item, len(around.head) + payload.nbytes + len(around.tail), payload=payload)
            yield memoryview(around.head)
            yield from host_bytes(value, self._copiers.of(value.device), self._chunk)
            yield memoryview(around.tail)

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

    def _note(
        self, item: WriteItem, length: int, *, transforms: tuple[str, ...] = (), payload: Payload | None = None
    ) -> None:
        self.written.append((item.index, Item(self.name, self._at, length, transforms, payload)))


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
