"""Pipes that read tar archives as WebDataset does: their members, and samples of several members."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

from azstoragetorch._blob.client import BlobClient, BlobVersion
from azstoragetorch._samples.items import pair_of
from azstoragetorch._samples.tar import split_name, walk
from azstoragetorch.datapipes._base import IterDataPipe, StreamWrapper, functional_datapipe
from azstoragetorch.io import BlobIO

_SHARD = re.compile(r"(?i)(.*?\.(?:tar|tgz|tar\.(?:gz|bz2|xz|lzma|zst)))/(.*)", re.DOTALL)


class _PathInTar(str):
    """The path of a member that knows which opening of its tar it came from. Pickles as a plain string."""

    opening: object

    @classmethod
    def of(cls, path: str, opening: object) -> _PathInTar:
        made = cls(path)
        made.opening = opening
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


@functional_datapipe("expand_blob_tar")
class BlobTarExpanderIterDataPipe(IterDataPipe[tuple[str, StreamWrapper]]):
    """Yields ``(url/member, stream)`` for each regular file of each tar, in order, while the tar is streamed.

    Streams are `StreamWrapper` objects whose ``name`` is the name of the member. Members of up to 16 MiB are held in
    memory. A larger member is read from its blob (or from a temporary file, if the tar is compressed or not a blob)
    when its stream is read. So members can have any size, and streams stay readable. Directories, links, and devices
    are skipped. Names are yielded as stored: check them before you use them as local paths.

    Tars can have ustar, PAX, or GNU headers; holes of sparse files are filled with zeros. They can be compressed with
    gzip, bzip2, xz, lzma, or zstd (before Python 3.14, zstd needs ``pip install backports.zstd``).

    Args:
        source_datapipe: Yields ``(url, stream)`` as `open_files_by_azure` does, or ``(url, bytes)``. A stream is closed
            at the end of its tar.

    Iterating raises ``tarfile.ReadError`` with the URL if a stream is not a tar, is damaged, or is truncated (its end
    marker is missing), and ``tarfile.CompressionError`` if the module that decompresses it is missing. The number of
    members is not known in advance: ``len()`` raises TypeError.
    """

    def __init__(self, source_datapipe: Iterable[tuple[str, Any]]) -> None:
        super().__init__()
        self.source_datapipe = source_datapipe

    def __iter__(self) -> Iterator[tuple[str, StreamWrapper]]:
        for item in self.source_datapipe:
            url, content = pair_of(item, "(url, stream) of a tar, as open_files_by_azure yields")
            stream = io.BytesIO(content) if isinstance(content, (bytes, bytearray, memoryview)) else content
            if not hasattr(stream, "read"):
                raise TypeError(f"{url}: a tar is expanded from a stream or bytes, not from {type(stream).__name__}")
            opening = object()
            try:
                blob = stream.file_obj if isinstance(stream, StreamWrapper) else stream
                open_slice = _opener_of_slices(blob) if isinstance(blob, BlobIO) else None
                for member in walk(blob, url, open_slice):
                    file = io.BytesIO(member.data) if isinstance(member.data, bytes) else member.data
                    yield _PathInTar.of(f"{url}/{member.name}", opening), StreamWrapper(file, name=member.name)
            finally:
                stream.close()


def _opener_of_slices(blob: BlobIO) -> Callable[[int, int], IO[bytes]]:
    begin = blob.tell()  # of the tar

    def open_slice(start: int, length: int) -> IO[bytes]:
        assert blob.etag is not None
        start += begin
        # To its reader the blob ends where the member does, so nothing is read ahead past it.
        version = BlobVersion(start + length, blob.etag)
        return cast("IO[bytes]", _Slice(blob._client, version, start))  # noqa: SLF001

    return open_slice


class _Slice(io.BufferedIOBase):
    """Bytes of a blob from *start* on, as a separate file."""

    def __init__(self, client: BlobClient, version: BlobVersion, start: int) -> None:
        self._made_of = client, version, start
        self._blob = BlobIO._of(client, version)  # noqa: SLF001
        self._start = self._blob.seek(start)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Slice, self._made_of

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        return self._blob.read(size)

    def read1(self, size: int = -1, /) -> bytes:
        return self._blob.read1(size)

    def readinto(self, buffer: Any, /) -> int:
        return self._blob.readinto(buffer)

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._blob.readline(size)

    def tell(self) -> int:
        return self._blob.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._blob.size - self._start}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to the negative position {base + offset}")
        return self._blob.seek(self._start + base + offset) - self._start

    def close(self) -> None:
        self._blob.close()
        super().close()


@functional_datapipe("group_blob_samples")
class BlobSampleGrouperIterDataPipe(IterDataPipe[dict[str, Any]]):
    """Groups consecutive files that differ only in their extension into one sample, as WebDataset does.

    ``photos/0001.jpg`` and ``photos/0001.seg.png`` of ``.../shard.tar`` become
    ``{"__key__": "photos/0001", "__url__": ".../shard.tar", "jpg": b"...", "seg.png": b"..."}``: the key ends at
    the first dot of the last segment, the extension is what follows, in lower case. Files without an extension,
    files whose names begin with a dot, and files in a folder ``__<name>__``, which WebDataset uses for metadata of the
    tar, are left out. Files are not reordered, so do not shuffle between the tar and the grouper. A tar that is opened
    again begins a new sample: the paths that `expand_blob_tar` yields contain this information, so pass them through
    `map` unchanged. Files that are not in a tar are grouped by their URLs.

    Args:
        source_datapipe: Yields ``(path, stream)`` as `expand_blob_tar` does, or ``(path, bytes)``.

    Iterating raises ``ValueError`` if a sample has the same extension twice. The number of samples is not known in
    advance: ``len()`` raises TypeError.
    """

    def __init__(self, source_datapipe: Iterable[tuple[str, Any]]) -> None:
        super().__init__()
        self.source_datapipe = source_datapipe

    def __iter__(self) -> Iterator[dict[str, Any]]:
        sample: dict[str, Any] = {}
        begun: tuple[Any, ...] = ()
        for item in self.source_datapipe:
            path, content = pair_of(item, "(path, stream or bytes) of a file, as expand_blob_tar yields")
            shard, name = _place(path, content)
            parts = split_name(name)
            if parts is None:
                continue
            key, extension = parts
            place = key, shard, getattr(path, "opening", None)
            if sample and place != begun:
                yield sample
                sample = {}
            if not sample:
                sample, begun = {"__key__": key, "__url__": shard}, place
            if extension in sample:
                raise ValueError(f"{path}: the sample {key!r} has the extension {extension!r} twice")
            if hasattr(content, "read"):
                sample[extension] = content.read()
                content.close()
            else:
                sample[extension] = content
        if sample:
            yield sample


def _place(path: str, content: Any) -> tuple[str, str]:
    """The URL of the tar that *path* is in, and the name in it; or the folder and the name of a blob."""
    name = content.name if isinstance(content, StreamWrapper) else None
    if isinstance(name, str) and path.endswith(f"/{name}"):
        return path[: -len(name) - 1], name
    shard = _SHARD.fullmatch(path)
    if shard is not None:
        return shard[1], shard[2]
    folder, _, last = path.rpartition("/")
    return folder, last
