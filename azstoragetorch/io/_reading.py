"""The reading half of `BlobIO`: a position, and a small buffer for lines and small reads.

A read changes the position last: the position is one attribute, which is assigned once, when the bytes are available.
So an error or an interrupt during a read leaves the position where it was, or after the bytes of a complete read. The
buffer holds bytes of the only version that is read, so it is valid at any position.
"""

from __future__ import annotations

import errno
import io
import sys
from typing import TYPE_CHECKING

from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch.io._arguments import InvalidSeekError, writable_bytes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from azstoragetorch._blob.client import ReadAhead

_BUFFER_SIZE = 64 * KiB  # what lines and small reads are served from
_LARGE_READ = 1 * MiB  # from here on a read is made in one piece, on huge pages, and never joined


class Reader:
    """The position in one blob. One call at a time."""

    __slots__ = ("_buffer", "blob", "position")

    def __init__(self, blob: ReadAhead) -> None:
        self.blob = blob
        self.position = 0
        self._buffer: tuple[bytes, int] = (b"", 0)  # bytes, and where they begin

    def tell(self) -> int:
        """The position."""
        return self.position

    def read(self, size: int) -> bytes:
        """Up to *size* bytes, short at the end only; everything if *size* is negative."""
        start = self.position
        buffer, buffer_start = self._buffer
        low = start - buffer_start
        if low < 0 or not 0 <= size <= len(buffer) - low:
            return self._read_on(start, size)
        self.position = start + size
        return buffer[low : low + size]

    def _read_on(self, start: int, size: int) -> bytes:
        if size < 0 or size >= _LARGE_READ:
            data = self.blob.read(start, None if size < 0 else size)
        else:
            data = self._buffered(start, size)
            missing = size - len(data)
            if missing >= _BUFFER_SIZE:  # whole buffers; what is beyond them comes with what will be read next
                data += self.blob.read(start + len(data), missing - missing % _BUFFER_SIZE)
                missing = size - len(data)
            if missing:
                data += self._fill(start + len(data))[:missing]
        self.position = start + len(data)
        return data

    def read1(self, size: int) -> bytes:
        """Up to *size* bytes that are in the buffer, or come with one read ahead."""
        start = self.position
        size = size if size >= 0 else _BUFFER_SIZE
        data = self._buffered(start, size)
        if size and not data:
            data = self.blob.read(start, size) if size > _BUFFER_SIZE else self._fill(start)[:size]
        self.position = start + len(data)
        return data

    def readinto(self, target: WriteableBuffer, *, once: bool = False) -> int:
        """Fill *target*, with what is there if *once*; the number of bytes."""
        view = writable_bytes(target)
        start, size = self.position, view.nbytes
        buffer, buffer_start = self._buffer
        low = start - buffer_start
        if low >= 0 and size <= len(buffer) - low:
            view[:] = buffer[low : low + size]
            count = size
        else:
            count = self._read_into(start, view, once)
        self.position = start + count
        return count

    def _read_into(self, start: int, view: memoryview, once: bool) -> int:
        data = self._buffered(start, view.nbytes)
        count = len(data)
        view[:count] = data
        missing = 0 if once and count else view.nbytes - count
        if missing >= _BUFFER_SIZE:
            return count + self.blob.readinto(start + count, view[count:])
        if missing:
            data = self._fill(start + count)[:missing]
            view[count : count + len(data)] = data
        return count + len(data) if missing else count

    def peek(self) -> bytes:
        """What is in the buffer from the position on, filled if that is nothing."""
        return self._buffered(self.position, _BUFFER_SIZE) or self._fill(self.position)

    def readline(self, limit: int) -> bytes:
        """Up to and including the next newline, and at most *limit* bytes unless that is negative."""
        at = self.position
        buffer, buffer_start = self._buffer
        low = at - buffer_start
        if low >= 0 and limit < 0 and (high := buffer.find(b"\n", low) + 1):
            self.position = high + buffer_start
            return buffer[low:high]
        pieces: list[bytes] = []
        while limit:
            buffer, buffer_start = self._buffer
            low = at - buffer_start
            if not 0 <= low < len(buffer):
                buffer, low = self._fill(at), 0
            high = buffer.find(b"\n", low) + 1 or len(buffer)
            if 0 <= limit < high - low:
                high = low + limit
            piece = buffer[low:high]
            pieces.append(piece)
            at += len(piece)
            limit -= len(piece) if limit > 0 else 0
            if not piece or piece.endswith(b"\n"):
                break
        self.position = at
        return b"".join(pieces)

    def seek(self, offset: int, whence: int) -> int:
        """Move, and return the new position."""
        if whence == io.SEEK_CUR:
            offset += self.position
        elif whence == io.SEEK_END:
            offset += self.blob.size()
        elif whence != io.SEEK_SET:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        if offset < 0:
            raise InvalidSeekError(errno.EINVAL, f"cannot seek to the negative position {offset}")
        if offset > sys.maxsize:
            raise OverflowError(f"cannot seek to {offset}: it does not fit into {sys.maxsize.bit_length() + 1} bits")
        self.position = offset
        return offset

    def close(self) -> None:
        """Give up what is in flight and free the memory."""
        self._buffer = (b"", 0)
        self.blob.close()

    def abandon(self) -> None:
        """`close` for finalizers: never waits."""
        self._buffer = (b"", 0)
        self.blob.abandon()

    def _buffered(self, start: int, size: int) -> bytes:
        buffer, buffer_start = self._buffer
        low = start - buffer_start
        return buffer[low : low + size] if low >= 0 else b""

    def _fill(self, start: int) -> bytes:
        data = self.blob.read(start, _BUFFER_SIZE)
        self._buffer = data, start
        return data
