"""The contents of a dataset: the catalog of its blobs, and a client for each of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeAlias

from azstoragetorch._blob.client import BlobClient, BlobVersion, ClientFactory, ContainerClient, Head
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL, parse_blob_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.cache import BlobCache, CachedBlobClient
from azstoragetorch._samples.catalog import Catalog
from azstoragetorch._samples.fetching import fetch_heads_ahead
from azstoragetorch._samples.listing import list_catalog
from azstoragetorch._samples.manifest import IfChanged, Manifest, check_if_changed, open_manifest
from azstoragetorch._samples.names import DEFAULT_RULES, NameRules
from azstoragetorch._samples.once import OnceAmongForks
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch._samples.rows import Row
from azstoragetorch.datasets._blobs import Blob
from azstoragetorch.datasets._job import check_group, share_listing

ListingProgress: TypeAlias = Callable[[int], object]

CACHE_BYTES = 100 << 30  # a fraction of the NVMe disks that GPU machines have


@dataclass(frozen=True)
class ListingInfo:
    """The blobs that a dataset consists of.

    Attributes:
        count: Number of blobs.
        size: Their total size in bytes; None if they were given by URL and not listed.
        fingerprint: Equal if and only if names and order are equal. Ranks that list separately can compare it. Of a
            manifest, it is the digest, which depends on sizes and ETags, too.
    """

    count: int
    size: int | None
    fingerprint: str


class Planned(NamedTuple):
    """A blob, and its place in the order in which blobs are read."""

    place: int
    blob: Blob


class Contents:
    """The blobs of a dataset. Pickles with nothing alive in it."""

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
        progress: ListingProgress | None = None,
        rules: NameRules = DEFAULT_RULES,
        manifest: Manifest | None = None,
        if_changed: IfChanged = "raise",
        is_shared: bool = False,
        group: Any = None,
    ) -> None:
        if is_shared:
            check_group(group)
        # A list of URLs names many hosts, of which the user may know none; one URL was given with the credential.
        trusted_url = parse_blob_url(urls) if isinstance(urls, str) else container
        clients = ClientFactory(credential, transfer, trusted_url)
        check_count("cache_bytes", cache_bytes, 1)
        if not isinstance(urls, Iterable):
            raise TypeError(f"blob_urls must be a URL or an iterable of URLs, not {type(urls).__name__}")
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, not {type(prefix).__name__}")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {type(progress).__name__}")
        self.config = clients.config
        self._prefix = prefix or ""
        self._progress = progress
        self._rules = rules
        self._cache = _make_cache(cache_dir, cache_bytes)
        self._listed_once: OnceAmongForks | None = None
        self._catalog: Catalog | None = None
        self._manifest = manifest
        self._if_changed: IfChanged = if_changed
        addresses = [container] if container is not None else []
        if container is None and manifest is None:
            self._catalog = Catalog()
            self._catalog.append_urls([urls] if isinstance(urls, str) else urls)
            addresses = self._catalog.containers
        self._containers: list[ContainerClient] = [clients.container(address) for address in addresses]
        if is_shared:
            self._list_with_all_ranks(group)

    def list_lazily(self) -> None:
        """List when the catalog is first asked for, once for this process and the workers that it forks."""
        self._listed_once = OnceAmongForks()

    def list_now(self) -> None:
        """List, unless the blobs are known."""
        if self._manifest is None:
            _ = self.catalog

    def __len__(self) -> int:
        return len(self.catalog if self._manifest is None else self._manifest)

    @property
    def fingerprint(self) -> str:
        """Equal for the same blobs in the same order."""
        return self.catalog.fingerprint if self._manifest is None else self._manifest.description.digest

    @property
    def catalog(self) -> Catalog:
        """The blobs."""
        catalog = self._catalog
        if catalog is None:
            once = self._listed_once  # another thread, or a handler, may list meanwhile: the first catalog stays
            listed = self._list() if once is None else self._list_among_forks(once)
            catalog = self._catalog = listed if self._catalog is None else self._catalog
            self._listed_once = None
        return catalog

    def _list_among_forks(self, once: OnceAmongForks) -> Catalog:
        made: list[tuple[Catalog, bytes]] = []

        def make() -> bytes:
            catalog = self._list()
            made.append((catalog, catalog.to_bytes()))
            return made[0][1]

        data = once.get(make)
        return made[0][0] if made and made[0][1] is data else Catalog.from_bytes([self._containers[0].url], data)

    def _list_with_all_ranks(self, group: Any) -> None:
        url = self._containers[0].url
        what = {"container": str(url), "prefix": self._prefix, "rules": list(astuple(self._rules))}
        self._catalog = share_listing(self._list, what, [url], group)

    def _list(self, report: ListingProgress = lambda _count: None) -> Catalog:
        container, progress = self._containers[0], self._progress

        def note(count: int) -> None:
            report(count)
            if progress is not None:
                progress(count)

        catalog = list_catalog(container, self._prefix, note, self._rules)
        if not len(catalog):
            where = f"{container.url} below the prefix {self._prefix!r}" if self._prefix else str(container.url)
            warnings.warn(f"there are no blobs in {where}: the dataset is empty", UserWarning, stacklevel=2)
        return catalog

    @property
    def info(self) -> ListingInfo:
        """Sums over the catalog."""
        if self._manifest is not None:
            return ListingInfo(len(self), self._manifest.description.total, self.fingerprint)
        catalog = self.catalog
        return ListingInfo(len(catalog), catalog.total_size, catalog.fingerprint)

    @property
    def description(self) -> str:
        """What a repr says; does not list."""
        if self._manifest is not None:
            return f"{len(self):,} blobs of {str(self._manifest.folder)!r}"
        if self._catalog is not None:
            return f"{len(self._catalog):,} blobs"
        return f"{str(self._containers[0].url)!r}, prefix={self._prefix!r}, not listed yet"

    def blob(self, index: int) -> Blob:
        """A blob by its index in the catalog."""
        if self._manifest is not None:
            return self._listed_blob(self._manifest, self._manifest.row(index))
        catalog = self.catalog
        container = self._containers[catalog.container_index(index)]
        client = container.at(catalog.url(index))
        size, etag = catalog.size(index), catalog.etag(index)
        return Blob(self._cached(client, size, etag), size, etag)

    def _listed_blob(self, manifest: Manifest, row: Row) -> Blob:
        client = self._cached(manifest.client(row), row.size, row.etag)
        return Blob(manifest.checked(client, row, self._if_changed), row.size, row.etag)

    def _cached(self, client: BlobClient, size: int | None, etag: str | None) -> BlobClient:
        if self._cache is None:
            return client
        version = None if etag is None or size is None else BlobVersion(size, etag)
        return CachedBlobClient(client, self._cache, version)

    def alone(self, index: int) -> Blob:
        """A blob that nothing is fetched ahead for; it is looked for in the cache if there is one."""
        blob = self.blob(index)
        if self._cache is not None:
            blob._head = blob._client.head  # noqa: SLF001
        return blob

    def fetch_ahead(
        self, plan: Iterator[tuple[int, int]], *, is_eager: bool, is_shuffled: bool = False
    ) -> OrderedPrefetch[Planned, Head]:
        """Fetch the first parts of blobs ahead; *plan* has places in an order, and indices into the catalog.

        *is_shuffled* says that the indices are in no order, and that all of the plan will be asked for.
        """
        return fetch_heads_ahead(
            self.config,
            self._planned(plan, is_shuffled=is_shuffled),
            client=lambda planned: planned.blob._client,  # noqa: SLF001
            size=lambda planned: planned.blob.size,
            is_eager=is_eager,
        )

    def _planned(self, plan: Iterator[tuple[int, int]], *, is_shuffled: bool) -> Iterator[Planned]:
        manifest = self._manifest
        if manifest is None:
            return (Planned(place, self.blob(index)) for place, index in plan)
        rows = manifest.look_up(plan, is_shuffled=is_shuffled)
        return (Planned(place, self._listed_blob(manifest, row)) for place, row in rows)

    def __getstate__(self) -> dict[str, Any]:
        # A progress callback is for this process; it may be a bar on a terminal.
        return {**self.__dict__, "_progress": None}


def _make_cache(folder: str | os.PathLike[str] | None, limit: int) -> BlobCache | None:
    if folder is None:
        return None
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"cache_dir must be a path, not {type(folder).__name__}")
    if not os.fspath(folder):
        raise ValueError("cache_dir must not be empty: pass None to keep nothing")
    return BlobCache(folder, limit)


def _to_other_process(contents: Contents) -> tuple[Any, ...]:
    contents.list_now()  # once for all workers
    return _restore_contents, (contents.__getstate__(),)


def _restore_contents(state: dict[str, Any]) -> Contents:
    contents = Contents.__new__(Contents)
    contents.__dict__.update(state)
    return contents


ForkingPickler.register(Contents, _to_other_process)


def check_count(name: str, value: Any, least: int) -> None:
    """Raise an error that says *name* unless *value* is an integer from *least* on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def open_contents(
    manifest_url: str,
    *,
    container_url: str | None,
    if_changed: IfChanged,
    credential: Credential,
    transfer: TransferConfig | None,
    cache_dir: str | os.PathLike[str] | None,
    cache_bytes: int,
) -> Contents:
    """The blobs of a manifest. One request."""
    check_if_changed(if_changed)
    manifest = open_manifest(manifest_url, container_url=container_url, credential=credential, transfer=transfer)
    return Contents(
        manifest=manifest,
        if_changed=if_changed,
        credential=credential,
        transfer=transfer,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
