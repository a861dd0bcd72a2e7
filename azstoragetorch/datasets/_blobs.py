"""What all datasets are made of: the blobs, what they are fetched with, and how one becomes a sample."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias, TypedDict, TypeVar, cast

from azure.core.exceptions import ClientAuthenticationError

from azstoragetorch._blob.client import BlobClient, ContainerClient, Head
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.engine import Scope, engine_for
from azstoragetorch._engine.metrics import timed
from azstoragetorch._samples.cache import BlobCache, CachedBlobClient
from azstoragetorch._samples.catalog import Catalog, list_catalog
from azstoragetorch._samples.once import OnceAmongForks
from azstoragetorch._samples.prefetch import OrderedPrefetch, Prefetched
from azstoragetorch.io import BlobIO

T = TypeVar("T")

Progress: TypeAlias = Callable[[int], object]

CACHE_BYTES = 100 << 30  # a fraction of the NVMe disks that GPU machines have


class BlobSample(TypedDict):
    """What a dataset without a transform yields for a blob."""

    url: str
    data: bytes


@dataclass(frozen=True)
class ListingInfo:
    """What a dataset is made of.

    Attributes:
        count: Number of blobs.
        size: Their bytes together; None if they were named by URL and not listed.
        fingerprint: Equal if and only if names and order are equal. Ranks that list for themselves can compare it.
    """

    count: int
    size: int | None
    fingerprint: str


class Blob:
    """One blob, as a transform gets it.

    Pickles, and may be kept; what was fetched ahead for it is given up when the transform returns.
    """

    __slots__ = ("_ahead", "_client", "_etag", "_size")

    def __init__(self, client: BlobClient, size: int | None = None, etag: str | None = None) -> None:
        self._client = client
        self._size = size
        self._etag = etag
        self._ahead: Prefetched[Blob, Head] | None = None

    @property
    def url(self) -> str:
        """The URL of the blob, without its query."""
        return str(self._client.url)

    @property
    def blob_name(self) -> str:
        """The name of the blob in its container, not percent-encoded."""
        return self._client.url.blob

    @property
    def container_name(self) -> str:
        """The name of the container."""
        return self._client.url.container

    @property
    def size(self) -> int | None:
        """Length in bytes as it was listed; None if the blob was named by URL. Makes no request."""
        return self._size

    @property
    def etag(self) -> str | None:
        """ETag, with its quotes, as it was listed; None if the blob was named by URL. Makes no request.

        The blob may have been overwritten since: ``reader().etag`` is the version that is read.
        """
        return self._etag

    def reader(self) -> BlobIO:
        """Open the blob for reading.

        Inside a transform its first part, mostly all of it, was fetched ahead and is waited for here; the rest of a
        larger blob streams as it is read.

        Raises:
            AzureError: the service refused, or could not be reached.
        """
        if self._ahead is None:
            return BlobIO._of(self._client)  # noqa: SLF001
        head = self._ahead.result()
        return BlobIO._of(self._client, head.version, head.data)  # noqa: SLF001

    def __repr__(self) -> str:
        return f"Blob({self.url!r})"

    def __getstate__(self) -> tuple[BlobClient, int | None, str | None]:
        return self._client, self._size, self._etag

    def __setstate__(self, state: tuple[BlobClient, int | None, str | None]) -> None:
        self._client, self._size, self._etag = state
        self._ahead = None


def to_sample(blob: Blob) -> BlobSample:
    """What a dataset without a transform makes of a blob."""
    if blob._ahead is not None:  # noqa: SLF001
        head = blob._ahead.result()  # noqa: SLF001
        if len(head.data) == head.version.size:
            return {"url": blob.url, "data": head.data}
    with blob.reader() as reader:
        return {"url": blob.url, "data": reader.read()}


class Source:
    """Where the blobs of a dataset come from: their catalog, and clients for them. Pickles with nothing alive in it."""

    def __init__(
        self,
        *,
        container: BlobURL | None = None,
        prefix: str | None = None,
        urls: Iterable[str] = (),
        credential: Credential,
        transfer: TransferConfig | None,
        cache_dir: str | os.PathLike[str] | None,
        cache_bytes: int,
        progress: Progress | None = None,
    ) -> None:
        if transfer is not None and not isinstance(transfer, TransferConfig):
            raise TypeError(f"transfer must be a TransferConfig, not {type(transfer).__name__}")
        check_count("cache_bytes", cache_bytes, 1)
        if not isinstance(urls, Iterable):
            raise TypeError(f"blob_urls must be a URL or an iterable of URLs, not {type(urls).__name__}")
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, not {type(prefix).__name__}")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {type(progress).__name__}")
        if cache_dir is not None and not isinstance(cache_dir, (str, os.PathLike)):
            raise TypeError(f"cache_dir must be a path, not {type(cache_dir).__name__}")
        if cache_dir is not None and not os.fspath(cache_dir):
            raise ValueError("cache_dir must not be empty: pass None to keep nothing")
        self.config = transfer or TransferConfig()
        CredentialHolder(credential)  # refused here even if no URL needs it
        self._prefix = prefix or ""
        self._progress = progress
        self._cache = None if cache_dir is None else BlobCache(cache_dir, cache_bytes)
        self._listed_once: OnceAmongForks | None = None
        if container is None:
            catalog = Catalog()
            catalog.append_urls([urls] if isinstance(urls, str) else urls)
            self._catalog: Catalog | None = catalog
            addresses = catalog.containers
        else:
            self._catalog = None
            addresses = [container]
        self._credentials = [CredentialHolder(credential, address.sas) for address in addresses]
        pairs = zip(addresses, self._credentials, strict=True)
        self._containers = [ContainerClient(address, holder, self.config) for address, holder in pairs]

    def list_lazily(self) -> None:
        """List when the catalog is first asked for, once for this process and the workers that it forks."""
        self._listed_once = OnceAmongForks()

    @property
    def catalog(self) -> Catalog:
        """The blobs."""
        if self._catalog is None:
            container = self._containers[0]
            if self._listed_once is None:
                self._catalog = self._list()
            else:
                made: list[Catalog] = []

                def make() -> bytes:
                    made.append(self._list())
                    return made[0].to_bytes()

                data = self._listed_once.get(make)
                self._catalog = made[0] if made else Catalog.from_bytes([container.url], data)
                self._listed_once = None
        return self._catalog

    def _list(self) -> Catalog:
        container = self._containers[0]
        catalog = list_catalog(container, self._prefix, self._progress)
        if not len(catalog):
            where = f"{container.url} below the prefix {self._prefix!r}" if self._prefix else str(container.url)
            warnings.warn(f"there are no blobs in {where}: the dataset is empty", UserWarning, stacklevel=2)
        return catalog

    @property
    def info(self) -> ListingInfo:
        """Sums over the catalog."""
        catalog = self.catalog
        return ListingInfo(len(catalog), catalog.total_size, catalog.fingerprint)

    @property
    def description(self) -> str:
        """What a repr says; does not list."""
        if self._catalog is not None:
            return f"{len(self._catalog):,} blobs"
        return f"{str(self._containers[0].url)!r}, prefix={self._prefix!r}, not listed yet"

    def blob(self, index: int) -> Blob:
        """A blob by its index in the catalog."""
        catalog = self.catalog
        which = catalog.container_index(index)
        container, holder = self._containers[which], self._credentials[which]
        url = replace(container.url, blob=catalog.name(index))
        size, etag = catalog.size(index), catalog.etag(index)
        if self._cache is None:
            client = BlobClient(url, holder, self.config)
        else:
            version = None if etag is None or size is None else BlobVersion(size, etag)
            client = CachedBlobClient(url, holder, self.config, self._cache, version)
        _ = container.service  # made once for all blobs
        client._live = container._live  # noqa: SLF001
        return Blob(client, size, etag)

    def unhurried(self, index: int) -> Prefetched[Blob, Head] | Blob:
        """A blob that nothing is fetched ahead for; it is looked for in the cache if there is one."""
        blob = self.blob(index)
        return (
            blob
            if self._cache is None
            else Prefetched(blob, lambda blob: _fetch_head(blob, Scope()), lambda: None, None, None)
        )

    def prefetch(self, blobs: Iterator[Blob], *, is_eager: bool) -> OrderedPrefetch[Blob, Head]:
        """Fetch the first parts of *blobs* ahead, in order."""
        part = self.config.effective_part_size
        return OrderedPrefetch(
            engine_for(self.config),
            blobs,
            _fetch_head,
            cost=lambda blob: part if blob.size is None else min(blob.size, part),
            size=lambda head: len(head.data),
            depth=self.config.max_connections,
            is_eager=is_eager,
            start=None if self._cache is not None else _start_head,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A progress callback is for this process; it may be a bar on a terminal.
        return {**self.__dict__, "_progress": None}


def _fetch_head(blob: Blob, scope: Scope) -> Head:
    return blob._client.head(scope)  # noqa: SLF001


def _start_head(blob: Blob, scope: Scope, done: Callable[[Head], None], failed: Callable[[], None]) -> bool:
    return blob._client.start_head(scope, done, failed)  # noqa: SLF001


def _to_other_process(source: Source) -> tuple[Any, ...]:
    _ = source.catalog  # listed here, once for all workers
    return _restore_source, (source.__getstate__(),)


def _restore_source(state: dict[str, Any]) -> Source:
    source = Source.__new__(Source)
    source.__dict__.update(state)
    return source


ForkingPickler.register(Source, _to_other_process)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise an error that says *name* unless *value* is an integer from *least* on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def check_transform(transform: Any) -> None:
    """Raise TypeError unless *transform* can be one."""
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be callable, not {type(transform).__name__}")


def apply(transform: Callable[[Blob], T] | None, ahead: Prefetched[Blob, Head] | Blob) -> T:
    """Make a sample of a blob, or of what was fetched ahead of it."""
    blob = ahead if isinstance(ahead, Blob) else ahead.item
    blob._ahead = None if isinstance(ahead, Blob) else ahead  # noqa: SLF001
    try:
        if transform is None:
            return cast(T, to_sample(blob))
        with timed("transform_seconds"):
            return transform(blob)
    except StopIteration as error:
        raise RuntimeError("the transform raised StopIteration") from error  # it would end the epoch unnoticed
    finally:
        blob._ahead = None  # noqa: SLF001


def is_refused(error: Exception) -> bool:
    """Whether all blobs are going to fail like this."""
    return isinstance(error, ClientAuthenticationError) or getattr(error, "status_code", None) in (401, 403)
