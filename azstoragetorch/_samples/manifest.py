"""Read a manifest lazily: one small document, then the parts that have the rows that are asked for.

What a process keeps is bounded: some parts that were used last, and, in a shuffled order, the rows of its
share, which it collects in one pass over the parts. Rows are numbered from 0 in the order of their names.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, BlobVersion, ClientFactory, ContainerClient
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.errors import not_found
from azstoragetorch._blob.url import BlobURL, parse_container_url, parse_url, url_of_name, why_refused
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._samples.catalog import Catalog
from azstoragetorch._samples.expected import ExpectedBlobClient
from azstoragetorch._samples.items import BlobInfo, ManifestBlob
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch._samples.rows import DOCUMENT, Description, Part, Row, check_ascends
from azstoragetorch.exceptions import ManifestError

if TYPE_CHECKING:
    from azstoragetorch._samples.parquet import PartRows

IfChanged: TypeAlias = Literal["raise", "read"]
"""What to do about a blob that was overwritten after the manifest was made."""

_KEPT = 16 * MiB  # bytes of parts in memory: about 250,000 rows
_COLLECTED = 2_000_000  # rows of a shuffled share at once: about 150 MB
_PARTS_AT_ONCE = 4


class Manifest:
    """A manifest that was opened. Pickles without the parts that were read.

    Args:
        folder: Where it is.
        home: The container that the folder is in.
        description: What its document says.
        data: The container that it lists.
    """

    def __init__(self, folder: BlobURL, home: ContainerClient, description: Description, data: ContainerClient) -> None:
        self.folder = folder
        self.description = description
        self.data = data
        self._home = home
        self._parts: dict[int, PartRows] = {}  # the least recently used comes first
        self._ends: dict[int, tuple[str, str]] = {}  # the first and last name of each part that was read

    def __len__(self) -> int:
        return self.description.rows

    def row(self, index: int) -> Row:
        """One row. Reads its part, unless that was used recently.

        Raises:
            ManifestError: the part is truncated, damaged, or missing.
            AzureError: the service refused the request, or could not be reached.
        """
        number, place = self.description.locate(index)
        return self._part(number).row(place)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from *start* on, a part at a time, with the next parts in flight. Errors are those of `row`."""
        if start >= len(self):
            return
        first, place = self.description.locate(start)
        for part in self._parts_ahead(range(first, len(self.description.parts))):
            yield from part.rows(place)
            place = 0

    def blobs(self, start: int, if_changed: IfChanged) -> Iterator[BlobInfo]:
        """All blobs from row *start* on, as items of pipes and nodes. Errors are those of `row`.

        Raises:
            ManifestError: a name cannot be requested.
        """
        base = str(self.data.url)
        for row in self.rows(start):
            if (reason := why_refused(row.name)) is not None:
                raise ManifestError(f"{self.folder}: the blob name {row.name[:200]!r} {reason}")
            kind = BlobInfo if row.etag is None or if_changed == "read" else ManifestBlob
            yield kind(url_of_name(base, row.name), row.size, row.etag or "")

    def look_up(self, plan: Iterable[tuple[int, int]], *, is_shuffled: bool) -> Iterator[tuple[int, Row]]:
        """The rows of a plan of (place, row number), with their places, which follow one another.

        If that is not about the order of the rows, they are collected: each part is read once for
        some million rows. Otherwise each part is read when its first row is needed.
        """
        if not is_shuffled:
            for place, index in plan:
                yield place, self.row(index)
            return
        from azstoragetorch._samples.parquet import ranks_of

        plan = iter(plan)
        while found := next(plan, None):
            first, index = found
            indices = array("Q", [index])
            indices.extend(index for _, index in islice(plan, _COLLECTED - 1))
            ordered, ranks = ranks_of(indices)
            wanted = self._by_part(ordered)
            del indices, ordered  # what is left is 2 bytes a row
            catalog = self._collect(wanted)
            for place, rank in enumerate(ranks, first):
                etag = catalog.etag(rank)
                yield place, Row(catalog.name(rank), catalog.size(rank) or 0, None if etag == _UNKNOWN else etag)

    def _by_part(self, ordered: array[int]) -> dict[int, array[int]]:
        """The rows with these numbers, which ascend, as places in their parts."""
        ends = self.description.ends
        wanted = {}
        start = 0
        while start < len(ordered):
            number = self.description.locate(ordered[start])[0]
            stop = bisect_left(ordered, ends[number], lo=start)
            base = ends[number] - self.description.parts[number].rows
            wanted[number] = array("H", (index - base for index in ordered[start:stop]))
            start = stop
        return wanted

    def _collect(self, wanted: dict[int, array[int]]) -> Catalog:
        """The rows at some places in their parts."""
        catalog = Catalog()
        for places, part in zip(wanted.values(), self._parts_ahead(wanted), strict=True):
            names, sizes, etags = part.take(places)
            catalog.append_listed(names, sizes, [etag or _UNKNOWN for etag in etags])
        return catalog

    def client(self, row: Row) -> BlobClient:
        """The blob of a row.

        Raises:
            ValueError: its name cannot be requested.
        """
        return self.data.at(self.data.url.with_blob(row.name))

    def checked(self, client: BlobClient, row: Row, if_changed: IfChanged) -> BlobClient:
        """*client*, which reads only the version that is listed, unless changes do not matter."""
        if row.etag is None or if_changed == "read":
            return client
        return ExpectedBlobClient(client, BlobVersion(row.size, row.etag), self.description.made)

    def _part(self, number: int) -> PartRows:
        part = self._parts.pop(number, None)
        return self._keep(number, self._decode(number, self._fetch(number)) if part is None else part)

    def _keep(self, number: int, part: PartRows) -> PartRows:
        self._parts[number] = part
        for oldest in list(self._parts)[:-1]:
            if sum(kept.nbytes for kept in list(self._parts.values())) <= _KEPT:
                break
            self._parts.pop(oldest, None)
        return part

    def _parts_ahead(self, numbers: Iterable[int]) -> Iterator[PartRows]:
        """The parts with these numbers. Files are fetched ahead, and decoded here.

        Decoding on the threads that fetch would take some ten times the memory, since Arrow's allocator keeps memory
        for each thread. And processes that share a machine keep its cores busy without.
        """
        parts = self.description.parts
        ahead = OrderedPrefetch(
            self._home.engine,
            iter(numbers),
            lambda number, scope: b"" if number in self._parts else self._fetch(number, scope),
            cost=lambda number: parts[number].size,
            size=len,
            depth=_PARTS_AT_ONCE,
            is_eager=True,
        )
        try:
            for work in ahead:
                number, data = work.item, work.result()
                part = self._parts.pop(number, None)
                if part is None:
                    part = self._decode(number, data or self._fetch(number))
                if part.nbytes * len(parts) <= _KEPT:  # else this pass would evict each before it is used again
                    self._keep(number, part)
                yield part
        finally:
            ahead.close()

    def _fetch(self, number: int, scope: Scope | None = None) -> bytes:
        if scope is not None:
            scope.check()
        return read_part(self._home, self.folder, self.description.parts[number])

    def _decode(self, number: int, data: bytes) -> PartRows:
        from azstoragetorch._samples.parquet import decode

        part = self.description.parts[number]
        rows = decode(data, rows=part.rows, digest=part.digest, where=f"{self.folder}{part.name}")
        ends = self._ends[number] = rows.row(0).name, rows.row(len(rows) - 1).name
        if before := self._ends.get(number - 1):
            check_ascends(str(self.folder), before[1], ends[0])
        if after := self._ends.get(number + 1):
            check_ascends(str(self.folder), ends[1], after[0])
        return rows

    def __repr__(self) -> str:
        return f"Manifest({str(self.folder)!r}, {len(self):,} blobs of {self.description.container})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}, "_ends": {}}


