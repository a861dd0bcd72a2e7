"""`BlobIO`: a blob as a Python file."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterable
from operator import index
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn

from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Cancelled, on_error
from azstoragetorch._engine.turns import Turns, getframe
from azstoragetorch.exceptions import FatalBlobIOWriteError
from azstoragetorch.io._arguments import readable_bytes
from azstoragetorch.io._calls import in_turn
from azstoragetorch.io._drops import Drops, finalized_object
from azstoragetorch.io._reading import Reader
from azstoragetorch.io._writing import Writer

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer
    from typing_extensions import Self

    from azstoragetorch._blob.client import BlobVersion

    class _BinaryFile(io.BufferedIOBase, BinaryIO):
        """A file of bytes for type checkers, so that `torch.save` and `torch.load` take it."""
else:
    _BinaryFile = io.BufferedIOBase

__all__ = ["BlobIO"]


class BlobIO(_BinaryFile):
    """A blob as a binary file, for `torch.load`, `torch.save`, and all other code that takes a file object.

    Reading sees one version of the blob: the one that the first read finds. Opening and seeking make no request
    (except ``seek`` relative to the end, which needs the size). Sequential reading increases the read-ahead, bounded
    by ``transfer.memory_limit``.

    Writing is all or nothing: the blob changes when `close` succeeds, and only then. Leaving the ``with`` block by an
    exception, `abort`, closing while an exception is propagating, a failed block, or dropping the object commits
    nothing, and an existing blob is unchanged.

    An object can be shared between threads: its calls take turns.

    Args:
        blob_url: URL of the blob, in any of the forms that :doc:`the guide </guide/urls>` lists. A SAS, a
            ``snapshot`` or a ``versionid`` in its query is respected.
        mode: ``"rb"`` to read, ``"wb"`` to write or overwrite, ``"xb"`` to write a blob that must not exist yet.
        credential: ``None`` for :class:`azure.identity.DefaultAzureCredential`, ``False`` for anonymous access, or a
            ``TokenCredential``, ``AzureSasCredential`` or ``AzureNamedKeyCredential``. A SAS in the URL takes
            precedence.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: the URL or the mode is not valid; a snapshot or version was opened for writing; a token would be
            sent over plain http.
        TypeError: an argument has the wrong type.

    The first call that needs the service raises errors of the service: as ``azure.core.exceptions`` types when reading,
    and as :class:`~azstoragetorch.exceptions.FatalBlobIOWriteError`, with such an error as its cause, when writing.
    Mode ``"xb"`` raises ``ResourceExistsError`` if the blob exists.
    """

    _mode = ""  # until all is set up
    _open_reader: Reader | None = None  # the one that is there while this is open
    _open_writer: Writer | None = None

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
        self._set_up(ClientFactory(credential, transfer, url).blob(url), mode)

    @classmethod
    def _of(cls, client: BlobClient, version: BlobVersion | None = None, head: bytes = b"", mode: str = "rb") -> BlobIO:
        """A file over *client*; a reader is of *version* if that is known, with the first bytes that are here."""
        self = cls.__new__(cls)
        self._set_up(client, mode, version, head)
        return self

    def _set_up(self, client: BlobClient, mode: str, version: BlobVersion | None = None, head: bytes = b"") -> None:
        self._client = client
        self._turns = Turns()
        self._was_given_up = False  # closed without waiting for the call in progress, which cleans up
        self._drops = Drops(is_writer=mode != "rb")
        self._opened_during: BaseException | None = None
        self._reader: Reader | None = None
        self._writer: Writer | None = None
        if mode == "rb":
            self._reader = Reader(client.reader(version, head))
        else:
            self._opened_during = sys.exc_info()[1]  # says nothing about how the writing will end
            self._writer = Writer(client.writer(create_only=mode == "xb"), str(client.url))
        self._mode = mode
        self._open_reader, self._open_writer = self._reader, self._writer

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
        """The size in bytes. A reader requests it if it is not known yet; a writer counts the bytes written so far."""
        return self._size_of_blob() if self._writer is None else self._writer.written

    @property
    def etag(self) -> str | None:
        """The version (ETag) of the blob that is read, or None before the first read."""
        version = self._reader.blob.version if self._reader is not None else None
        return version.etag or None if version is not None else None

    @property
    def closed(self) -> bool:
        """Whether `close` or `abort` was called."""
        return self._open_reader is None and self._open_writer is None

    def readable(self) -> bool:
        """Whether the blob was opened for reading."""
        self._check_open()
        return self._mode == "rb"

    def writable(self) -> bool:
        """Whether the blob was opened for writing."""
        self._check_open()
        return self._mode != "rb"

    def seekable(self) -> bool:
        """Whether the position can be changed: True for readers, False for writers."""
        return self.readable()

    def __repr__(self) -> str:
        if not self._mode:
            return f"<{type(self).__name__} not opened>"
        return f"<{type(self).__name__} {self.name!r} mode={self._mode!r}{' closed' if self.closed else ''}>"

    # -- reading ----------------------------------------------------------------------------------------------------

    @in_turn
    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to *size* bytes, or to the end if *size* is negative or None.

        Returns fewer than *size* bytes only at the end of the blob. A read that fails does not move the position, so
        trying again skips nothing.

        Raises:
            BlobChangedError: the blob was overwritten since the first read.
            AzureError: the service refused the request, or could not be reached.
        """
        return (self._open_reader or self._refuse("read")).read(-1 if size is None else index(size))

    @in_turn
    def read1(self, size: int = -1, /) -> bytes:
        """Read up to *size* bytes, from the buffer or with at most one read-ahead request."""
        return (self._open_reader or self._refuse("read")).read1(index(size))

    @in_turn
    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill *buffer* and return the number of bytes, fewer only at the end. Large reads receive directly into it."""
        return (self._open_reader or self._refuse("read")).readinto(buffer)

    @in_turn
    def readinto1(self, buffer: WriteableBuffer, /) -> int:
        """Like `readinto`, with at most one read-ahead request."""
        return (self._open_reader or self._refuse("read")).readinto(buffer, once=True)

    @in_turn
    def peek(self, size: int = 0, /) -> bytes:
        """Return bytes from the position without moving it: at least one, except at the end of the blob."""
        index(size)
        return (self._open_reader or self._refuse("read")).peek()

    @in_turn
    def readline(self, size: int | None = -1, /) -> bytes:
        """Read up to and including the next newline, and at most *size* bytes."""
        return (self._open_reader or self._refuse("read")).readline(-1 if size is None else index(size))

    @in_turn
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to *offset* relative to the start (0), the position (1) or the end (2); returns the new position.

        Makes no request, except relative to the end if the size of the blob is not known yet. A writer can only seek to
        its current position or, after the last write, to 0. If bytes are written after any other seek, even one that
        raised an error, `close` fails.

        Raises:
            ValueError: the position would be negative (this error is also an `OSError`, as with local files), or
                *whence* is not 0, 1, or 2.
            io.UnsupportedOperation: a writer cannot seek there.
        """
        return (self._open_reader or self._open_writer or self._refuse("seek")).seek(index(offset), index(whence))

    def tell(self) -> int:
        """The position in bytes."""
        return (self._open_reader or self._open_writer or self._refuse("tell")).tell()

    @in_turn
    def _size_of_blob(self) -> int:
        return (self._open_reader or self._refuse("size")).blob.size()

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(self, data: ReadableBuffer, /) -> int:
        """Write *data*, any object with the buffer protocol; returns its number of bytes.

        Large data is uploaded directly from the caller's memory before `write` returns. Small pieces are copied, and
        uploaded in the background.

        Raises:
            FatalBlobIOWriteError: this or an earlier upload failed; nothing will be committed.
            TypeError: *data* does not support the buffer protocol, such as a str.
        """
        if self._drops.thread is not None and self._drops.is_here() and self._writer is not None:
            view = readable_bytes(data)
            self._writer.leave(view)
            return view.nbytes
        return self._write(data)

    @in_turn
    def _write(self, data: ReadableBuffer) -> int:
        writer = self._open_writer or self._refuse("write")
        view = readable_bytes(data)
        writer.write(view)
        return view.nbytes

    def writelines(self, lines: Iterable[ReadableBuffer], /) -> None:
        """Write each of *lines*; no newlines are added."""
        for line in lines:
            self.write(line)

    def truncate(self, size: int | None = None, /) -> NoReturn:
        """Not supported: a blob is written as a whole.

        Raises:
            io.UnsupportedOperation: always.
        """
        (self._open_writer or self._refuse("truncate")).truncate(self.tell() if size is None else index(size))

    def flush(self) -> None:
        """When writing, wait for uploads in flight. Data that does not fill a block yet stays in memory.

        Raises:
            FatalBlobIOWriteError: an upload failed; nothing will be committed.
        """
        if self._drops.is_here():
            return
        self._check_open()
        if self._writer is not None:
            self._flush()

    @in_turn
    def _flush(self) -> None:
        (self._open_writer or self._refuse("flush")).flush()

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the blob. When writing, upload the rest and commit: when `close` returns, the blob has the new content.

        While an exception that was raised after the opening is propagating, closing commits nothing and warns. This
        happens in ``finally``, and if the ``with`` block of an `io.TextIOWrapper` fails. To commit in an exception
        handler, use the blob's own ``with`` block there.

        Finalizers do not close a writer: when a wrapper such as `io.TextIOWrapper` is dropped, the writer stays open
        for code that still refers to it. If there is no such code, the write is aborted.

        Raises:
            FatalBlobIOWriteError: the commit failed; the blob is unchanged.
            ResourceExistsError: the mode is ``"xb"``, and the blob exists.
        """
        if not self.closed and self._drops.is_closing():
            self._close_for_finalizer()
        elif not self.closed and self._fails_now():
            self.abort()
            self._warn(f"was closed while a {type(sys.exc_info()[1]).__name__} is being handled")
        else:
            self._end(commits=True)

    def abort(self) -> None:
        """Close without committing: the blob is unchanged. Does nothing if it is already closed."""
        self._end(commits=False)

    def __enter__(self) -> Self:
        self._check_open()
        self._drops.is_entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drops.is_entered = False
        if error is None:
            self._end(commits=True)
            return
        is_open = not self.closed
        self.abort()
        if is_open and not isinstance(error, (Exception, KeyboardInterrupt)):
            # Nobody sees these as a failure: sys.exit(0), a generator that its consumer leaves.
            self._warn(f"was left by a {type(error).__name__}")

    def __del__(self) -> None:
        if self.closed:
            return
        if self._reader is not None:
            self._reader.abandon()
        elif self._writer is not None and self._drops.is_ours:  # else it is the parent's to finish
            self._writer.cancel()
            self._drops.warn(self, f"{self!r} was dropped without close(): nothing was committed")

    def __reduce__(self) -> tuple[Any, ...]:
        """A reader pickles as its blob, version and position; a writer cannot be pickled."""
        if self._reader is None:
            raise TypeError(f"cannot pickle {self!r}: only readers can be pickled")
        self._check_open()
        return _reopen, (self._client, self._reader.blob.version, self._reader.position)

    def _end(self, *, commits: bool) -> None:
        """Close, with or without a commit, when the call in progress on another thread is over."""
        if not self._mode:
            return
        if self._turns.is_interrupted():
            self._end_from_within(commits=commits)
            return
        me = getframe()
        holders = self._turns.holders
        try:
            if holders.setdefault("now", me) is not me:
                holders = self._turns.wait(me)
            if not self.closed:
                self._finish(commits=commits)
        finally:
            self._turns.give_back(holders, me)
            del me
            if self._was_given_up:
                self._clean_up()

    def _end_from_within(self, *, commits: bool) -> None:
        """Close from a handler that interrupts a call of this object: that call fails, and cleans up."""
        if self.closed:
            if self._writer is None or self._was_given_up:
                return
            if commits:
                raise RuntimeError(f"reentrant call: {self!r} is being committed by the call that this one interrupts")
            self._writer.cancel()
            return
        self._was_given_up = True
        self._open_reader = self._open_writer = None
        if self._writer is not None:
            self._writer.cancel()
            if commits:
                self._warn("was closed by a handler that interrupted one of its calls")

    def _finish(self, *, commits: bool) -> None:
        try:
            with on_error(self._clean_up):
                self._open_reader = self._open_writer = self._opened_during = None
                if self._writer is not None and commits:
                    self._writer.commit()
                else:
                    self._clean_up()
        except Cancelled:
            raise FatalBlobIOWriteError(
                f"{self.name}: aborted while the commit was in progress; look at the blob before writing it again"
            ) from None

    def _clean_up(self) -> None:
        if self._reader is not None:
            self._reader.close()
        elif self._writer is not None:
            self._writer.abort()

    # -- dropped wrappers -------------------------------------------------------------------------------------------

    def _dealloc_warn(self, source: object) -> None:
        """Python's own wrappers call this in their finalizers, before they flush and close what they wrap."""
        self._drops.thread = get_ident()
        if self._writer is not None:
            self._drops.warn_of_wrapper(self, source)

    def _close_for_finalizer(self) -> None:
        """What a finalizer's `close` does: no wait, and no commit."""
        self._drops.thread = None
        if self._reader is None:
            self._drops.warn_of_wrapper(self, finalized_object())
            return
        self._was_given_up = True
        self._open_reader = self._open_writer = None
        if not self._turns.is_taken():  # else the call in progress cleans up
            self._reader.abandon()

    def _warn(self, how: str) -> None:
        warnings.warn(f"{self!r} {how}: nothing was committed", RuntimeWarning, stacklevel=3)

    # -- what it must be --------------------------------------------------------------------------------------------

    def _fails_now(self) -> bool:
        """Whether an exception is propagating, or being handled, that was not there at the opening."""
        error = sys.exc_info()[1]
        return self._writer is not None and error is not None and error is not self._opened_during

    def _check_open(self) -> None:
        if self.closed:
            self._raise_closed()

    def _raise_closed(self) -> NoReturn:
        raise ValueError(f"I/O operation on closed file {self!r}") from None

    def _refuse(self, action: str) -> NoReturn:
        self._check_open()
        purpose = "writing" if self._writer is None else "reading"
        raise io.UnsupportedOperation(f"{action}: {self!r} is not open for {purpose}")


def _reopen(client: BlobClient, version: BlobVersion | None, position: int) -> BlobIO:
    blob = BlobIO._of(client, version)  # noqa: SLF001
    blob.seek(position)
    return blob
