"""An unfinished download: a file next to its target that can be resumed and is renamed to the target when complete.

Many threads write to the file. None waits for a lock: a thread writes its bytes, appends their range to a queue, and
then does the bookkeeping, unless another thread is doing it. Ranges that are left in the queue are processed by the
next thread, or by `finish`, which runs when all others are done. The record is never ahead of the file: bytes are
synced to disk before they are recorded.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import on_error
from azstoragetorch._files.paths import (
    CopyError,
    WrongMD5Error,
    current_user_id,
    display,
    open_exclusive,
    open_own,
    partial_name,
    rename_into_place,
)
from azstoragetorch._files.record import Record, RecordedDownload

READ_SIZE = 8 * MiB  # bytes per read of a file
_SYNC_EVERY = 64 * MiB  # bytes; a killed download has to fetch at most about this many again


class Partial:
    """A download of *size* bytes to *path*, from the version of a blob that is identified by *identity*."""

    def __init__(self, path: Path, identity: str, size: int) -> None:
        self._path = path
        self._identity = identity
        self._size = size
        self._record: Record | None = None
        self._part: Path | None = None
        self._file: FileIO | None = None
        self._is_over = False  # it was renamed, or discarded
        self._is_kept = False  # bytes of the file are recorded, so it can be resumed
        self._unrecorded: deque[ByteRange] = deque()
        self._pending: list[ByteRange] = []  # out of the queue, not synced to disk yet
        self._recording = _TryLock()
        self._unhashed: deque[ByteRange] = deque()
        self._done: dict[int, int] = {}  # start -> stop of ranges after the first gap
        self._frontier = 0
        self._hashing = _TryLock()
        self._digest = hashlib.md5(usedforsecurity=False)
        self._hashed = 0
        self.present: list[ByteRange] = []
        """The ranges that an earlier attempt has downloaded, in order."""

    def __enter__(self) -> Partial:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with on_error(self._undo_start):
            self._record = Record.of(self._path)
            kept = self._record.read() if self._record is not None else None
            if kept is None or not self._resume(kept):
                self._start()
        self._unhashed.extend(self.present)
        return self

    def _undo_start(self) -> None:
        if not self._is_kept:
            self._discard()
        self._close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_over:
            with suppress(OSError):
                self._write_record(0)
            if not self._is_kept:
                self._discard()
        self._close()

    def write(self, span: ByteRange, data: memoryview) -> None:
        """Write *data*, the bytes of *span*."""
        self._write_at(data, span.start)
        self._unrecorded.append(span)
        self._unhashed.append(span)
        with self._recording.if_free() as is_mine:
            if is_mine:
                self._write_record(_SYNC_EVERY)
        with self._hashing.if_free() as is_mine:
            if is_mine:
                self._hash()

    def finish(self, md5: bytes | None, source: str) -> None:
        """Check *md5*, if given, and rename the file to *path*. No other thread may be writing.

        Raises:
            WrongMD5Error: the MD5 does not match; the file is deleted.
            CopyError: *path* is something that a file cannot replace; the file is deleted.
        """
        assert self._part is not None
        try:
            self._hash()
            if md5 is not None and self._digest.digest() != md5:
                raise WrongMD5Error(
                    f"{source}: the downloaded bytes do not match the MD5 stored with the blob; they were deleted"
                )
            if self._size >= _SYNC_EVERY:
                os.fsync(self._descriptor)
            if sys.platform == "win32":
                self._close_file()  # Windows cannot rename an open file
            rename_into_place(self._part, self._path)
        except Exception:
            self._is_over = True
            self._discard()
            raise
        self._is_over = True
        if self._record is not None:
            self._record.forget()  # last: a record without its file is ignored

    def _resume(self, kept: RecordedDownload) -> bool:
        """Continue with the file of *kept*, if it is the very file that was recorded; return whether it is."""
        part = self._path.parent / kept.part
        try:
            self._file = file = open_own(part)
        except OSError:
            return False
        found = os.fstat(file.fileno())
        is_own = stat.S_ISREG(found.st_mode) and found.st_uid == current_user_id() and found.st_nlink == 1
        if not is_own or found.st_ino != kept.inode or found.st_mode & stat.S_IWOTH:
            self._close_file()
            return False
        is_useful = kept.identity == self._identity and found.st_size == self._size and kept.spans
        if not is_useful or kept.spans[-1].stop > self._size:
            self._close_file()
            part.unlink(missing_ok=True)  # it belongs to another version of the blob
            return False
        self.present, self._part, self._is_kept = kept.spans, part, True
        return True

    def _start(self) -> None:
        self._part = part = self._path.parent / partial_name()
        self._file = file = open_exclusive(part)
        file.truncate(self._size)
        if self._record is not None:
            self._record.begin(self._identity, part, os.fstat(file.fileno()).st_ino)

    def _write_record(self, at_least: int) -> None:
        """Record what was written since the last time, if that is at least *at_least* bytes."""
        while self._unrecorded:
            self._pending.append(self._unrecorded.popleft())
        if self._record is None or not self._pending or sum(map(len, self._pending)) < at_least:
            return
        os.fsync(self._descriptor)
        if self._record.add(self._pending):
            self._is_kept = True
        self._pending.clear()

    def _hash(self) -> None:
        """Update the MD5 with the bytes before the first gap."""
        while self._unhashed:
            span = self._unhashed.popleft()
            self._done[span.start] = span.stop
        while self._frontier in self._done:
            self._frontier = self._done.pop(self._frontier)
        while self._hashed < self._frontier:
            data = self._read_at(min(READ_SIZE, self._frontier - self._hashed), self._hashed)
            if not data:
                raise CopyError(
                    f"the unfinished download of {display(self._path)} was truncated by another program: start it again"
                )
            self._digest.update(data)
            self._hashed += len(data)

    def _discard(self) -> None:
        """Delete the file and its record."""
        self._close_file()
        if self._part is None:
            return  # the file of an earlier attempt was not opened yet
        with suppress(OSError):
            self._part.unlink()
        if self._record is not None:
            self._record.forget()

    @property
    def _descriptor(self) -> int:
        assert self._file is not None
        return self._file.fileno()

    def _close(self) -> None:
        self._close_file()
        if self._record is not None:
            self._record.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    if sys.platform == "win32":  # pragma: no cover

        def _write_at(self, data: memoryview, offset: int) -> None:
            with self._part.open("r+b", buffering=0) as file:
                file.seek(offset)
                while data.nbytes:
                    data = data[file.write(data) :]

        def _read_at(self, size: int, offset: int) -> bytes:
            with self._part.open("rb", buffering=0) as file:
                file.seek(offset)
                return file.read(size)

    else:

        def _write_at(self, data: memoryview, offset: int) -> None:
            while data.nbytes:
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count

        def _read_at(self, size: int, offset: int) -> bytes:
            return os.pread(self._descriptor, size, offset)


class _TryLock:
    """A lock that is only tried: one thread does the work, and others leave it to that thread."""

    def __init__(self) -> None:
        self._tokens: deque[None] = deque([None])

    @contextmanager
    def if_free(self) -> Iterator[bool]:
        """Acquire the lock until the block ends, if no other thread has it; yield whether it was acquired."""
        try:
            token = self._tokens.popleft()
        except IndexError:
            yield False
            return
        try:
            yield True
        finally:
            self._tokens.append(token)
