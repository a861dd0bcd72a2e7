"""Fetch the contents of items ahead, in order, and divide blobs into ranges.

Only one version of a blob is read: the version that the first request finds, or the one that the item names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from azstoragetorch._blob.client import BlobClient, BlobVersion, ClientFactory, Head
from azstoragetorch._blob.download import fetch_parallel
from azstoragetorch._blob.errors import not_found
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.job import IsStuck
from azstoragetorch._engine.memory import copy, filled_bytes
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._samples.expected import ExpectedBlobClient
from azstoragetorch._samples.items import BlobInfo, BlobRange, Item, ManifestBlob, plain_url, url_of
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch._samples.records import check_delimiter, lookahead, read_records

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched ahead: ``data`` is the beginning of the item, or all of it."""

    client: BlobClient
    version: BlobVersion
    data: bytes
    is_whole: bool

    def whole(self) -> bytes:
        """All of the item; what is missing is fetched now, by many connections."""
        if self.is_whole:
            return self.data
        return _complete(self.client, self.version, self.data, Scope())


def fetch_ahead(
    clients: ClientFactory, items: Iterable[Item], *, depth: int, whole: bool = True
) -> OrderedPrefetch[Item, Fetched]:
    """The content of *items*, in order, fetched ahead within the memory limit of the configuration.

    An item whose size is known is fetched whole; of others, and of all blobs unless *whole*, the first part.
    """
    part = clients.config.effective_part_size

    def cost(item: Item) -> int:
        if isinstance(item, BlobRange):
            return item.stop - item.start + lookahead(item.start, item.stop) if item.align else item.stop - item.start
        if isinstance(item, BlobInfo):
            return item.size if whole else min(item.size, part)
        return part

    def work(item: Item, scope: Scope) -> Fetched:
        client = client_of(clients, item)
        if isinstance(item, BlobRange):
            return Fetched(client, BlobVersion(item.size, item.etag), _fetch_range(client, item, scope), is_whole=True)
        fetched = _of_head(client, client.head(scope))
        if not fetched.is_whole and whole and isinstance(item, BlobInfo) and fetched.version.size <= item.size:
            data = _complete(client, fetched.version, fetched.data, scope)
            return Fetched(client, fetched.version, data, is_whole=True)
        return fetched

    def start(item: Item, scope: Scope, done: Callable[[Fetched], None], failed: Callable[[], None]) -> IsStuck | None:
        if isinstance(item, BlobRange) or (whole and isinstance(item, BlobInfo) and item.size > part):
            return None
        client = client_of(clients, item)
        return client.start_head(scope, lambda head: done(_of_head(client, head)), failed)

    return OrderedPrefetch(
        engine_for(clients.config),
        iter(items),
        work,
        cost=cost,
        size=lambda fetched: len(fetched.data),
        depth=depth,
        start=start,
    )


def client_of(clients: ClientFactory, item: Item) -> BlobClient:
    """The client for the blob of *item*; for one of a manifest, it checks the version."""
    client = clients.blob(url_of(item))
    if isinstance(item, ManifestBlob):
        return ExpectedBlobClient(client, BlobVersion(item.size, item.etag))
    return client


def _of_head(client: BlobClient, head: Head) -> Fetched:
    return Fetched(client, head.version, head.data, is_whole=len(head.data) == head.version.size)


def _fetch_part(client: BlobClient, span: ByteRange, view: memoryview, etag: str, scope: Scope) -> None:
    with scope.child() as own:  # it ends with those of all, but its failure is its own
        fetch_parallel(client.service, client.url, [(span, view)], etag=etag, scope=own)


def _fetch_range(client: BlobClient, item: BlobRange, scope: Scope) -> bytes:
    def read(start: int, stop: int) -> bytes:
        def fill(view: memoryview) -> None:
            _fetch_part(client, ByteRange(start, stop), view, item.etag, scope)

        return filled_bytes(stop - start, fill)

    if not item.align:
        return read(item.start, item.stop)
    return read_records(item.start, item.stop, item.size, item.align, read)


def _complete(client: BlobClient, version: BlobVersion, head: bytes, scope: Scope) -> bytes:
    """All of *version*, of which *head* is here."""

    def fill(view: memoryview) -> None:
        copy(view[: len(head)], memoryview(head))
        _fetch_part(client, ByteRange(len(head), version.size), view[len(head) :], version.etag, scope)

    return filled_bytes(version.size, fill)


def fetch_heads_ahead(
    config: TransferConfig,
    items: Iterator[T],
    *,
    client: Callable[[T], BlobClient],
    size: Callable[[T], int | None],
    is_eager: bool,
) -> OrderedPrefetch[T, Head]:
    """The first parts of the blobs that *items* stand for, in order; *size* is the length of one, if it is known."""
    part = config.effective_part_size

    def cost(item: T) -> int:
        length = size(item)
        return part if length is None else min(length, part)

    return OrderedPrefetch(
        engine_for(config),
        items,
        lambda item, scope: client(item).head(scope),
        cost=cost,
        size=lambda head: len(head.data),
        depth=config.max_connections,
        is_eager=is_eager,
        start=lambda item, scope, done, failed: client(item).start_head(scope, done, failed),
    )


def split_ahead(
    clients: ClientFactory, items: Iterable[Item], chunk_size: int, align: bytes | int | None
) -> OrderedPrefetch[Item, list[BlobRange]]:
    """The ranges of the blobs of *items*, in order; see `split_ranges`. The next blobs are looked at ahead."""
    return OrderedPrefetch(
        engine_for(clients.config),
        iter(items),
        lambda item, _scope: list(split_ranges(item, clients, chunk_size, align)),
        cost=lambda _item: 0,
        size=lambda _ranges: 0,
        depth=clients.config.max_connections,
    )


def split_ranges(item: Item, clients: ClientFactory, chunk_size: int, align: bytes | int | None) -> Iterator[BlobRange]:
    """Cut the blob of *item* into ranges of about *chunk_size* bytes; see `BlobRange`.

    Raises:
        ResourceNotFoundError: there is no such blob.
        ValueError: its length is not a multiple of the record length *align*.
    """
    url = parse_blob_url(url_of(item))
    if isinstance(item, BlobInfo):
        size, etag = item.size, item.etag
    else:
        version = clients.blob(url).version()
        if version is None:
            raise not_found(f"there is no blob {plain_url(url)}")
        size, etag = version.size, version.etag
    step = chunk_size
    if isinstance(align, int):
        if size % align:
            raise ValueError(
                f"{url} has {size} bytes, which is not a multiple of the record length {align}: it is truncated, or "
                "its records have another length"
            )
        step = max(align, chunk_size // align * align)
    delimiter = align if isinstance(align, bytes) else b""
    for start in range(0, size, step):
        yield BlobRange(plain_url(url), start, min(start + step, size), size, etag, delimiter)


def check_split(chunk_size: int, align: bytes | int | None) -> None:
    """Check the arguments of a range splitter.

    Raises:
        ValueError: a value is out of range; the message names it.
        TypeError: a value has a wrong type.
    """
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be a number of bytes, not {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 byte, not {chunk_size}")
    if isinstance(align, bytes):
        check_delimiter(align)
    elif align is not None:
        if isinstance(align, bool) or not isinstance(align, int):
            raise TypeError(
                f"align must be None, the bytes that end a record, or a record's length, not {type(align).__name__}"
            )
        if align < 1:
            raise ValueError(f"align must be at least 1 byte, not {align}")
