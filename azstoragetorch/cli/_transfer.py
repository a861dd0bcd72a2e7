"""Copy one file or blob, whole or not at all: no reader ever sees a part of the target.

What was copied is known again by length and MD5. A download is written beside its target, together with a list of the
ranges that are there, and goes on with what is missing; it is for one version of the blob, and another starts anew.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.ranges import ByteRange, coalesce, gaps, split
from azstoragetorch._blob.sdk import SdkBlob
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.engine import Scope
from azstoragetorch.exceptions import AZStorageTorchError

PARTIAL = ".azstoragetorch-"  # what names of unfinished downloads begin with
_READ = 8 * MiB  # bytes read from a file at once
_SYNC_EVERY = 64 * MiB  # bytes that a killed download may have to fetch again

Advance = Callable[[int], None]


class CopyError(AZStorageTorchError):
    """A copy that was made is not what it should be; nothing of it was kept."""


@dataclass(frozen=True, slots=True)
class Found:
    """A blob as the service describes it."""

    version: BlobVersion
    md5: bytes | None


def look(blob: BlobClient, scope: Scope) -> Found:
    """Ask for length, ETag and MD5 of *blob*."""
    found = SdkBlob(blob.service, blob.url, scope).call("HEAD", lambda client: client.get_blob_properties())
    md5 = found.content_settings.content_md5
    return Found(BlobVersion(found.size, found.etag), bytes(md5) if md5 else None)


def md5_of(path: Path) -> bytes:
    """The MD5 of a file."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(_READ):
            digest.update(data)
    return digest.digest()


def download(blob: BlobClient, path: Path, scope: Scope, advance: Advance, *, is_forced: bool = False) -> str:
    """Copy *blob* to *path*; returns whether it was ``copied``, ``resumed`` or ``skipped``.

    Raises:
        CopyError: the bytes do not have the MD5 that the blob carries.
        BlobChangedError: the blob was overwritten meanwhile.
    """
    found = look(blob, scope)
    size = found.version.size
    if not is_forced and found.md5 is not None and _has_size(path, size) and md5_of(path) == found.md5:
        advance(size)
        return "skipped"
    config, engine = blob.config, blob.engine
    identity = hashlib.sha256(f"{blob.url} {found.version.etag} {size}".encode()).hexdigest()
    with _Partial(path, identity, size) as partial, _child(scope) as inner:
        missing = gaps(ByteRange(0, size), partial.present)
        advance(size - sum(map(len, missing)))

        def task(span: ByteRange) -> Callable[[Scope], None]:
            def run(scope: Scope) -> None:
                amount = config.effective_part_size
                engine.budget.acquire(amount)
                try:
                    buffer = engine.buffers.take(amount)
                    blob.fetch(span, [buffer[: len(span)]], etag=found.version.etag, scope=scope)
                    partial.write(span, buffer[: len(span)])
                    engine.buffers.give_back(buffer)
                finally:
                    engine.budget.release(amount)
                advance(len(span))

            return run

        parts = [part for span in missing for part in split(span, config.effective_part_size)]
        engine.run_all([task(part) for part in parts], config.max_concurrency, inner)
        partial.finish(found.md5, str(blob.url))
        return "resumed" if partial.present else "copied"


def upload(
    path: Path, blob: BlobClient, known_size: int | None, scope: Scope, advance: Advance, *, is_forced: bool = False
) -> str:
    """Copy the file *path* to *blob*; returns whether it was ``copied`` or ``skipped``.

    *known_size* is the length of the blob that is there, None if none is.

    Raises:
        CopyError: the file changed meanwhile.
    """
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        size = before.st_size
        if not is_forced and known_size == size and look(blob, scope).md5 == md5_of(path):
            advance(size)
            return "skipped"

        def read(at: int, view: memoryview) -> int:
            return file.readinto(view) if at < size else 0

        def check_unchanged() -> None:
            after = os.fstat(file.fileno())
            if (after.st_size, after.st_mtime_ns) != (size, before.st_mtime_ns):
                raise CopyError(f"{path} changed while it was being copied; nothing was committed")

        _send(blob, size, read, scope, advance, lambda _md5: check_unchanged())
    return "copied"