_UNKNOWN = '""'  # the ETag of a row that has none, in a catalog


def read_part(home: ContainerClient, folder: BlobURL, part: Part) -> bytes:
    """The file of a part.

    Raises:
        ManifestError: it is missing, or has another length than it should.
    """
    client = home.at(folder.with_blob(f"{folder.blob}{part.name}"))
    where = str(client.url)
    try:
        data, _ = client.read()
    except ResourceNotFoundError as error:
        raise ManifestError(
            f"{where}: this part of the manifest is missing: it was deleted, or the manifest was made again meanwhile"
        ) from error
    if len(data) != part.size:
        raise ManifestError(f"{where}: the part is truncated: it has {len(data)} bytes, and should have {part.size}")
    return data


def folder_of_manifest(url: str | BlobURL) -> BlobURL:
    """The folder of the manifest at *url*, with its slash: *url* names it, or its document.

    Raises:
        ValueError: *url* is not the URL of a folder.
    """
    parsed = parse_url(url) if isinstance(url, str) else url
    name = parsed.blob.removesuffix(DOCUMENT) if parsed.blob.rpartition("/")[2] == DOCUMENT else parsed.blob
    if name.endswith(f"-{DOCUMENT}"):
        raise ValueError(
            f"url: {parsed} is a report of Blob Inventory: make a manifest of it, with make_manifest(..., "
            "inventory_url=) or `azstoragetorch manifest make --inventory`"
        )
    name = name if name.endswith("/") or not name else f"{name}/"
    if not name or parsed.is_read_only:
        raise ValueError(f"url: a manifest is a folder in a container, such as {parsed}/manifests/train, not {parsed}")
    return replace(parsed, blob=name)


