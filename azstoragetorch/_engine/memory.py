"""Memory that is cheap to fill: bytes that are not zeroed first, and reusable buffers on huge pages.

A fast download spends most of its CPU time on page faults. Memory in 4 KiB pages faults 512 times as often as memory in
2 MiB pages, so this module requests huge pages if the kernel offers them.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import Any

_HUGE_PAGE = 2 << 20
_LARGE_COPY = 256 << 10  # takes long enough that other threads should run meanwhile
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23  # linux/mman.h
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None

# The C API documents that a NULL source leaves the contents uninitialised, to be filled before the object is shared.
_new_bytes: Any = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
_address_of_bytes: Any = ctypes.pythonapi.PyBytes_AsString
_address_of_bytes.restype = ctypes.c_void_p
_address_of_bytes.argtypes = [ctypes.py_object]


def expect_filling(target: memoryview) -> None:
    """Prepare the kernel for all of *target* being written: a tensor that was just made has no pages yet."""
    if _LIBC is not None and target.nbytes >= 2 * _HUGE_PAGE:
        _advise_huge_pages(ctypes.addressof(ctypes.c_char.from_buffer(target)), target.nbytes)


def _advise_huge_pages(address: int, length: int) -> None:
    """Ask the kernel to back this memory with huge pages; without effect where it cannot."""
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    stop = (address + length) // _HUGE_PAGE * _HUGE_PAGE
    if _LIBC is not None and stop > start:
        _advise(start, stop, _MADV_HUGEPAGE)


def _advise(start: int, stop: int, advice: int) -> None:
    _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(advice))


def filled_bytes(length: int, fill: Callable[[memoryview], object]) -> bytes:
    """New bytes of *length* that *fill*, given a view of them, writes; they are never copied.

    *fill* writes every byte or raises, and keeps no view.
    """
    if length < 2:  # CPython shares these; they must not be written to
        small = bytearray(length)
        fill(memoryview(small))
        return bytes(small)
    data, view = bytes_to_fill(length)
    fill(view)
    return data


def bytes_to_fill(length: int) -> tuple[bytes, memoryview]:
    """New bytes of *length*, two or more, and a view of them.

    Every byte is written through the view before anybody else sees them, and the view is not used after.
    """
    data: bytes = _new_bytes(None, length)
    address = _address_of_bytes(data)
    _advise_huge_pages(address, length)
    return data, memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def new_buffer(length: int) -> memoryview:
    """A zeroed, private buffer of *length* bytes; large ones lie on huge pages."""
    if length < _HUGE_PAGE or not hasattr(mmap, "MAP_PRIVATE"):
        return memoryview(bytearray(length))
    area = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes between views of equal length.

    A large copy lets other threads run meanwhile and takes the page faults of fresh memory all at once.
    """
    if target.nbytes < _LARGE_COPY or source.readonly:  # no public way gives the address of a read-only view
        target[:] = source
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(target))
    if _LIBC is not None:
        page = mmap.PAGESIZE
        _advise(address // page * page, -(-(address + target.nbytes) // page) * page, _MADV_POPULATE_WRITE)
    ctypes.memmove(address, ctypes.addressof(ctypes.c_char.from_buffer(source)), target.nbytes)
