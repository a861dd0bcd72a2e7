"""`BlobIO`: one blob as a Python file. File semantics only; transfers are the core's."""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import KiB, MiB, TransferConfig

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from azstoragetorch._blob.download import BlobVersion
    from azstoragetorch._blob.readahead import ReadAhead

__all__ = ["BlobIO"]

T = TypeVar("T")

_BUFFER_SIZE = 64 * KiB  # what line iteration and small reads are served from without a call into Python
_LARGE_READ = 1 * MiB  # from here on `read` makes its own bytes, on huge pages


class BlobIO(io.BufferedIOBase):
    """A blob as a binary file, for `torch.load`, `torch.save` and whatever else takes a file object.

    Reading sees one version of the blob: the one that the first read finds. Opening and seeking make no request
    (except ``seek`` relative to the end, which needs the size). Reading on makes the reads ahead grow, bounded by
    ``transfer.memory_limit``.

    Writing is all or nothing: the blob changes when `close` succeeds, and only then. Leaving the ``with`` block by an
    exception, `abort`, closing while an exception is on its way, a failed block, or dropping the object commits
    nothing, and a blob that was there stays as it was.

    An object may be shared between threads: its calls take turns.

    Args:
        blob_url: URL of the blob, in any of the forms that :doc:`the guide </guide/urls>` lists. A SAS, a
            ``snapshot`` or a ``versionid`` in its query is respected.
        mode: ``"rb"`` to read, ``"wb"`` to write or overwrite, ``"xb"`` to write a blob that must not exist yet.
        credential: ``None`` for :class:`azure.identity.DefaultAzureCredential`, ``False`` for anonymous access, or a
            ``TokenCredential``, ``AzureSasCredential`` or ``AzureNamedKeyCredential``. A SAS in the URL wins.
        transfer: How to transfer; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: the URL or the mode is not one; a snapshot or version was opened for writing; a token would go over
            plain http.
        TypeError: an argument has a wrong type.

    The service's refusals are raised by the first call that needs the service, as ``azure.core.exceptions`` types when
    reading and as :class:`~azstoragetorch.exceptions.FatalBlobIOWriteError`, with such a cause, when writing. ``"xb"``
    raises ``ResourceExistsError`` if there is a blob.
    """

    _is_ready = False  # until all is set up there is nothing to close

    def __init__(
        self,
        blob_url: str,
        mode: Literal["rb", "wb", "xb"],
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        url = parse_blob_url(blob_url)
        if mode not in ("rb", "wb", "xb"):
            raise ValueError(f"mode must be 'rb', 'wb' or 'xb', not {mode!r}")
        if mode != "rb" and url.is_read_only:
            raise ValueError(f"mode {mode!r}: {url} with a snapshot or versionid can only be read")
        if transfer is not None and not isinstance(transfer, TransferConfig):
            raise TypeError(f"transfer must be a TransferConfig, not {type(transfer).__name__}")
        client = BlobClient(url, CredentialHolder(credential, url.sas, named=url), transfer or TransferConfig())
        self._set_up(client, mode)

    @classmethod
    def _of(cls, client: BlobClient, version: BlobVersion | None = None, head: bytes = b"") -> BlobIO:
        """A reader over *client*, of *version* if that is known, with its first bytes as far as they are here."""
        self = cls.__new__(cls)
        self._set_up(client, "rb", version, head)
        return self

    def _set_up(self, client: BlobClient, mode: str, version: BlobVersion | None = None, head: bytes = b"") -> None:
        self._client = client
        self._mode = mode
        self._lock = threading.RLock()
        self._generation = _generation
        self._before = 0  # the position when the call began that is under way, or was last
        self._opened_during = sys.exc_info()[1]
        self._is_closed = False
        self._blob: ReadAhead | None = None
        self._reader: io.BufferedReader | None = None
        if mode == "rb":
            self._blob = client.reader(version, head)
            self._reader = io.BufferedReader(_RawBlob(self._blob), _BUFFER_SIZE)
        else:
            self._writer = client.writer(create_only=mode == "xb")
        self._is_ready = True

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The URL of the blob, without its query."""
        return str(self._client.url)

    @property
    def mode(self) -> str:
        """The mode that the blob was opened with."""
        return self._mode

    @property
    def size(self) -> int:
        """Bytes of the blob when reading, which asks the service unless known; bytes written so far when writing."""
        with self._turn():
            if self._blob is None:
                return self._writer.written
            self._check_open()
            return self._blob.size()

    @property
    def etag(self) -> str | None:
        """The version of the blob that is read, or None as long as no read has seen one."""
        version = self._blob.version if self._blob is not None else None
        return version.etag or None if version is not None else None

    @property
    def closed(self) -> bool:
        """Whether `close` or `abort` was called."""
        return not self._is_ready or self._is_closed

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        self._check_open()
        return self._mode == "rb"

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        self._check_open()
        return self._mode != "rb"

    def seekable(self) -> bool:
        """Readers can seek; writers know their position but cannot change it."""
        return self.readable()

    def __repr__(self) -> str:
        if not self._is_ready:
            return f"<{type(self).__name__} not opened>"
        return f"<{type(self).__name__} {self.name!r} mode={self._mode!r}{' closed' if self._is_closed else ''}>"

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to *size* bytes, or to the end if *size* is negative or None.

        Returns fewer than *size* bytes only at the end of the blob.

        Raises:
            BlobChangedError: the blob was overwritten since the first read.
            AzureError: the service refused, or could not be reached.
        """
        if size is not None and 0 <= size < _LARGE_READ:
            return self._steadily(lambda reader, _: reader.read(size))

        def read(reader: io.BufferedReader, blob: ReadAhead) -> bytes:
            start = reader.tell()
            data = blob.read(start, None if size is None or size < 0 else size)
            reader.seek(start + len(data))
            return data

        return self._steadily(read)

    def read1(self, size: int = -1, /) -> bytes:
        """Read up to *size* bytes that are at hand or come with one read ahead."""
        return self._steadily(lambda reader, _: reader.read1(size))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill *buffer*, a large one straight from the network; returns the number of bytes, short at the end only."""
        return self._steadily(lambda reader, _: reader.readinto(buffer))

    def readinto1(self, buffer: WriteableBuffer, /) -> int:
        """Like `readinto`, with at most one read ahead."""
        return self._steadily(lambda reader, _: reader.readinto1(buffer))

    def peek(self, size: int = 0, /) -> bytes:
        """Bytes from the position on without moving it, at least one unless the blob ends here."""
        return self._steadily(lambda reader, _: reader.peek(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read up to and including the next newline, and at most *size* bytes."""
        return self._steadily(lambda reader, _: reader.readline(-1 if size is None else size))

    def _steadily(self, read: Callable[[io.BufferedReader, ReadAhead], T]) -> T:
        """What *read* returns; if it fails the position is what it was, so that another try skips nothing."""
        with self._turn():
            reader, blob = self._readable()
            self._before = start = reader.tell()
            try:
                return read(reader, blob)
            except BaseException:
                reader.seek(start)
                raise

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to *offset* relative to the start (0), the position (1) or the end (2); returns the new position.

        Costs nothing, except relative to the end, which needs the size of the blob.

        Raises:
            ValueError: the position would be negative, or *whence* is not 0, 1 or 2.
        """
        with self._turn():
            reader, _ = self._readable("seek")
            self._before = reader.tell()
            return reader.seek(offset, whence)

    def tell(self) -> int:
        """The position in bytes."""
        with self._turn():
            self._check_open()
            return self._writer.written if self._reader is None else self._reader.tell()

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(self, data: ReadableBuffer, /) -> int:
        """Write *data*, any object with the buffer protocol; returns its number of bytes.

        Large data is uploaded from its own memory before the return; small pieces are collected and uploaded in the
        background.

        Raises:
            FatalBlobIOWriteError: this or an earlier upload failed; nothing will be committed.
            TypeError: *data* has no buffer, such as text.
        """
        with self._turn():
            self._check_writable()
            if isinstance(data, str):
                raise TypeError("a bytes-like object is required, not 'str': encode the text, or use io.TextIOWrapper")
            view = memoryview(data)
            try:
                flat = view.cast("B")
            except TypeError:
                flat = memoryview(view.tobytes())  # not contiguous
            self._writer.write(flat)
            return flat.nbytes

    def writelines(self, lines: Iterable[ReadableBuffer], /) -> None:
        """Write each of *lines*; no newlines are added."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """When writing, wait for the uploads that are on their way; what is not a block yet stays collected.

        Raises:
            FatalBlobIOWriteError: an upload failed; nothing will be committed.
        """
        with self._turn():
            self._check_open()
            if self._reader is None:
                self._writer.flush()

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close. When writing, upload the rest and commit: after a return the blob has the new content.

        Closing while an exception that came up after the opening is on its way, as ``finally`` does, or
        `io.TextIOWrapper` when its ``with`` block fails, commits nothing and warns. To commit in a handler use the
        blob's own ``with`` block, which knows how it ended.

        Raises:
            FatalBlobIOWriteError: it could not be committed; the blob is unchanged.
            ResourceExistsError: mode ``"xb"``, and there is a blob.
        """
        with self._turn():
            if self.closed:
                return
            error = sys.exc_info()[1]
            if self._mode != "rb" and error is not None and error is not self._opened_during:
                self.abort()
                warnings.warn(
                    f"{self!r} was closed while a {type(error).__name__} is being handled: nothing was committed",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self._finish()

    def _finish(self) -> None:
        self._is_closed = True
        if self._blob is not None:
            self._blob.close()
            return
        try:
            self._writer.commit()
        except BaseException:
            self._writer.abort()
            raise

    def abort(self) -> None:
        """Close without committing: the blob stays as it was before it was opened. Does nothing when closed."""
        with self._turn():
            if self.closed:
                return
            self._is_closed = True
            if self._blob is not None:
                self._blob.close()
            else:
                self._writer.abort()

    def __enter__(self) -> BlobIO:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort()
            return
        with self._turn():
            if not self.closed:
                self._finish()

    def __del__(self) -> None:
        if self.closed:
            return
        if self._blob is not None:
            self._blob.abandon()
            return
        if self._generation != _generation:
            return  # forked: it is the parent's to finish
        self._writer.cancel()
        warnings.warn(
            f"{self!r} was dropped without close(): nothing was committed", ResourceWarning, stacklevel=2, source=self
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A reader pickles as its blob, version and position; a writer cannot be pickled."""
        if self._blob is None or self._reader is None:
            raise TypeError(f"cannot pickle {self!r}: only readers can be pickled")
        with self._turn():
            self._check_open()
            return _reopen, (self._client, self._blob.version, self._reader.tell())

    def _turn(self) -> AbstractContextManager[object]:
        """The lock by which calls take turns."""
        if self._generation != _generation:
            self._settle()
        return self._lock

    def _settle(self) -> None:
        """In a forked child: a thread of the parent that was in a call is not here to end it."""
        with _settling:
            if self._generation == _generation:
                return
            if not self._lock.acquire(blocking=False) and self._blob is not None:
                assert self._reader is not None
                _unusable.append(self._reader)
                self._reader = io.BufferedReader(_RawBlob(self._blob), _BUFFER_SIZE)
                self._reader.seek(self._before)
            self._lock = threading.RLock()
            self._generation = _generation

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed file {self!r}")

    def _readable(self, action: str = "read") -> tuple[io.BufferedReader, ReadAhead]:
        self._check_open()
        if self._reader is None or self._blob is None:
            raise io.UnsupportedOperation(f"{action}: {self!r} is not open for reading")
        return self._reader, self._blob

    def _check_writable(self) -> None:
        self._check_open()
        if self._reader is not None:
            raise io.UnsupportedOperation(f"write: {self!r} is not open for writing")


class _RawBlob(io.RawIOBase):
    """The unbuffered reader below the standard library's `io.BufferedReader`."""

    def __init__(self, blob: ReadAhead) -> None:
        self._blob = blob
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = self._blob.readinto(self._position, memoryview(buffer).cast("B"))
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._blob.size()
        elif whence != io.SEEK_SET:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        if offset < 0:
            raise ValueError(f"cannot seek to the negative position {offset}")
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position


_generation = 0  # a forked child's is one more than its parent's
_settling = threading.Lock()
_unusable: list[io.BufferedReader] = []  # kept, since even their finalizers wait for a lock of the parent


def _forget_parent() -> None:
    global _generation, _settling
    _generation += 1
    _settling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


def _reopen(client: BlobClient, version: BlobVersion | None, position: int) -> BlobIO:
    blob = BlobIO._of(client, version)  # noqa: SLF001
    blob.seek(position)
    return blob
