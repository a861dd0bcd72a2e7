"""A cache of blobs on a local disk, by URL and ETag, for jobs that read the same blobs repeatedly.

Any number of processes can use one folder at the same time: a file appears complete, by renaming, and never changes
afterwards, and a file lock protects the total of bytes. Within a process, only one call waits for that lock. Other
calls pass their bytes to it, because they may be signal handlers that interrupted it. The least recently used blobs
are evicted. If the disk is full or read-only, blobs are read from the service, with one warning.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from azstoragetorch._blob.client import BlobClient, BlobVersion, Head
from azstoragetorch._blob.readahead import ReadAhead
from azstoragetorch._blob.service import Service
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.memory import filled_bytes
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.scope import Scope

try:
    import fcntl
except ImportError:  # without locks the count of bytes is less exact between two sweeps
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".blob"
_FOOTER = 4  # bytes after the data: its CRC-32, against files that a crash of the machine left behind
_READ_WHOLE = 1 * MiB  # larger files may be read in pieces, which no checksum covers: they are made durable first
_ABANDONED = 3600.0  # seconds after which an unfinished file has lost its writer
_LOW = 0.9  # of the limit is what a sweep leaves, so that the next one is not due at once


class BlobCache:
    """A folder of cached blobs, of at most *limit* bytes.

    Raises:
        ValueError: the folder belongs to, or can be written by, somebody else, who could plant data in it.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder = Path(folder).absolute()
        self.limit = limit
        self._is_broken = False
        self._uncounted: PerProcess[deque[int]] = PerProcess(deque)  # sizes of files that the count is to have
        self._counting: PerProcess[dict[None, object]] = PerProcess(dict)  # the call that counts them
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.stat()
        except FileExistsError:
            raise ValueError(f"cache_dir {str(self.folder)!r} is not a folder") from None
        except OSError as error:
            self._give_up(error)
            return
        if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022):
            raise ValueError(
                f"cache_dir {str(self.folder)!r} can be written by others, who could plant data in it: "
                "use a folder that only you can write to (mode 0700)"
            )

    def open(self, url: BlobURL, etag: str) -> int | None:
        """A file descriptor of the cached blob, at its beginning, or None. The caller closes it."""
        try:
            descriptor = os.open(self._path(url, etag), os.O_RDONLY)
        except OSError:
            return None
        with suppress(OSError):
            os.utime(descriptor if os.utime in os.supports_fd else self._path(url, etag))
        return descriptor

    def load(self, url: BlobURL, etag: str) -> bytes | None:
        """The whole cached blob, or None."""
        descriptor = self.open(url, etag)
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            data = file.readall()
        body, footer = data[:-_FOOTER], data[-_FOOTER:]
        if len(data) < _FOOTER or zlib.crc32(body).to_bytes(_FOOTER, "little") != footer:
            self.drop(url, etag)
            return None
        return body

    def store(self, url: BlobURL, etag: str, data: bytes) -> None:
        """Keep *data*. Whatever the disk says, this does not fail."""
        size = len(data) + _FOOTER
        if self._is_broken or size > self.limit:
            return
        path = self._path(url, etag)
        try:
            if path.exists():
                return
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            try:
                with os.fdopen(descriptor, "wb", buffering=0) as file:
                    for piece in (data, zlib.crc32(data).to_bytes(_FOOTER, "little")):
                        view = memoryview(piece)
                        while view:
                            view = view[file.write(view) :]
                    if len(data) > _READ_WHOLE:
                        os.fsync(file)
                if not path.exists():
                    self._uncounted.get().append(size)
                    self._count()
                Path(name).replace(path)
            except BaseException:
                with suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as error:
            self._give_up(error)

    def drop(self, url: BlobURL, etag: str) -> None:
        """Remove a damaged file."""
        with suppress(OSError):
            self._path(url, etag).unlink()

    def _path(self, url: BlobURL, etag: str) -> Path:
        key = f"{url}\n{url.snapshot or ''}\n{url.versionid or ''}\n{etag}"
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / (name[2:] + _SUFFIX)

    def _count(self) -> None:
        """Count what is new, after room was made for it, unless a call of this process is at it: that looks again."""
        uncounted, counting, me = self._uncounted.get(), self._counting.get(), object()
        try:
            while uncounted and counting.setdefault(None, me) is me:
                with self._locked_usage() as usage, suppress(IndexError):
                    while True:
                        usage.add(uncounted.popleft())
                _leave(counting, me)
        except BaseException:
            _leave(counting, me)
            raise

    @contextmanager
    def _locked_usage(self) -> Iterator[_Usage]:
        with os.fdopen(os.open(self.folder / "usage", os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # gone with the file object, or with the process
            text = file.read(32) or b""
            usage = _Usage(self, int(text) if text.strip().isdigit() else None)
            yield usage
            file.seek(0)
            file.write(b"%-24d" % usage.total)

    def sweep(self, room: int) -> int:
        """Remove the least recently used until *room* bytes fit in; the bytes that are left. Under the lock."""
        files = []
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            with suppress(OSError):  # gone meanwhile
                found = path.stat()
                files.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in files)
        if total + room > self.limit:
            for _, size, path in sorted(files):
                if total + room <= self.limit * _LOW or total == 0:
                    break
                with suppress(FileNotFoundError):
                    path.unlink()
                total -= size
        for path in self.folder.glob("??/*.part"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - _ABANDONED:
                    path.unlink()
        return total

    def _give_up(self, error: OSError) -> None:
        if not self._is_broken:
            self._is_broken = True
            warnings.warn(
                f"cache_dir {str(self.folder)!r} cannot be written ({error.strerror or error}): "
                "blobs that are not in it yet are read from the service each time",
                RuntimeWarning,
                stacklevel=2,
            )


def _leave(counting: dict[None, object], me: object) -> None:
    if counting.get(None) is me:
        del counting[None]


class _Usage:
    """Bytes in the cache, as all processes count them."""

    def __init__(self, cache: BlobCache, total: int | None) -> None:
        self._cache = cache
        self.total = cache.sweep(0) if total is None else total

    def add(self, size: int) -> None:
        """Count *size* bytes, after room was made for them."""
        if self.total + size > self._cache.limit:
            self.total = self._cache.sweep(size)
        self.total += size


class CachedBlobClient(BlobClient):
    """A blob that is looked for in a cache first, by the version that a listing told, if one did."""

    def __init__(self, client: BlobClient, cache: BlobCache, listed: BlobVersion | None) -> None:
        self.__dict__.update(client.__dict__)
        self._cache = cache
        self._listed = listed

    def head(self, scope: Scope | None = None) -> Head:
        """The first part, from the cache if it has the listed version; a blob that is whole in it is kept."""
        if self._listed is None:
            self._listed = self.version()  # without a listing it takes a request to know the present version
        if self._listed is not None:
            cached = self._load_head(self._listed)
            if cached is not None:
                return cached
        fetched = super().head(scope)
        if len(fetched.data) == fetched.version.size:
            self._cache.store(self.url, fetched.version.etag, fetched.data)
        return fetched

    def start_head(self, scope: Scope, done: Callable[[Head], None], failed: Callable[[], None]) -> None:  # noqa: ARG002
        """None: the cache is looked at first, which `head` does."""
        return

    def reader(self, version: BlobVersion | None = None, head: bytes = b"") -> ReadAhead:
        """Random access; a blob that is read whole at once is kept."""
        return _CachingReader(self.service, self.url, self._cache, version, head)

    def _load_head(self, version: BlobVersion) -> Head | None:
        part = self.config.effective_part_size
        if version.size <= part:
            data = self._cache.load(self.url, version.etag)
            return None if data is None else Head(version, data)
        descriptor = self._cache.open(self.url, version.etag)
        if descriptor is None:
            return None
        try:
            if os.fstat(descriptor).st_size == version.size + _FOOTER:
                return Head(version, os.pread(descriptor, part, 0))  # its reader asks the cache for the rest
        finally:
            os.close(descriptor)
        self._cache.drop(self.url, version.etag)
        return None


class _CachingReader(ReadAhead):
    """Reads the cache's file if there is one, else the service; keeps what one call reads from end to end."""

    def __init__(
        self, service: Service, url: BlobURL, cache: BlobCache, version: BlobVersion | None, head: bytes
    ) -> None:
        super().__init__(service, url, version, head)
        self._cache = cache
        self._key = url
        self._has_whole_head = version is not None and len(head) == version.size

    def read(self, start: int, size: int | None = None) -> bytes:
        if self._has_whole_head or (self.version is None and size is not None):
            return super().read(start, size)
        if self.version is not None and size is not None:
            length = min(size, max(0, self.version.size - start))
            return filled_bytes(length, lambda view: self.readinto(start, view))
        if self.version is not None:
            cached = self._cache.load(self._key, self.version.etag)
            if cached is not None:
                return cached[start:] if start else cached
        data = super().read(start)
        if start == 0 and self.version is not None:
            self._cache.store(self._key, self.version.etag, data)
        return data

    def readinto(self, start: int, target: memoryview) -> int:
        if self.version is None or self._has_whole_head:
            return super().readinto(start, target)
        descriptor = self._cache.open(self._key, self.version.etag)
        if descriptor is None:
            return super().readinto(start, target)
        length = min(target.nbytes, max(0, self.version.size - start))
        done = 0
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            file.seek(start)
            while done < length:
                received = file.readinto(target[done:length])
                if not received:
                    break
                done += received
        return done if done == length else super().readinto(start, target)
