"""What pipes and nodes pass on - blobs and ranges of blobs - and how what they name is listed, opened and fetched.

Nothing here is alive between calls but the client of a container, which is made on first use and never pickled.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, ContainerClient, Head
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.download import BlobVersion, fetch_parallel
from azstoragetorch._blob.errors import portable
from azstoragetorch._blob.listing import Page
from azstoragetorch._blob.ranges import ByteRange
from azstoragetorch._blob.url import BlobURL, parse_blob_url, parse_url, url_of_name
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.memory import copy, filled_bytes
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch._samples.records import check_delimiter, lookahead, read_records


class BlobInfo(NamedTuple):
    """A blob as a listing tells of it: its URL without a SAS, its length in bytes, its quoted ETag."""

    url: str
    size: int
    etag: str


class BlobRange(NamedTuple):
    """Bytes ``start <= i < stop`` of the version *etag* of a blob of *size* bytes.

    With a delimiter in *align* it stands for the records that start in these bytes: reading it skips what belongs to
    a record that started before, and goes on past *stop* to the end of its last record.
    """

    url: str
    start: int
    stop: int
    size: int
    etag: str
    align: bytes = b""


# Names that stand in a URL as they are, where parsing would find nothing to decode, split off or refuse.
_PLAIN = re.compile(r"(?:[\w~-][\w.~-]*/)*[\w~-][\w.~-]*", re.ASCII)

Item: TypeAlias = "str | BlobInfo | BlobRange"
"""What readers take: a blob's URL, or what a lister or a range splitter yields."""


class Access:
    """Clients with one credential and one configuration, for whatever URLs come along."""

    def __init__(self, credential: Credential = None, transfer: TransferConfig | None = None) -> None:
        if transfer is not None and not isinstance(transfer, TransferConfig):
            raise TypeError(f"transfer must be a TransferConfig, not {type(transfer).__name__}")
        self.config = transfer or TransferConfig()
        self._holder = CredentialHolder(credential)
        self._containers: dict[tuple[str, str, str, str], ContainerClient] = {}
        self._last: tuple[str, ContainerClient | None] = ("", None)  # URLs mostly follow others of their container

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_containers": {}, "_last": ("", None)}

    def container(self, url: BlobURL) -> ContainerClient:
        """The client of the container that *url* is in; a SAS in *url* wins over the credential."""
        if url.sas is not None:
            return ContainerClient(_container_of(url), CredentialHolder(None, url.sas), self.config)
        key = (url.scheme, url.host, url.account_path, url.container)
        client = self._containers.get(key)
        if client is None:
            client = self._containers[key] = ContainerClient(_container_of(url), self._holder, self.config)
        return client

    def blob(self, url: str | BlobURL) -> BlobClient:
        """The client of the blob at *url*."""
        if isinstance(url, str):
            prefix, last = self._last
            if last is not None and url.startswith(prefix) and _PLAIN.fullmatch(url, len(prefix)) and len(url) < 1024:
                last.service  # noqa: B018 - made once, for all blobs of the container
                return last.blob(url[len(prefix) :])
        parsed = parse_blob_url(url) if isinstance(url, str) else url
        container = self.container(parsed)
        if parsed.sas is None:
            self._last = f"{container.url}/", container
        if parsed.is_read_only:
            holder = self._holder if parsed.sas is None else CredentialHolder(None, parsed.sas)
            return BlobClient(parsed, holder, self.config)
        container.service  # noqa: B018 - made once, for all blobs of the container
        return container.blob(parsed.blob)


def plain_url(url: BlobURL) -> str:
    """*url* as text: no SAS, but with the snapshot or version that it chooses."""
    state = f"?snapshot={url.snapshot}" if url.snapshot else f"?versionid={url.versionid}" if url.versionid else ""
    return f"{url}{state}"


def url_of(item: Item) -> str:
    """The URL that *item* names, as it was given.

    Raises:
        TypeError: *item* is nothing that names a blob.
    """
    if isinstance(item, str):
        return item
    if isinstance(item, (BlobInfo, BlobRange)):
        return item.url
    raise TypeError(
        f"expected the URL of a blob, a BlobInfo or a BlobRange, not {type(item).__name__}: "
        "put the reader behind a lister or a pipe of URLs"
    )


def pair_of(item: Any, wanted: str) -> tuple[Any, Any]:
    """The two halves of *item*.

    Raises:
        TypeError: it is no pair, with words for what was *wanted*.
    """
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    what = repr(item.partition("?")[0]) if isinstance(item, str) else type(item).__name__
    raise TypeError(f"expected {wanted}, not {what}")