def copy(source: BlobClient, target: BlobClient, scope: Scope, advance: Advance, *, is_forced: bool = False) -> str:
    """Copy a blob to another by way of this machine; returns whether it was ``copied`` or ``skipped``.

    Raises:
        CopyError: the bytes do not have the MD5 that the source carries.
        BlobChangedError: the source was overwritten meanwhile.
    """
    found = look(source, scope)
    size = found.version.size
    there = target.version() if not is_forced and found.md5 is not None else None
    if there is not None and there.size == size and look(target, scope).md5 == found.md5:
        advance(size)
        return "skipped"
    reader = source.reader(found.version)

    def check(md5: bytes) -> None:
        if found.md5 is not None and md5 != found.md5:
            raise CopyError(f"{source.url}: the bytes do not have the MD5 that the blob carries; nothing was committed")

    try:
        _send(target, size, reader.readinto, scope, advance, check)
    finally:
        reader.close()
    return "copied"


def _send(
    blob: BlobClient,
    size: int,
    read: Callable[[int, memoryview], int],
    scope: Scope,
    advance: Advance,
    check: Callable[[bytes], None],
) -> None:
    """Write *size* bytes that *read* gives in order; *check* gets their MD5 and raises to give up."""
    config = blob.config
    digest = hashlib.md5(usedforsecurity=False)

    def pieces(length: int) -> Iterator[memoryview]:
        at = 0
        while at < size:
            view = memoryview(bytearray(min(length, size - at)))
            filled = 0
            while filled < view.nbytes:
                count = read(at + filled, view[filled:])
                if not count:
                    raise CopyError(f"{blob.url}: the source ended after {at + filled} of {size} bytes")
                filled += count
            digest.update(view)
            at += view.nbytes
            yield view

    writer = blob.writer()
    try:
        with scope.holding(writer.cancel):
            if size < config.block_size:
                # One request, and none to commit.
                blob.engine.budget.acquire(size)
                try:
                    for piece in pieces(max(size, 1)):
                        writer.write(piece)
                    check(digest.digest())
                    writer.commit()
                finally:
                    blob.engine.budget.release(size)
                advance(size)
            else:
                writer.write_pieces(
                    pieces(config.block_size),
                    block_size=config.block_size,
                    concurrency=_blocks_at_once(config),
                    staged=advance,
                )
                check(digest.digest())
                writer.commit(md5=digest.digest())
    except BaseException:
        writer.abort()
        raise


