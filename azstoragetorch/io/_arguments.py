"""Arguments of file methods, with the semantics of Python's files."""

from __future__ import annotations

from pickle import PickleBuffer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


_PLAIN = frozenset({bytes, bytearray})  # are bytes already; asking a memoryview costs more than a small write


class InvalidSeekError(OSError, ValueError):
    """A position before the start: the ValueError of `io.BytesIO` and the OSError of local files."""


def readable_bytes(data: ReadableBuffer) -> memoryview:
    """The bytes of *data* in the order of its elements; copied only if they are not in one piece."""
    if type(data) in _PLAIN:
        return memoryview(data)
    if isinstance(data, str):
        raise TypeError("a bytes-like object is required, not 'str': encode the text, or use io.TextIOWrapper")
    view = memoryview(data)
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    return PickleBuffer(view).raw() if view.c_contiguous else memoryview(view.tobytes())


def writable_bytes(target: WriteableBuffer) -> memoryview:
    """The bytes of *target*, to be written to."""
    view = memoryview(target)
    if type(target) is bytearray:
        return view
    if view.readonly:
        raise TypeError(f"a writable buffer is required, not a read-only {type(target).__name__}")
    if not view.c_contiguous:
        raise BufferError("a contiguous buffer is required")
    return view if view.format == "B" and view.ndim == 1 else PickleBuffer(view).raw()
