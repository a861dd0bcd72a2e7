"""Pipes that open or read the items of a lister, a pipe of URLs, or a range splitter, concurrently and in order."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Iterator, Sized
from contextlib import closing
from typing import Any

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.fetching import Fetched, check_split, fetch_ahead, split_ahead
from azstoragetorch._samples.items import BlobRange, Item, plain_url, url_of
from azstoragetorch.datapipes._base import IterDataPipe, StreamWrapper, functional_datapipe
from azstoragetorch.io import BlobIO

_MODES = {"rb": False, "b": False, "r": True, "rt": True, "t": True}  # whether to decode it
_OPEN_SHARE = 4  # opened blobs fetch ahead in at most this part of the memory limit; the rest is for reading on


class Reading(IterDataPipe[Any]):
    """What the reading pipes have in common: a source, a way in, and a trace of what was handed out.

    The trace is what `to_resumable` compares, and `skip` how it gets past what was consumed without reading it.
    """

    def __init__(
        self,
        source_datapipe: Iterable[Item],
        *,
        prefetch: int | None = None,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        if prefetch is not None and (isinstance(prefetch, bool) or not isinstance(prefetch, int)):
            raise TypeError(f"prefetch must be a number of blobs or None, not {type(prefetch).__name__}")
        if prefetch is not None and prefetch < 0:
            raise ValueError(f"prefetch must not be negative, not {prefetch}")
        self.source_datapipe = source_datapipe
        self.prefetch = prefetch
        self._clients = ClientFactory(credential, transfer)
        self._to_skip = 0
        self.handed_out = 0
        self.trace = 0
        self.skipped = (0, 0)

    def __len__(self) -> int:
        if isinstance(self.source_datapipe, Sized):
            return len(self.source_datapipe)
        raise TypeError(f"{type(self).__name__} has no length: its source has none")

    def skip(self, count: int) -> None:
        """Pass over the first *count* items of the next iteration without reading them."""
        self._to_skip = count

    def _depth(self) -> int:
        # Twice what can be in flight at once: results wait for their turn while the next are fetched.
        return 2 * self._clients.config.max_connections if self.prefetch is None else 1 + self.prefetch

    def _fetched(self, *, whole: bool) -> Iterator[tuple[str, Item, Fetched]]:
        """URL, item and content of each item of the source, fetched ahead."""
        self.handed_out = self.trace = 0
        to_skip, self._to_skip = self._to_skip, 0
        items = iter(self.source_datapipe)
        while self.handed_out < to_skip:
            item = next(items, None)
            if item is None:
                break
            self._note(item)
        self.skipped = self.handed_out, self.trace
        with closing(fetch_ahead(self._clients, items, depth=self._depth(), whole=whole)) as ahead:
            for work in ahead:
                fetched = work.result()
                self._note(work.item)
                yield plain_url(fetched.client.url), work.item, fetched

    def _note(self, item: Item) -> None:
        self.handed_out += 1
        start = item.start if isinstance(item, BlobRange) else 0
        self.trace = zlib.crc32(f"{url_of(item).partition('?')[0]} {start}".encode(), self.trace)


@functional_datapipe("open_files_by_azure")
class AzureBlobFileOpenerIterDataPipe(Reading):
    """Yields ``(url, stream)`` for each blob, open for reading.

    The stream is a `StreamWrapper` around a :class:`~azstoragetorch.io.BlobIO`: seekable, pinned to one version of its
    blob, and readable as long as it is kept, even after the pipe is iterated again. The first part
    (``transfer.part_size``) is fetched ahead, and the rest when it is read, so blobs of any size can be opened. Filter
    before opening, not after.

    A :class:`BlobRange` is opened as a `BytesIO` of the records in it.

    Args:
        source_datapipe: Yields URLs, :class:`BlobInfo` or :class:`BlobRange`.
        mode: ``"rb"`` for bytes, ``"r"`` or ``"rt"`` for text.
        prefetch: How many blobs to open ahead; 0 opens each in its turn. The default is as many as fit into
            a quarter of ``transfer.memory_limit`` (16 with the defaults). 1 or 2 are enough for large shards.
        encoding: Encoding of text.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ValueError: *mode* is unknown.

    The length is that of the source.
    """

    def __init__(
        self,
        source_datapipe: Iterable[Item],
        mode: str = "rb",
        *,
        prefetch: int | None = None,
        encoding: str = "utf-8",
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__(source_datapipe, prefetch=prefetch, credential=credential, transfer=transfer)
        if mode not in _MODES:
            raise ValueError(
                f"mode must be 'rb' for bytes, or 'r' or 'rt' for text, not {mode!r}; save_by_azure writes"
            )
        self.mode = mode
        self.encoding = encoding

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for url, item, fetched in self._fetched(whole=False):
            stream: Any
            if isinstance(item, BlobRange):
                stream = io.BytesIO(fetched.data)
            else:
                stream = BlobIO._of(fetched.client, fetched.version, fetched.data)  # noqa: SLF001
            yield url, self._wrapped(stream, url)

    def _wrapped(self, stream: Any, url: str) -> StreamWrapper:
        if _MODES[self.mode]:
            stream = io.TextIOWrapper(stream, encoding=self.encoding)
        return StreamWrapper(stream, name=url)

    def _depth(self) -> int:
        if self.prefetch is not None:
            return 1 + self.prefetch
        config = self._clients.config
        return max(1, min(config.max_connections, config.memory_limit // _OPEN_SHARE // config.effective_part_size))


@functional_datapipe("load_files_by_azure")
class AzureBlobFileLoaderIterDataPipe(Reading):
    """Yields ``(url, stream)`` for each blob, where the stream is a `StreamWrapper` around a `BytesIO` of the blob.

    The next blobs are in flight while one is consumed, in order, within ``transfer.memory_limit``; a single larger blob
    is always admitted. If the size of a blob is not known beforehand (a URL), only its first part is fetched ahead, so
    use `list_blobs_by_azure` for large blobs. For a :class:`BlobRange`, the stream has the records in it.

    Args:
        source_datapipe: Yields URLs, :class:`BlobInfo` or :class:`BlobRange`.
        prefetch: Maximum number of items in flight; the default is twice ``transfer.max_connections``.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    The length is that of the source.
    """

    def __iter__(self) -> Iterator[tuple[str, StreamWrapper]]:
        for url, _, fetched in self._fetched(whole=True):
            yield url, StreamWrapper(io.BytesIO(fetched.whole()), name=url)


@functional_datapipe("read_files_by_azure")
class AzureBlobFileReaderIterDataPipe(Reading):
    """Yields ``(url, data)`` with all bytes of each blob, which DataLoader can collate.

    Otherwise, it is like :class:`AzureBlobFileLoader`.
    """

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for url, _, fetched in self._fetched(whole=True):
            yield url, fetched.whole()


@functional_datapipe("split_blob_ranges")
class BlobRangeSplitterIterDataPipe(IterDataPipe[BlobRange]):
    r"""Splits each blob into ranges that different workers can read: yields :class:`BlobRange`.

    A range owns the records that start in it. The reader of a range skips the end of a record that started earlier, and
    reads past the end of the range to complete its last record. So every record is read exactly once, by one reader,
    whatever the size of the ranges. If ranges are much longer than records, each byte is read about once: the first
    request past the end of a range fetches less than 1% of its length.

    All ranges of a blob are pinned to one version: if the blob is overwritten in the meantime, reading raises
    ``BlobChangedError``. An empty blob has no ranges.

    Args:
        source_datapipe: Yields URLs (one request each for the size) or, without a request, :class:`BlobInfo`.
        chunk_size: Bytes of a range, which a reader holds in memory at once.
        align: How records are separated. ``None``: ranges can be cut anywhere. Bytes: the delimiter that ends a record,
            such as ``b"\n"`` for JSON Lines and CSV without quoted line breaks (with CRLF, the ``\r`` is kept). An
            integer: the length of each record in bytes.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ValueError, TypeError: *chunk_size* or *align* is wrong.

    Iterating raises ``ValueError`` if the length of a blob is not a multiple of the record length. The number of
    ranges is not known in advance: ``len()`` raises TypeError.
    """

    def __init__(
        self,
        source_datapipe: Iterable[Item],
        chunk_size: int,
        align: bytes | int | None = None,
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        check_split(chunk_size, align)
        self.source_datapipe = source_datapipe
        self.chunk_size = chunk_size
        self.align = align
        self._clients = ClientFactory(credential, transfer)

    def __iter__(self) -> Iterator[BlobRange]:
        with closing(split_ahead(self._clients, self.source_datapipe, self.chunk_size, self.align)) as ahead:
            for work in ahead:
                yield from work.result()
