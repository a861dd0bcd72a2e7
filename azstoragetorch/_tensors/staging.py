"""Where the bytes of a piece go: into the memory of the tensor itself, or through a buffer that is copied from.

A piece is received in place if its bytes are exactly the elements of a contiguous part of a tensor on the CPU. Anything
else - other devices, other types, other layouts - is received into a buffer under the memory limit and copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from azstoragetorch._engine.budget import Budget, BufferPool
from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.threads import one_at_a_time
from azstoragetorch._tensors.host import Copier, is_in_place, select
from azstoragetorch._tensors.planning import Piece, contiguous_strides

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
_REUSED = 64 * MiB  # staging buffers up to this size are kept for the next request
_ALIGNMENT = 64  # bytes; elements of any type may lie there


class NoMemoryError(Exception):
    """A buffer of *size* bytes could not be allocated."""

    def __init__(self, size: int, reason: str) -> None:
        super().__init__(f"no memory for {size:,} bytes: {reason}")
        self.size = size
        self.reason = reason


class Staging:
    """The buffers and copiers of one load, bounded by *memory_limit* bytes."""

    def __init__(self, memory_limit: int) -> None:
        self._budget = Budget(memory_limit)
        self._buffers = BufferPool(memory_limit)
        self._making = one_at_a_time()
        self._copiers: dict[tuple[int, torch.device], Copier] = {}

    def copier(self, device: torch.device) -> Copier:
        """The copier of this thread to *device*."""
        key = threading.get_ident(), device
        with self._making:
            if key not in self._copiers:
                self._copiers[key] = Copier(device)
            return self._copiers[key]

    @contextmanager
    def buffers(
        self, sizes: Sequence[int], copiers: Sequence[Copier | None], *, extra: int = 0
    ) -> Iterator[list[torch.Tensor]]:
        """One buffer of bytes for each of *sizes* that has a copier, and an empty one for the others.

        Waits until the memory limit has room for them and for *extra* bytes.

        Raises:
            NoMemoryError: they could not be allocated.
        """
        lengths = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        pageable = sum(
            n for n, copier in zip(lengths, copiers, strict=True) if copier is not None and not copier.is_pinned
        )
        pinned = sum(n for n, copier in zip(lengths, copiers, strict=True) if copier is not None and copier.is_pinned)
        # Of few sizes, so that they are reused: what malloc gets back it may keep for each thread.
        pageable = 1 << (pageable - 1).bit_length() if 0 < pageable <= _REUSED else pageable
        with self._budget.wait_for(pageable + pinned + extra):
            area = self._area(pageable)
            buffers: list[torch.Tensor] = []
            at = 0
            for size, copier, length in zip(sizes, copiers, lengths, strict=True):
                if copier is None:
                    buffers.append(_NOTHING)
                elif copier.is_pinned:
                    buffers.append(copier.buffer(size))
                else:
                    buffers.append(torch.frombuffer(area, dtype=torch.uint8, count=size, offset=at))
                    at += length
            yield buffers
            buffers.clear()
            if 0 < pageable <= _REUSED:
                self._buffers.give_back(area)

    def _area(self, size: int) -> memoryview:
        """Memory for staging *size* bytes, which an absurd length in a blob may make too many."""
        try:
            return self._buffers.take(size) if size else memoryview(b"")
        except (MemoryError, OSError, OverflowError, ValueError) as error:
            raise NoMemoryError(size, type(error).__name__) from None


def place_of(piece: Piece, dtype: torch.dtype, target: torch.Tensor) -> torch.Tensor | None:
    """The part of *target* whose memory takes the bytes of *piece* as they are; None if they have to be staged."""
    if not piece.is_dense or target.dtype != dtype:
        return None
    place = select(target, piece.box)
    return place if is_in_place(place) else None


def elements_of(piece: Piece, dtype: torch.dtype, shape: Sequence[int], buffer: torch.Tensor) -> torch.Tensor:
    """The elements of *piece*, of a stored tensor of *shape*, as they lie in *buffer*, perhaps apart."""
    strides = contiguous_strides(shape) if not piece.is_dense else contiguous_strides(piece.box.lengths)
    return buffer.view(dtype).as_strided(piece.box.lengths, strides)
