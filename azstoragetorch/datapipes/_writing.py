"""Pipes that write a blob per item, or tar shards of bounded size. A blob is written completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import closing
from typing import Any

from azstoragetorch._blob.client import BlobClient, BlockWriter, ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import GiB, MiB, TransferConfig
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._samples.items import pair_of, plain_url
from azstoragetorch._samples.packing import as_bytes, files_of
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch._samples.tar import END
from azstoragetorch._samples.workers import Placement
from azstoragetorch.datapipes._base import IterDataPipe, check_function, functional_datapipe

_COPY = 8 * MiB  # taken from a stream at once


@functional_datapipe("save_by_azure")
class AzureBlobSaverIterDataPipe(IterDataPipe[str]):
    """Writes each ``(name, data)`` to a blob and yields its URL, in order.

    A blob is written completely or not at all, and its URL is yielded after it was written. The next blobs are in
    flight at the same time, within ``transfer.memory_limit``, so some of them may already be written when an error is
    raised or the iteration stops. A stream is copied in pieces when it is its turn.

    Args:
        source_datapipe: Yields ``(name, data)``: data is bytes, any object with the buffer protocol, or a binary
            stream, which is read to its end and left open.
        filepath_fn: Returns the URL of the blob for *name*; by default, *name* is the URL.
        overwrite: If False, raise ``ResourceExistsError`` if the blob exists, and leave it unchanged.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Iterating raises ``TypeError`` if the source yields something other than a pair or, with the URL, data that
    is not bytes, and :class:`~azstoragetorch.exceptions.FatalBlobIOWriteError` if the service refuses a write. The
    length is that of the source.
    """

    def __init__(
        self,
        source_datapipe: Iterable[tuple[Any, Any]],
        filepath_fn: Callable[[Any], str] | None = None,
        overwrite: bool = True,
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        if filepath_fn is not None:
            check_function(filepath_fn)
        self.source_datapipe = source_datapipe
        self.filepath_fn = filepath_fn
        self.overwrite = overwrite
        self._clients = ClientFactory(credential, transfer)

    def __len__(self) -> int:
        if isinstance(self.source_datapipe, Sized):
            return len(self.source_datapipe)
        raise TypeError(f"{type(self).__name__} has no length: its source has none")

    def __iter__(self) -> Iterator[str]:
        def put(job: tuple[BlobClient, bytes | None], _scope: Scope) -> str:
            client, data = job
            if data is not None:
                client.put(data, create_only=not self.overwrite)
            return plain_url(client.url)

        config = self._clients.config
        ahead = OrderedPrefetch(
            engine_for(config),
            self._jobs(),
            put,
            cost=lambda job: len(job[1] or b""),
            size=lambda _: 0,
            depth=config.max_connections,
        )
        with closing(ahead):
            for work in ahead:
                yield work.result()

    def _jobs(self) -> Iterator[tuple[BlobClient, bytes | None]]:
        """What is to be put; None where a stream was copied already."""
        for item in self.source_datapipe:
            name, data = pair_of(item, "(name, data) to save")
            url = parse_blob_url(name if self.filepath_fn is None else self.filepath_fn(name))
            if url.is_read_only:
                raise ValueError(f"{plain_url(url)}: a snapshot or version cannot be written")
            client = self._clients.blob(url)
            if hasattr(data, "read"):
                self._copy(client, data)
                yield client, None
            else:
                yield client, as_bytes(data, str(url))

    def _copy(self, client: BlobClient, stream: Any) -> None:
        writer = client.writer(create_only=not self.overwrite)
        with on_error(writer.abort):
            while chunk := stream.read(_COPY):
                writer.write(memoryview(as_bytes(chunk, str(client.url))))
            writer.commit()


@functional_datapipe("write_blob_tar_shards")
class BlobTarShardWriterIterDataPipe(IterDataPipe[str]):
    """Packs samples into tar blobs in WebDataset's format, and yields the URL of each when it is written.

    A sample is a mapping ``{"__key__": "0001", "jpg": b"...", "json": b"..."}``, whose entries become the files
    ``0001.jpg`` and ``0001.json``, next to each other in one tar; other names with leading underscores are left out. A
    key can contain slashes, but no dot after the last slash, because readers would take the rest for an extension. A
    tar is written completely or not at all, and equal samples result in equal tars.

    Args:
        source_datapipe: Yields samples, whose values are bytes-like objects, or strings, which are encoded in UTF-8.
        url_pattern: URL of the tars with ``{shard}`` for their number from 0, for example
            ``".../train-{shard:06d}.tar"``; ``{worker}`` is the number of the DataLoader worker and rank, and is
            required if there are several.
        max_size: Maximum bytes of a tar, including headers. A single sample that is larger gets a separate tar.
        max_count: Maximum number of samples in a tar.
        overwrite: If False, raise ``ResourceExistsError`` if the blob exists, and leave it unchanged.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ValueError: *url_pattern* has no ``{shard}``, or a limit is below 1.

    Iterating raises ``TypeError`` or ``ValueError`` with the URL and the key if a sample cannot be packed; the tars
    yielded before are complete. The number of tars is not known in advance: ``len()`` raises TypeError.
    """

    def __init__(
        self,
        source_datapipe: Iterable[Mapping[str, Any]],
        url_pattern: str,
        *,
        max_size: int = GiB,
        max_count: int | None = None,
        overwrite: bool = True,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        try:
            is_numbered = url_pattern.format(shard=0, worker=0) != url_pattern.format(shard=1, worker=0)
            self._has_worker = url_pattern.format(shard=0, worker=0) != url_pattern.format(shard=0, worker=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"url_pattern may hold {{shard}} and {{worker}}, and no other braces: {error!r}") from None
        if not is_numbered:
            raise ValueError("url_pattern must hold {shard}, or every tar would replace the one before")
        trusted_url = parse_blob_url(url_pattern.format(shard=0, worker=0))
        if max_size < 1 or (max_count is not None and max_count < 1):
            raise ValueError(f"max_size and max_count must be at least 1, not {max_size} and {max_count}")
        self.source_datapipe = source_datapipe
        self.max_size = max_size
        self.max_count = max_count
        self.overwrite = overwrite
        self._pattern = _Pattern(url_pattern)
        self._clients = ClientFactory(credential, transfer, trusted_url)
        self._placement = Placement("rank_and_worker")

    def __iter__(self) -> Iterator[str]:
        place = self._placement.here()
        if place.shards > 1 and not self._has_worker:
            raise ValueError(
                f"url_pattern must hold {{worker}}: {place.shards} workers and ranks would write the same tars"
            )
        tar: _OpenTar | None = None
        number = 0
        try:
            for sample in self.source_datapipe:
                if tar is None:
                    tar = self._open(number, place.shard)
                files = files_of(sample, tar.url)
                size = sum(len(part) for part in files)
                is_full = tar.size + size + len(END) > self.max_size or tar.count == self.max_count
                if tar.count and is_full:
                    yield tar.commit()
                    number += 1
                    tar = self._open(number, place.shard)
                tar.add(files, size)
            if tar is not None:
                yield tar.commit()
        finally:
            if tar is not None:
                tar.abort()

    def _open(self, number: int, worker: int) -> _OpenTar:
        client = self._clients.blob(self._pattern.text.format(shard=number, worker=worker))
        return _OpenTar(str(client.url), client.writer(create_only=not self.overwrite))


class _Pattern:
    """A text that no error message of torch's shows: it may hold a SAS."""

    def __init__(self, text: str) -> None:
        self.text = text


class _OpenTar:
    """A tar that is being written."""

    def __init__(self, url: str, writer: BlockWriter) -> None:
        self.url = url
        self._writer = writer
        self._is_open = True
        self.size = 0
        self.count = 0

    def add(self, files: list[bytes], size: int) -> None:
        for part in files:
            if part:
                self._writer.write(memoryview(part))
        self.size += size
        self.count += 1

    def commit(self) -> str:
        self._writer.write(memoryview(END))
        self._writer.commit()
        self._is_open = False
        return self.url

    def abort(self) -> None:
        if self._is_open:
            self._writer.abort()
