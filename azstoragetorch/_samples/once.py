"""Work that one of several forked processes does for all of them.

DataLoader forks its workers without a hook that lets the parent prepare something. So the workers share an unnamed
file: the first one to lock it does the work, and the others read the result.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # a system that cannot fork either
    fcntl = None  # type: ignore[assignment]

_HEADER = 8  # bytes before the data: its length, 0 as long as it is not complete


class OnceAmongForks:
    """Bytes made once by this process or one of its children. Pickles as a new one."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        # Opened here because only what exists before fork is shared by it. It vanishes with its last process.
        self._file = _nameless_file() if hasattr(os, "fork") else None
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def get(self, make: Callable[[], bytes]) -> bytes:
        """The bytes, made by *make* unless a relative has made them; while one is at it, the others wait.

        What *make* raises is raised, and the next to ask tries again. Threads of one process do not wait for each
        other, nor does a signal handler, but they all get the bytes that were made first.
        """
        if self._file is None:
            return make()
        with self._locked():
            descriptor = self._file.fileno()
            made = _read(descriptor)
            if made is not None:
                return made
            data = make()
            fcntl.lockf(self._file, fcntl.LOCK_EX)  # another call of this process may have ended the lock
            made = _read(descriptor)
            if made is not None:
                return made
            # Children that the parent is yet to have inherit what it made.
            if os.getpid() != self._pid or multiprocessing.active_children():
                with suppress(OSError):  # no space: a process that does not find the result computes it again
                    _write(descriptor, data)
            return data

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A record lock belongs to a process and goes with it: a worker that was killed stops nobody.
        assert self._file is not None
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def __reduce__(self) -> tuple[type[OnceAmongForks], tuple[()]]:
        return OnceAmongForks, ()


def _nameless_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("azstoragetorch"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _read(descriptor: int) -> bytes | None:
    """What was made, or None if nothing was."""
    length = int.from_bytes(os.pread(descriptor, _HEADER, 0), "little")
    data = bytearray()
    while len(data) < length:
        piece = os.pread(descriptor, length - len(data), _HEADER + len(data))
        if not piece:
            raise OSError("what a sibling process made was cut short")
        data += piece
    return bytes(data) if length else None


def _write(descriptor: int, data: bytes) -> None:
    view, at = memoryview(data), 0
    while at < len(data):
        at += os.pwrite(descriptor, view[at:], _HEADER + at)
    # Last, so that what a killed process left unfinished does not count.
    os.pwrite(descriptor, len(data).to_bytes(_HEADER, "little"), 0)