def _blocks_at_once(config: TransferConfig) -> int:
    return max(1, min(config.max_concurrency, config.memory_limit // (2 * config.block_size)))


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


@contextmanager
def _child(scope: Scope) -> Iterator[Scope]:
    """A scope that ends with *scope*, but whose own failures leave *scope* alone."""
    inner = Scope()
    with scope.holding(inner.cancel):
        yield inner


class _Partial:
    """A download on its way to *path*: a file beside it, and a list of the ranges that it has.

    A range is listed after its bytes are on the disk, so the list is never ahead of the bytes. One process at a time.
    """

    def __init__(self, path: Path, identity: str, size: int) -> None:
        self._path = path
        self._identity = identity
        self._size = size
        tag = hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self._data = path.parent / f"{PARTIAL}{tag}.part"
        self._list = path.parent / f"{PARTIAL}{tag}.ranges"
        self._lock = threading.Lock()
        self._unlisted: list[ByteRange] = []
        self._done: dict[int, int] = {}  # start -> stop, beyond the frontier
        self._frontier = 0
        self._hashing = threading.Lock()
        self._digest = hashlib.md5(usedforsecurity=False)
        self._hashed = 0
        self.present: list[ByteRange] = []
        """What an earlier attempt left, in order."""

    def __enter__(self) -> _Partial:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = open(self._data, "r+b", buffering=0, opener=_open_or_make)
            try:
                _lock_file(self._file.fileno())
                if _is_file_at(self._data, self._file.fileno()):  # not renamed by who had it before
                    break
            except BlockingIOError:
                self._file.close()
                raise CopyError(f"{self._path}: another process is downloading to it") from None
            self._file.close()
        self.present = self._read_list()
        if not self.present:
            self._list.unlink(missing_ok=True)
            self._file.truncate(0)
            self._file.truncate(self._size)
        for span in self.present:
            self._pass(span)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._note(0)
        self._file.close()

    def write(self, span: ByteRange, data: memoryview) -> None:
        """Put the bytes of *span* in their place."""
        _write_at(self._file.fileno(), data, span.start, self._lock)
        with self._lock:
            self._unlisted.append(span)
        self._pass(span)
        self._note(_SYNC_EVERY)
        self._hash(is_waiting=False)

    def finish(self, md5: bytes | None, source: str) -> None:
        """Make it the file *path*, if it has the *md5*.

        Raises:
            CopyError: it has not; it is dropped.
        """
        self._hash(is_waiting=True)
        if md5 is not None and self._digest.digest() != md5:
            self._unlisted.clear()
            self._list.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)
            raise CopyError(
                f"{source}: the bytes that came do not have the MD5 that the blob carries; nothing was kept"
            )
        if self._size >= _SYNC_EVERY:
            os.fsync(self._file.fileno())
        # The list goes first: without its file it would vouch for bytes that are not there.
        self._unlisted.clear()
        self._list.unlink(missing_ok=True)
        if sys.platform == "win32":
            self._file.close()  # elsewhere it stays locked until it has its name
        self._data.replace(self._path)

    def _pass(self, span: ByteRange) -> None:
        with self._lock:
            self._done[span.start] = span.stop
            while self._frontier in self._done:
                self._frontier = self._done.pop(self._frontier)

    def _hash(self, *, is_waiting: bool) -> None:
        """Take in what lies before the first gap, unless another thread is at it."""
        if not self._hashing.acquire(blocking=is_waiting):
            return
        try:
            with self._data.open("rb", buffering=0) as file:
                file.seek(self._hashed)
                while self._hashed < self._frontier:
                    data = file.read(min(_READ, self._frontier - self._hashed))
                    self._digest.update(data)
                    self._hashed += len(data)
        finally:
            self._hashing.release()

    def _note(self, at_least: int) -> None:
        """List what was written since the last time, if that is *at_least* so many bytes."""
        with self._lock:
            if not self._unlisted or sum(map(len, self._unlisted)) < at_least:
                return
            spans, self._unlisted = self._unlisted, []
        os.fsync(self._file.fileno())
        with self._lock:
            is_new = not self._list.exists()
            with self._list.open("a", encoding="ascii") as file:
                lines = [self._identity] if is_new else []
                file.write("".join(f"{line}\n" for line in [*lines, *(f"{s.start} {s.stop}" for s in spans)]))

    def _read_list(self) -> list[ByteRange]:
        """What the list vouches for, if it is of this version and the file is the one that it was made with."""
        try:
            head, *lines = self._list.read_text(encoding="ascii").split("\n")
        except (OSError, UnicodeDecodeError):
            return []
        if head != self._identity or os.fstat(self._file.fileno()).st_size != self._size:
            return []
        spans = []
        for line in lines[:-1]:  # the last one may have been cut off
            start, _, stop = line.partition(" ")
            if not (start.isdigit() and stop.isdigit() and int(start) < int(stop) <= self._size):
                return []
            spans.append(ByteRange(int(start), int(stop)))
        return coalesce(sorted(spans), max_gap=0, limit=self._size)


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":  # pragma: no cover

    def _lock_file(descriptor: int) -> None:
        """An open file cannot be renamed over here, which is protection enough."""

    def _write_at(descriptor: int, data: memoryview, offset: int, lock: threading.Lock) -> None:
        with lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            while data.nbytes:
                data = data[os.write(descriptor, data) :]

else:
    import fcntl

    def _lock_file(descriptor: int) -> None:
        """Keep others out.

        Raises:
            BlockingIOError: another has it.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks

    def _write_at(descriptor: int, data: memoryview, offset: int, lock: threading.Lock) -> None:  # noqa: ARG001
        while data.nbytes:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count
