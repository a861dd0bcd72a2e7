"""The map-style dataset: fetches batches concurrently, and ahead if the sampler's next batch can be predicted."""

from __future__ import annotations

import operator
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch.utils.data
from typing_extensions import Unpack

from azstoragetorch._blob.client import Head
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_container_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.manifest import IfChanged
from azstoragetorch._samples.names import InvalidNames, NameRules
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch.datasets._blobs import Blob, BlobSample, apply, check_transform
from azstoragetorch.datasets._contents import (
    CACHE_BYTES,
    Contents,
    ListingInfo,
    ListingProgress,
    Planned,
    open_contents,
)
from azstoragetorch.datasets._options import ListOptions, ManifestOptions, ReadOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_TELLING = 4  # neighbours in a batch that make it likely that the next one follows


class BlobDataset(torch.utils.data.Dataset[T_co]):
    """Map-style dataset: ``dataset[i]`` is the i-th blob. Create one with `from_container_url`,
    `from_blob_urls`, or `from_manifest`.

    DataLoader hands a whole batch to the dataset, which fetches its blobs concurrently. When batches follow one
    another at a constant distance, as with ``shuffle=False``, the next ones are fetched ahead too, bounded by
    ``transfer.max_connections`` and ``transfer.memory_limit``. Data that a transform does not read is not fetched.

    Without a transform, a sample is ``{"url": str, "data": bytes}``.

    The listing is made once and is part of the dataset: a million blobs take about 80 MB, which forked workers share. A
    dataset can be pickled. Only worker processes receive a SAS or account key: if a dataset with one was loaded from a
    file, create it again with its credential.
    """

    def __init__(self, contents: Contents, transform: Callable[[Blob], T_co] | None) -> None:
        check_transform(transform)
        self._contents = contents
        self._transform = transform
        contents.list_now()
        self._ahead = _Batches(contents, transform)

    @overload
    @classmethod
    def from_blob_urls(
        cls, blob_urls: str | Iterable[str], *, transform: None = None, **options: Unpack[ReadOptions]
    ) -> BlobDataset[BlobSample]: ...
    @overload
    @classmethod
    def from_blob_urls(
        cls, blob_urls: str | Iterable[str], *, transform: Callable[[Blob], T], **options: Unpack[ReadOptions]
    ) -> BlobDataset[T]: ...
    @classmethod
    def from_blob_urls(
        cls,
        blob_urls: str | Iterable[str],
        *,
        credential: Credential = None,
        transform: Callable[[Blob], Any] | None = None,
        transfer: TransferConfig | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> BlobDataset[Any]:
        """Create a dataset of the blobs at the given URLs, in their order.

        Args:
            blob_urls: One URL or an iterable of URLs, which is read once. A SAS, ``snapshot`` or ``versionid`` in a URL
                is respected.
            credential: Same as for `azstoragetorch.io.BlobIO`. A SAS in a URL takes precedence.
            transform: Turns a `Blob` into a sample; called in the process that requests the sample.
            transfer: Transfer settings; their ``memory_limit`` bounds what is fetched ahead.
            cache_dir: Keep blobs in this folder, and read them from there the next time. Any number of processes can
                share it. Blobs larger than ``transfer.part_size`` are kept if one ``read()`` reads them from beginning
                to end. Without a listing, each cache lookup makes a request for the version of the blob.
            cache_bytes: The maximum size of the folder, by default 100 GiB; the least recently used blobs are evicted.

        Raises:
            ValueError: a URL is not the URL of a blob, or an option is out of range.
            TypeError: an argument has the wrong type.
        """
        contents = Contents(
            urls=blob_urls, credential=credential, transfer=transfer, cache_dir=cache_dir, cache_bytes=cache_bytes
        )
        return cls(contents, transform)

    @overload
    @classmethod
    def from_container_url(
        cls, container_url: str, *, transform: None = None, **options: Unpack[ListOptions]
    ) -> BlobDataset[BlobSample]: ...
    @overload
    @classmethod
    def from_container_url(
        cls, container_url: str, *, transform: Callable[[Blob], T], **options: Unpack[ListOptions]
    ) -> BlobDataset[T]: ...
    @classmethod
    def from_container_url(
        cls,
        container_url: str,
        *,
        prefix: str | None = None,
        credential: Credential = None,
        transform: Callable[[Blob], Any] | None = None,
        transfer: TransferConfig | None = None,
        progress: ListingProgress | None = None,
        invalid_names: InvalidNames = "skip",
        include_folder_markers: bool = False,
        share_listing: bool = False,
        group: ProcessGroup | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> BlobDataset[Any]:
        """Create a dataset of the blobs in a container, which is listed now.

        Directory markers of hierarchical accounts are not samples. An empty listing results in an empty dataset and a
        warning.

        Args:
            container_url: URL of the container; a SAS in it is respected.
            prefix: Only blobs whose names begin with it; by default, all blobs.
            credential: Same as for `from_blob_urls`.
            transform: Same as for `from_blob_urls`.
            transfer: Same as for `from_blob_urls`.
            progress: Called with the number of blobs listed so far, after every response of the service.
            invalid_names: What to do with a listed blob whose name cannot be requested, such as ``a/../b``: ``"skip"``
                it (the default), with one warning that counts them, or ``"raise"`` a ValueError.
            include_folder_markers: Whether empty blobs whose names end in a slash, which tools create as folders, are
                samples; by default, they are not.
            share_listing: Whether rank 0 of a job lists, and all others receive what it found; by default, each lists.
                Collective: every rank of the group has to create the dataset. An error of rank 0 is raised on all
                ranks; if rank 0 dies, the process group ends the waiting, at the latest with its timeout.
            group: The process group whose rank 0 lists; by default, all ranks.
            cache_dir: Same as for `from_blob_urls`, except that the listing has the versions.
            cache_bytes: Same as for `from_blob_urls`.

        Raises:
            ValueError: the URL is not the URL of a container, or an option is out of range.
            TypeError: an argument has the wrong type.
            AzureError: the service refused the request, or could not be reached.
        """
        contents = Contents(
            container=parse_container_url(container_url),
            prefix=prefix,
            credential=credential,
            transfer=transfer,
            progress=progress,
            rules=NameRules.of(invalid_names, include_folder_markers),
            is_shared=share_listing,
            group=group,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
        )
        return cls(contents, transform)

    @overload
    @classmethod
    def from_manifest(
        cls, manifest_url: str, *, transform: None = None, **options: Unpack[ManifestOptions]
    ) -> BlobDataset[BlobSample]: ...
    @overload
    @classmethod
    def from_manifest(
        cls, manifest_url: str, *, transform: Callable[[Blob], T], **options: Unpack[ManifestOptions]
    ) -> BlobDataset[T]: ...
    @classmethod
    def from_manifest(
        cls,
        manifest_url: str,
        *,
        container_url: str | None = None,
        if_changed: IfChanged = "raise",
        credential: Credential = None,
        transform: Callable[[Blob], Any] | None = None,
        transfer: TransferConfig | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> BlobDataset[Any]:
        """Create a dataset of the blobs that a manifest lists. Takes one request, and does not list the container.

        Rows of the manifest are read when they are needed, 65,536 at once, and about 250,000 are kept. If a sampler
        shuffles more rows than that, most samples read such a part again: use
        `IterableBlobDataset.from_manifest` with ``shuffle=True``. Needs pyarrow.

        Args:
            manifest_url: The folder of the manifest; see :func:`azstoragetorch.manifest.make_manifest`.
            container_url: The container that the manifest must list. Required if that is in another account than the
                manifest, so that a manifest cannot choose where the credential is sent.
            if_changed: What to do about a blob that was overwritten after the manifest was made: ``"raise"``
                ``BlobChangedError`` when it is read (the default), or ``"read"`` it as it is now.
            credential: Same as for `from_blob_urls`. Used for the manifest and the blobs.
            transform: Same as for `from_blob_urls`.
            transfer: Same as for `from_blob_urls`.
            cache_dir: Same as for `from_container_url`.
            cache_bytes: Same as for `from_blob_urls`.

        Raises:
            ResourceNotFoundError: the manifest does not exist.
            ManifestError: it is truncated, or lists another container.
            ValueError: a URL is not valid, or an option is out of range.
            AzureError: the service refused the request, or could not be reached.
        """
        contents = open_contents(
            manifest_url,
            container_url=container_url,
            if_changed=if_changed,
            credential=credential,
            transfer=transfer,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
        )
        return cls(contents, transform)

    @property
    def metadata(self) -> ListingInfo:
        """Count, bytes, and fingerprint of the blobs in the dataset."""
        return self._contents.info

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, index: int) -> T_co:
        """The sample of the *index*-th blob; negative indices count from the end.

        Raises:
            IndexError: there is no such blob.
            AzureError: the service refused the request, or could not be reached.
        """
        return apply(self._transform, self._contents.alone(_position(index, len(self))))

    def __getitems__(self, indices: Sequence[int]) -> list[T_co]:
        """The samples of a batch, in its order, fetched concurrently. DataLoader calls this."""
        length = len(self)
        return self._ahead.samples([_position(index, length) for index in indices])

    def __repr__(self) -> str:
        return f"BlobDataset({self._contents.description})"


def _position(index: int, length: int) -> int:
    position = operator.index(index)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range for a dataset of {length} blobs")
    return position + length if position < 0 else position


class _Batches(Generic[T_co]):
    """Batches of a map-style dataset, read ahead as long as they come as foreseen. Pickles as new.

    A call takes the latest `_Foresight` out and puts it back at its end. So a call from within another (a transform
    that mixes samples, a signal handler, another thread) finds none, makes one, and neither waits nor disturbs. One
    that an interrupt loses costs what was read ahead.
    """

    def __init__(self, contents: Contents, transform: Callable[[Blob], T_co] | None) -> None:
        self._contents = contents
        self._transform = transform
        self._idle: deque[_Foresight] = deque()

    def samples(self, indices: list[int]) -> list[T_co]:
        """The samples of one batch."""
        foresight = _pop(self._idle) or _Foresight()
        stream = foresight.stream_for(indices, self._contents, is_eager=self._transform is None)
        is_good = False
        try:
            samples = [apply(self._transform, work.item.blob, work.result) for work in islice(stream, len(indices))]
            is_good = True
            return samples
        finally:
            if not is_good or not foresight.foreseen:
                foresight.drop()
            while other := _pop(self._idle):  # of a call from within this one
                other.drop()
            self._idle.append(foresight)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Batches, (self._contents, self._transform)


class _Foresight:
    """Which batch is likely to come next, and the reads of it and of those after it."""

    def __init__(self) -> None:
        self.foreseen: list[int] = []
        self._previous: list[int] = []
        self._step = 0
        self._stream: OrderedPrefetch[Planned, Head] | None = None

    def stream_for(self, batch: list[int], contents: Contents, *, is_eager: bool) -> OrderedPrefetch[Planned, Head]:
        """The reads of *batch*, which is the present one now."""
        length = len(contents)
        if self._stream is None or batch != self.foreseen:
            self.drop()
            self._step = _step_after(self._previous, batch)
            plan = enumerate(_indices_from(batch, self._step, length))
            self._stream = contents.fetch_ahead(plan, is_eager=is_eager)
        self._previous, self.foreseen = batch, _shift(batch, self._step, length)
        return self._stream

    def drop(self) -> None:
        """Give up what is read ahead."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def __del__(self) -> None:
        if self._stream is not None:
            self._stream.abandon()


def _pop(idle: deque[_Foresight]) -> _Foresight | None:
    try:
        return idle.pop()
    except IndexError:  # asked before, it might have changed
        return None


def _step_after(previous: list[int], batch: list[int]) -> int:
    """How far behind *batch* the next one is likely to be; 0 if nothing suggests it."""
    if len(batch) >= _TELLING and batch == list(range(batch[0], batch[0] + len(batch))):
        info = torch.utils.data.get_worker_info()
        return len(batch) * (info.num_workers if info is not None else 1)
    steps = {now - before for before, now in zip(previous, batch, strict=False)}
    return steps.pop() if len(previous) == len(batch) and len(steps) == 1 else 0


def _indices_from(batch: list[int], step: int, length: int) -> Iterator[int]:
    """The indices of *batch* and of the batches that are foreseen after it."""
    while batch:
        yield from batch
        batch = _shift(batch, step, length)


def _shift(batch: list[int], step: int, length: int) -> list[int]:
    return [index + step for index in batch if 0 <= index + step < length] if step else []
