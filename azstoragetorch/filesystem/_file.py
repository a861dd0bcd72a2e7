"""A file of the file system: `BlobIO` with the errors, the attributes, and the transactions of fsspec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from azstoragetorch._engine.scope import on_error
from azstoragetorch.filesystem._errors import translated
from azstoragetorch.io import BlobIO

if TYPE_CHECKING:
    from azstoragetorch._blob.client import BlobClient, BlobVersion
    from azstoragetorch.filesystem._base import Base


class AzureBlobFile(BlobIO):
    """An open file: a :class:`~azstoragetorch.io.BlobIO` that raises `OSError` and can be part of a transaction.

    ``fs`` is its file system and ``path`` its path. Created by :meth:`AzureBlobFileSystem.open`.
    """

    fs: Base
    path: str
    _holds_back = False
    _is_held = False

    @classmethod
    def create(
        cls,
        fs: Base,
        path: str,
        client: BlobClient,
        mode: str,
        *,
        autocommit: bool = True,
        version: BlobVersion | None = None,
    ) -> AzureBlobFile:
        """Open the blob of *client*. Without *autocommit* only `commit` commits it."""
        self = cls.__new__(cls)
        self.fs = fs
        self.path = path
        self._holds_back = not autocommit
        self._set_up(client, mode, version)
        return self

    read = translated(BlobIO.read)
    read1 = translated(BlobIO.read1)
    readinto = translated(BlobIO.readinto)
    readinto1 = translated(BlobIO.readinto1)
    peek = translated(BlobIO.peek)
    readline = translated(BlobIO.readline)
    seek = translated(BlobIO.seek)
    write = translated(BlobIO.write)
    flush = translated(BlobIO.flush)
    close = translated(BlobIO.close)
    __exit__ = translated(BlobIO.__exit__)

    @property
    def size(self) -> int:
        """The size in bytes; of a writer, the bytes written so far."""
        return _size(self)

    @property
    def full_name(self) -> str:
        """The path with its protocol."""
        return str(self.fs.unstrip_protocol(self.path))

    @property
    def details(self) -> dict[str, Any]:
        """Name, size, and type, and of a reader also the ETag of the version that it reads."""
        return {"name": self.path, "size": self.size, "type": "file", "etag": self.etag}

    def info(self) -> dict[str, Any]:
        """`details`, as a method."""
        return self.details

    @translated
    def commit(self) -> None:
        """Commit what was written without autocommit: the blob has the new content when this returns.

        A file that was aborted stays aborted.

        Raises:
            ValueError: the file is still open.
            OSError: the commit failed; the blob is unchanged.
        """
        if not self.closed:
            raise ValueError(f"{self!r} is still open: close it before the transaction ends")
        if self._is_held:
            self._is_held = False
            assert self._writer is not None
            self._writer.commit()
            self.fs.invalidate_cache(self.path)

    def discard(self) -> None:
        """Abort: the blob is unchanged. Does nothing after `commit`."""
        self._is_held = False
        if self.closed:
            self._clean_up()
        else:
            self.abort()

    def _finish(self, *, commits: bool) -> None:
        if self._writer is None or not commits:
            super()._finish(commits=commits)
        elif self._holds_back:
            with on_error(self._clean_up):
                self._open_writer = self._opened_during = None
                self._writer.flush()
            self._is_held = True
        else:
            super()._finish(commits=True)
            self.fs.invalidate_cache(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (client, version, position) = super().__reduce__()
        return _reopen, (self.fs, self.path, client, version, position)


@translated
def _size(file: AzureBlobFile) -> int:
    return BlobIO.size.__get__(file)  # type: ignore[no-any-return]


def _reopen(fs: Base, path: str, client: BlobClient, version: BlobVersion | None, position: int) -> AzureBlobFile:
    file = AzureBlobFile.create(fs, path, client, "rb", version=version)
    file.seek(position)
    return file