class ManifestSource:
    """A manifest that can be opened, in this process or another one. No I/O.

    *container_url* is the container that it must list; without it, that must be in the account of the manifest.

    Raises:
        ValueError: *url* is not the URL of a folder.
    """

    def __init__(
        self,
        url: str,
        *,
        container_url: str | None = None,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        self.folder = folder_of_manifest(url)
        self._expected = None if container_url is None else parse_container_url(container_url)
        self._clients = ClientFactory(credential, transfer, self.folder)
        if self._expected is not None:
            CredentialHolder(credential, trusted_url=self._expected)  # the user named this host, too

    def open(self) -> Manifest:
        """Open it. One request.

        Raises:
            ResourceNotFoundError: the manifest does not exist.
            ManifestError: it is truncated, or lists another container.
        """
        home = self._clients.container(self.folder)
        description = read_description(home, self.folder)
        root = _root_of(description, self.folder, self._expected)
        return Manifest(self.folder, home, description, self._clients.container(root))


def open_manifest(
    url: str,
    *,
    container_url: str | None = None,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> Manifest:
    """Open the manifest at *url*; see `ManifestSource`."""
    return ManifestSource(url, container_url=container_url, credential=credential, transfer=transfer).open()


def read_description(home: ContainerClient, folder: BlobURL) -> Description:
    """The document of the manifest in *folder*.

    Raises:
        ResourceNotFoundError: the manifest does not exist.
        ManifestError: it is truncated or damaged.
    """
    client = home.at(folder.with_blob(folder.blob + DOCUMENT))
    try:
        data, _ = client.read()
    except ResourceNotFoundError as error:
        raise not_found(
            f"there is no manifest at {folder} (no {DOCUMENT} in it): `azstoragetorch manifest make` makes one"
        ) from error
    return Description.from_bytes(data, str(client.url))


def _root_of(description: Description, folder: BlobURL, expected: BlobURL | None) -> BlobURL:
    """The container that a manifest lists, which may be read with the credential of the user.

    The document comes from the network. So its container counts only if it is in the account that the user named.
    """
    try:
        listed = parse_container_url(description.container)
    except ValueError as error:
        raise ManifestError(f"{folder}: the manifest is damaged: {error}") from error
    if listed.sas is not None:
        raise ManifestError(f"{folder}: the manifest is damaged: it has a SAS")
    if expected is not None:
        if not _is_same_container(listed, expected):
            raise ManifestError(f"{folder}: the manifest is of another container: {listed}, not {expected}")
        return expected
    if listed.account_url != folder.account_url:
        raise ManifestError(
            f"{folder}: the manifest lists {listed}, which is in another account: pass container_url={str(listed)!r} "
            "if you trust it with your credential"
        )
    return replace(listed, sas=folder.sas if listed.container == folder.container else None)


def _is_same_container(one: BlobURL, other: BlobURL) -> bool:
    # One account has several hosts: private endpoints, secondary and regional ones.
    is_same_account = one.account_url == other.account_url or one.account_name == other.account_name != ""
    return is_same_account and one.container == other.container


def check_if_changed(if_changed: Any) -> IfChanged:
    """Check the argument of a user.

    Raises:
        ValueError: it is unknown.
    """
    if if_changed not in ("raise", "read"):
        raise ValueError(f"if_changed must be 'raise' or 'read', not {if_changed!r}")
    return if_changed  # type: ignore[no-any-return]
