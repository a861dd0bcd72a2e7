"""Manifests: make, verify, and compare them. A manifest stores a listing, so that jobs do not list again.

.. code-block:: python

    from azstoragetorch.datasets import IterableBlobDataset
    from azstoragetorch.manifest import make_manifest

    container = "https://<account>.blob.core.windows.net/<container>"
    manifest = f"{container}/manifests/train"
    make_manifest(container, manifest, prefix="train/")
    dataset = IterableBlobDataset.from_manifest(
        manifest, shuffle=True, shard_by="rank_and_worker"
    )

A manifest has the name, size, and ETag of each blob, in the order of the names (by their UTF-8 bytes). It is a folder
with ``manifest.json`` and Parquet files, which other programs can read, too. It never changes: a blob that is added
later is not in it, and a blob that is overwritten later is reported when it is read.

This module needs pyarrow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Literal

from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.errors import picklable
from azstoragetorch._blob.url import BlobURL, parse_blob_url, parse_container_url, url_of_name
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.inventory import Inventory
from azstoragetorch._samples.items import BlobInfo
from azstoragetorch._samples.manifest import Manifest, folder_of_manifest, open_manifest, read_description
from azstoragetorch._samples.manifest_writer import Source, Writing, from_blobs, in_order, listed
from azstoragetorch._samples.names import InvalidNames, NameFilter, NameRules
from azstoragetorch._samples.rows import Columns, Description, Row
from azstoragetorch._samples.splitting import LATER_PAGES, LATER_PARTS, list_share
from azstoragetorch.exceptions import ManifestError

__all__ = [
    "ManifestChange",
    "ManifestComparison",
    "ManifestError",
    "ManifestInfo",
    "compare_manifest",
    "describe_manifest",
    "list_part",
    "make_manifest",
    "verify_manifest",
]


@dataclass(frozen=True)
class ManifestInfo:
    """What a manifest says about itself.

    Attributes:
        url: Its folder.
        container_url: The container that it lists.
        prefix: The beginning that all names have.
        made: When the listing began, in UTC, such as ``2026-11-27T12:00:00Z``.
        count: Number of blobs.
        size: Bytes of all blobs together.
        digest: Equal for manifests with the same names, sizes, and ETags; the fingerprint of a dataset of it.
    """

    url: str
    container_url: str
    prefix: str
    made: str
    count: int
    size: int
    digest: str


@dataclass(frozen=True)
class ManifestChange:
    """A blob that differs between a manifest and the container, or between two manifests.

    Attributes:
        kind: ``"added"`` (only in the second), ``"removed"`` (only in the first), or ``"changed"`` (another ETag).
        name: Name of the blob.
    """

    kind: Literal["added", "removed", "changed"]
    name: str


@dataclass(frozen=True)
class ManifestComparison:
    """How the container, or a second manifest, differs from a manifest.

    Attributes:
        added: Number of blobs that only the second has.
        removed: Number of blobs that only the first has.
        changed: Number of blobs with another ETag; with another size, where an ETag is not known.
        changes: The first of them, by name.
    """

    added: int
    removed: int
    changed: int
    changes: tuple[ManifestChange, ...]

    @property
    def is_equal(self) -> bool:
        """Whether both are the same."""
        return not (self.added or self.removed or self.changed)


def make_manifest(
    container_url: str,
    manifest_url: str,
    *,
    prefix: str | None = None,
    inventory_url: str | None = None,
    blobs: Iterable[BlobInfo] | None = None,
    overwrite: bool = False,
    invalid_names: InvalidNames = "skip",
    include_folder_markers: bool = False,
    progress: Callable[[int], object] | None = None,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> ManifestInfo:
    """List a container and store the result as a manifest.

    Memory is bounded, however many blobs there are. The manifest appears when it is complete; if listing or writing
    fails, nothing changes. Blobs of the manifest itself are not listed.

    Args:
        container_url: The container to list.
        manifest_url: The folder for the manifest. It can be in another container.
        prefix: Only blobs whose names begin with it; by default, all blobs.
        inventory_url: Do not list, but read this report of Blob Inventory: the URL of ``<rule>-manifest.json``. The
            report can be CSV or Parquet, of one container or of many. Its rule should include the field ``Etag``;
            without it, blobs that are overwritten later are not noticed. ``made`` is then when the report was started.
        blobs: Do not list, but take these, which were listed elsewhere, in any order: by `list_part` in many processes,
            for example. They are read once; *prefix* and the rules for names do not apply.
        overwrite: Replace a manifest. Jobs that still read the previous one then fail, so dated folders are better.
        invalid_names: Same as for :class:`azstoragetorch.datasets.BlobDataset`.
        include_folder_markers: Whether to list empty blobs whose names end in a slash.
        progress: Called with the number of blobs listed so far.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`, for both URLs.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ResourceExistsError: there is a manifest, and *overwrite* is False.
        ManifestError: the report is truncated, damaged, or limited to other blobs.
        ValueError: a URL is not valid.
        AzureError: the service refused the request, or could not be reached.
    """
    _need_pyarrow()
    root, folder = parse_container_url(container_url), folder_of_manifest(manifest_url)
    rules = NameRules.of(invalid_names, include_folder_markers)
    clients = ClientFactory(credential, transfer, folder)
    writing = Writing(clients.container(folder), folder, progress or (lambda _count: None))
    description = Description(str(root), prefix or "", _now(), 0, ())
    if inventory_url is not None:
        source, started = _from_inventory(inventory_url, root, prefix or "", rules, credential, transfer)
        return _write(writing, source, replace(description, made=started), overwrite=overwrite)
    if blobs is not None:
        rows = from_blobs(blobs, root)
        return _write(writing, lambda: rows, description, overwrite=overwrite, is_sorted=False)
    container = ClientFactory(credential, transfer, root).container(root)
    own = folder.blob if (folder.account_url, folder.container) == (root.account_url, root.container) else ""
    return _write(writing, lambda: listed(container, prefix or "", rules, own), description, overwrite=overwrite)


def _from_inventory(
    url: str, root: BlobURL, prefix: str, rules: NameRules, credential: Credential, transfer: TransferConfig | None
) -> tuple[Source, str]:
    """What a report of Blob Inventory lists of the container *root*, and when it was started."""
    document = parse_blob_url(url)
    clients = ClientFactory(credential, transfer, document)
    inventory = Inventory.open(clients.blob(document))
    if not inventory.covers(root.container, prefix):
        raise ManifestError(
            f"{document}: the report is limited to {', '.join(inventory.prefixes)}, and does not have all blobs of "
            f"{root.container}/{prefix}"
        )
    if not inventory.has_etags:
        warnings.warn(
            f"{document}: the report has no Etag, so readers of the manifest do not notice blobs that are overwritten",
            UserWarning,
            stacklevel=3,
        )
    return lambda: inventory.pages(clients, root, prefix, rules), inventory.started


def _write(
    writing: Writing, source: Source, description: Description, *, overwrite: bool, is_sorted: bool = True
) -> ManifestInfo:
    try:
        before: Description | None = read_description(writing.home, writing.folder)
    except ResourceNotFoundError:
        before = None
    except ManifestError:
        if not overwrite:
            raise
        before = None
    if before is not None and not overwrite:
        raise picklable(
            ResourceExistsError(f"there is a manifest at {writing.folder}, made at {before.made}: pass overwrite=True")
        )
    complete = writing.write(source, description, create_only=not overwrite, is_sorted=is_sorted)
    writing.forget(complete, before)
    return _info(str(writing.folder), complete)


def list_part(
    container_url: str,
    prefix: str = "",
    *,
    at_most: int = LATER_PAGES,
    into: int = LATER_PARTS,
    invalid_names: InvalidNames = "skip",
    include_folder_markers: bool = False,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> Iterator[list[BlobInfo] | str]:
    """List a part of a container, and hand out parts of it, for an engine that runs many tasks.

    Yields lists of blobs, one for each response of the service, and prefixes: what begins with such a prefix is not
    listed here, and another task has to list it by the same function. Together, the tasks list each blob once.
    Folders divide a listing: the blobs that are directly in one folder are listed by one task.

    Start with the whole container and small numbers, such as ``at_most=2, into=256``, to get enough parts soon.

    Args:
        container_url: The container.
        prefix: The part: all blobs whose names begin with it.
        at_most: Responses (5,000 names each) after which the rest is divided.
        into: Approximate number of parts to divide the rest into.
        invalid_names: Same as for :class:`azstoragetorch.datasets.BlobDataset`.
        include_folder_markers: Whether to list empty blobs whose names end in a slash.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ValueError: the URL is not that of a container, or a number is below 1.
        AzureError: the service refused the request, or could not be reached.
    """
    for name, value in (("at_most", at_most), ("into", into)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    root = parse_container_url(container_url)
    container = ClientFactory(credential, transfer, root).container(root)
    names_filter = NameFilter(root, NameRules.of(invalid_names, include_folder_markers))
    base = str(root)
    for item in list_share(
        lambda prefix, delimiter: container.pages(prefix=prefix, delimiter=delimiter),
        prefix,
        at_most=at_most,
        into=into,
    ):
        if isinstance(item, str):
            yield item
            continue
        columns = names_filter.keep(item.names, item.sizes, item.etags)
        yield [BlobInfo(url_of_name(base, name), size, etag) for name, size, etag in zip(*columns, strict=True)]
    names_filter.warn()


def describe_manifest(
    manifest_url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> ManifestInfo:
    """What a manifest says about itself. One request; needs no pyarrow.

    Raises:
        ResourceNotFoundError: the manifest does not exist.
        ManifestError: it is truncated or damaged.
    """
    folder = folder_of_manifest(manifest_url)
    description = read_description(ClientFactory(credential, transfer, folder).container(folder), folder)
    return _info(str(folder), description)


def verify_manifest(
    manifest_url: str,
    *,
    container_url: str | None = None,
    progress: Callable[[int], object] | None = None,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> ManifestInfo:
    """Read all of a manifest and check it: lengths, digests, the order of names. Does not list the container.

    Args:
        manifest_url: The folder of the manifest.
        container_url: The container that it must list.
        progress: Called with the number of rows read so far.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ManifestError: it is truncated, damaged, lists a name twice, or lists another container. The message says which.
        AzureError: the service refused the request, or could not be reached.
    """
    _need_pyarrow()
    manifest = open_manifest(manifest_url, container_url=container_url, credential=credential, transfer=transfer)
    for count, _ in enumerate(manifest.rows(), 1):  # each part is checked when it is read
        if progress is not None and not count % 10_000:
            progress(count)
    return _info(str(manifest.folder), manifest.description)


def compare_manifest(
    manifest_url: str,
    other_url: str | None = None,
    *,
    at_most: int = 1000,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> ManifestComparison:
    """Compare a manifest with its container as it is now, or with a second manifest.

    Args:
        manifest_url: The folder of the manifest.
        other_url: The folder of the second manifest; by default, the container is listed.
        at_most: How many changes to return; all are counted.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ManifestError: a manifest is truncated or damaged, or the two list different containers.
        AzureError: the service refused the request, or could not be reached.
    """
    _need_pyarrow()
    manifest = open_manifest(manifest_url, credential=credential, transfer=transfer)
    if other_url is None:
        return in_order(_listing_of(manifest), lambda pages: _compare(manifest.rows(), _rows(pages), at_most))
    other = open_manifest(other_url, credential=credential, transfer=transfer)
    if str(manifest.data.url) != str(other.data.url):
        raise ManifestError(
            f"{other.folder}: the manifest is of another container: {other.data.url}, not {manifest.data.url}"
        )
    return _compare(manifest.rows(), other.rows(), at_most)


def _listing_of(manifest: Manifest) -> Source:
    """Lists what *manifest* was made from, by the same rules."""
    folder, url = manifest.folder, manifest.data.url
    own = folder.blob if (folder.account_url, folder.container) == (url.account_url, url.container) else ""
    return lambda: listed(manifest.data, manifest.description.prefix, NameRules(), own)


def _rows(pages: Iterator[Columns]) -> Iterator[Row]:
    return (row for columns in pages for row in map(Row, *columns))


def _compare(before: Iterator[Row], after: Iterator[Row], at_most: int) -> ManifestComparison:
    """Walk along both, which are in order."""
    counts = {"added": 0, "removed": 0, "changed": 0}
    changes: list[ManifestChange] = []
    old, new = next(before, None), next(after, None)
    while old is not None or new is not None:
        kind: Literal["added", "removed", "changed"] | None = None
        if old is None or (new is not None and new.name < old.name):
            assert new is not None
            kind, name, new = "added", new.name, next(after, None)
        elif new is None or old.name < new.name:
            kind, name, old = "removed", old.name, next(before, None)
        else:
            is_known = old.etag is not None and new.etag is not None
            if old.etag != new.etag if is_known else old.size != new.size:
                kind = "changed"
            name, old, new = old.name, next(before, None), next(after, None)
        if kind is not None:
            counts[kind] += 1
            if len(changes) < at_most:
                changes.append(ManifestChange(kind, name))
    return ManifestComparison(counts["added"], counts["removed"], counts["changed"], tuple(changes))


def _info(url: str, description: Description) -> ManifestInfo:
    return ManifestInfo(
        url,
        description.container,
        description.prefix,
        description.made,
        description.rows,
        description.total,
        description.digest,
    )


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _need_pyarrow() -> None:
    """Raise ImportError now, and not after an hour of listing."""
    import azstoragetorch._samples.parquet  # noqa: F401
