"""Pipes that list the blobs below a container, a folder, or a prefix of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.items import BlobInfo
from azstoragetorch._samples.manifest import IfChanged, ManifestSource, check_if_changed
from azstoragetorch._samples.names import InvalidNames
from azstoragetorch._samples.sources import Listing
from azstoragetorch.datapipes._base import IterDataPipe, functional_datapipe


class _Roots:
    """Roots, parsed. Not a collection: traversing a graph of pipes pickles every collection that it meets."""

    def __init__(self, urls: Iterable[str]) -> None:
        self.urls: tuple[BlobURL, ...] = tuple(parse_url(url, argument="source") for url in urls)


class _Lister(IterDataPipe[Any]):
    def __init__(
        self,
        source: str | Sequence[str] | IterDataPipe[str],
        masks: str | Sequence[str] = "",
        *,
        recursive: bool = True,
        invalid_names: InvalidNames = "skip",
        include_folder_markers: bool = False,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        self.source_datapipe = source if isinstance(source, IterDataPipe) else None
        if self.source_datapipe is None:
            self._roots = _Roots([source] if isinstance(source, str) else source)
        self._listing = Listing.of(masks, recursive, invalid_names, include_folder_markers)
        self._clients = ClientFactory(credential, transfer, self._roots.urls[0] if isinstance(source, str) else None)

    def _blobs(self) -> Iterator[BlobInfo]:
        roots: Iterable[str | BlobURL] = self._roots.urls if self.source_datapipe is None else self.source_datapipe
        for root in roots:
            yield from self._listing.blobs(self._clients, root)


@functional_datapipe("list_files_by_azure")
class AzureBlobFileListerIterDataPipe(_Lister):
    """Yields the URLs of blobs, lexicographically by root, a page of the listing at a time.

    Each root is a container, a folder, a single blob, or a prefix of names. If there is a blob of exactly that name,
    only that blob is yielded; otherwise, if there is a folder of that name, its blobs; otherwise, all blobs whose names
    have that prefix. A trailing slash always means the folder. Directory markers are skipped.

    The URLs contain no SAS. A SAS in a root is used for listing only: pass ``credential=AzureSasCredential(...)`` to
    the pipes that follow.

    A lister does not shard: use `sharding_filter` or `shard_blobs` after it. Every worker lists separately, so do not
    add blobs below the root during an epoch.

    Args:
        source: One root, several roots, or a pipe of roots.
        masks: Case-sensitive `fnmatch` patterns, one of which must match the last segment of the blob's name, or the
            whole name (without the container) if the pattern has a slash. Empty: all blobs.
        recursive: False lists one level only.
        invalid_names: What to do with a listed blob whose name cannot be requested, such as ``a/../b``: ``"skip"`` it,
            with one warning at the end of the listing, or ``"raise"`` a ValueError.
        include_folder_markers: Whether to yield empty blobs whose names end in a slash, which tools create as folders.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Iterating raises ``ResourceNotFoundError`` if a root has no blobs, or none that match; only an empty container
    yields nothing. The length is not known in advance: ``len()`` raises TypeError.
    """

    def __iter__(self) -> Iterator[str]:
        for blob in self._blobs():
            yield blob.url


@functional_datapipe("list_blobs_by_azure")
class AzureBlobInfoListerIterDataPipe(_Lister):
    """Yields a :class:`BlobInfo` ``(url, size, etag)`` for each blob.

    Otherwise, it is like :class:`AzureBlobFileLister`. Use it to select blobs by size before they are read. Readers
    after it know how much memory a blob needs, and fetch more blobs at once.
    """

    def __iter__(self) -> Iterator[BlobInfo]:
        yield from self._blobs()


@functional_datapipe("list_manifest_by_azure")
class AzureBlobManifestListerIterDataPipe(IterDataPipe[BlobInfo]):
    """Yields the blobs that a manifest lists, in the order of its rows, without listing the container.

    Rows are read 65,536 at a time, with the next ones in flight. Each is a :class:`ManifestBlob`, which readers accept
    like a :class:`BlobInfo`: they raise ``BlobChangedError`` if the blob was overwritten after the manifest was made.
    A pipe that maps it to a URL gives up that check. Needs pyarrow.

    The URLs contain no SAS: pass ``credential=AzureSasCredential(...)`` to the pipes that follow.

    Args:
        manifest_url: The folder of the manifest; see :func:`azstoragetorch.manifest.make_manifest`.
        container_url: The container that the manifest must list; required if it is in another account.
        if_changed: ``"raise"``, or ``"read"`` to yield :class:`BlobInfo`, whose blobs are read as they are now.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Iterating, and ``len()``, raise ``ManifestError`` if the manifest is truncated, damaged, or of another container,
    and ``ResourceNotFoundError`` if there is none.
    """

    def __init__(
        self,
        manifest_url: str,
        *,
        container_url: str | None = None,
        if_changed: IfChanged = "raise",
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        self.if_changed = check_if_changed(if_changed)
        self._source = ManifestSource(
            manifest_url, container_url=container_url, credential=credential, transfer=transfer
        )

    def __iter__(self) -> Iterator[BlobInfo]:
        yield from self._source.open().blobs(0, self.if_changed)

    def __len__(self) -> int:
        return len(self._source.open())
