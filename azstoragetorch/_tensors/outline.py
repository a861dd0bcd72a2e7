"""What `torch.save` writes around the elements of tensors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch.serialization import skip_data


def outline_of(make: Callable[[], object]) -> tuple[list[bytes | None], list[int]]:
    """The parts of the file that `torch.save` writes for what *make* returns, and the bytes of each gap between them.

    A part is None where the elements of the next tensor belong. The tensors in it need no elements: memory that
    `torch.empty` has reserved is never touched.
    """
    sink: Any = _Outline()
    with skip_data():
        torch.save(make(), sink)
    return sink.parts, sink.gaps


class _Outline(io.RawIOBase):
    """Takes what `torch.save` writes with `skip_data`: it seeks over the elements of each tensor."""

    def __init__(self) -> None:
        self.parts: list[bytes | None] = []  # None: the elements of the next tensor
        self.gaps: list[int] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        part = bytes(data)
        self.parts.append(part)
        self._position += len(part)
        return len(part)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_CUR or offset < 0:
            raise io.UnsupportedOperation("torch.save no longer writes a file from its beginning to its end")
        if offset:
            self.parts.append(None)
            self.gaps.append(offset)
        self._position += offset
        return self._position