# -- listing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listing:
    """What to list below one root.

    The root is a container, a folder (its URL ends in a slash, or is the name of a folder), a single blob (which
    wins over a folder of the same name), or else the beginning of names.

    *masks* are `fnmatch` patterns, of which a blob has to match one: on the last segment of its name, or on the whole
    name if the mask has a slash.
    """

    masks: tuple[str, ...] = ()
    recursive: bool = True

    @classmethod
    def of(cls, masks: str | Sequence[str], recursive: bool) -> Listing:
        """Check the arguments that users give.

        Raises:
            TypeError: a mask is no text.
        """
        chosen = (masks,) if isinstance(masks, str) else tuple(masks)
        for mask in chosen:
            if not isinstance(mask, str):
                raise TypeError(f"masks must be a str or a sequence of them, not of {type(mask).__name__}")
        return cls(tuple(filter(None, chosen)), bool(recursive))

    def blobs(self, access: Access, root: str | BlobURL) -> Iterator[BlobInfo]:
        """The blobs below *root* in the service's order (lexicographic), a page at a time.

        Raises:
            ResourceNotFoundError: nothing is there, or nothing matches the masks. (A container without any blob
                and no masks is empty, which is no error.)
        """
        url = parse_url(root, argument="root") if isinstance(root, str) else root
        if url.is_read_only:
            yield self._snapshot(access, url)
            return
        base = str(_container_of(url))
        accepts = self._matcher()
        has_any = is_one = False
        for page in self._pages(access.container(url), url.blob):
            if url.blob and not has_any and page.names[:1] == [url.blob] and not url.blob.endswith("/"):
                is_one = True
                page = Page(page.names[:1], page.sizes[:1], page.etags[:1], [], "")
            for name, size, etag in zip(page.names, page.sizes, page.etags, strict=True):
                if accepts(name):
                    has_any = True
                    yield BlobInfo(url_of_name(base, name), size, etag)
            if is_one:
                break
        if not has_any and (url.blob or self.masks):
            what = f"no blob below {url} matches {', '.join(map(repr, self.masks))}"
            raise _not_found(what if self.masks else f"there is no blob {url} and none below it")

    def _pages(self, container: ContainerClient, name: str) -> Iterator[Page]:
        delimiter = "" if self.recursive else "/"
        if not name or name.endswith("/"):
            yield from container.pages(prefix=name, delimiter=delimiter)
            return
        pages = container.pages(prefix=name, delimiter=delimiter)
        first = next(pages, None)
        # The shortest name comes first, so the blob itself, if it exists, heads the first page that has any.
        while first is not None and not first.names and not first.prefixes and first.marker:
            first = next(pages, None)
        if first is not None and first.names[:1] != [name]:
            folder = _drop_empty(container.pages(prefix=f"{name}/", delimiter=delimiter))
            page = next(folder, None)
            if page is not None:
                yield page
                yield from folder
                return
        if first is not None:
            yield first
            yield from pages

    def _snapshot(self, access: Access, url: BlobURL) -> BlobInfo:
        version = access.blob(url).version()
        if version is None:
            raise _not_found(f"there is no blob {plain_url(url)}")
        return BlobInfo(plain_url(url), version.size, version.etag)

    def _matcher(self) -> Callable[[str], bool]:
        if not self.masks:
            return lambda name: True  # noqa: ARG005
        whole = _one_of([mask for mask in self.masks if "/" in mask])
        last = _one_of([mask for mask in self.masks if "/" not in mask])
        return lambda name: whole(name) is not None or last(name.rpartition("/")[2]) is not None


def _one_of(masks: Sequence[str]) -> Callable[[str], re.Match[str] | None]:
    return re.compile("|".join(map(fnmatch.translate, masks)) or r"(?!)").match


def _drop_empty(pages: Iterator[Page]) -> Iterator[Page]:
    return (page for page in pages if page.names or page.prefixes)


def _container_of(url: BlobURL) -> BlobURL:
    return replace(url, blob="", snapshot=None, versionid=None)


def _not_found(what: str) -> ResourceNotFoundError:
    error = ResourceNotFoundError(message=what)
    error.status_code = 404
    return portable(error)


# -- reading -----------------------------------------------------------------------------------------------------------


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
    access: Access, items: Iterable[Item], *, depth: int, whole: bool = True
) -> OrderedPrefetch[Item, Fetched]:
    """The content of *items*, in order, fetched ahead within the memory limit of the configuration.

    An item whose size is known is fetched whole; of others, and of all blobs unless *whole*, the first part.
    """
    part = access.config.effective_part_size

    def cost(item: Item) -> int:
        if isinstance(item, BlobRange):
            return item.stop - item.start + lookahead(item.start, item.stop) if item.align else item.stop - item.start
        if isinstance(item, BlobInfo):
            return item.size if whole else min(item.size, part)
        return part

    def work(item: Item, scope: Scope) -> Fetched:
        client = access.blob(url_of(item))
        if isinstance(item, BlobRange):
            return Fetched(client, BlobVersion(item.size, item.etag), _fetch_range(client, item, scope), is_whole=True)
        fetched = _of_head(client, client.head(scope))
        if not fetched.is_whole and whole and isinstance(item, BlobInfo) and fetched.version.size <= item.size:
            data = _complete(client, fetched.version, fetched.data, scope)
            return Fetched(client, fetched.version, data, is_whole=True)
        return fetched

    def start(item: Item, scope: Scope, done: Callable[[Fetched], None], failed: Callable[[], None]) -> bool:
        if isinstance(item, BlobRange) or (whole and isinstance(item, BlobInfo) and item.size > part):
            return False
        client = access.blob(url_of(item))
        return client.start_head(scope, lambda head: done(_of_head(client, head)), failed)

    return OrderedPrefetch(
        engine_for(access.config),
        iter(items),
        work,
        cost=cost,
        size=lambda fetched: len(fetched.data),
        depth=depth,
        start=start,
    )


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


def split_ranges(item: Item, access: Access, chunk_size: int, align: bytes | int | None) -> Iterator[BlobRange]:
    """Cut the blob of *item* into ranges of about *chunk_size* bytes; see `BlobRange`.

    Raises:
        ResourceNotFoundError: there is no such blob.
        ValueError: its length is no multiple of the record length *align*.
    """
    url = parse_blob_url(url_of(item))
    if isinstance(item, BlobInfo):
        size, etag = item.size, item.etag
    else:
        version = access.blob(url).version()
        if version is None:
            raise _not_found(f"there is no blob {plain_url(url)}")
        size, etag = version.size, version.etag
    step = chunk_size
    if isinstance(align, int):
        if size % align:
            raise ValueError(
                f"{url} has {size} bytes, which is no multiple of the record length {align}: it is truncated, or "
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
