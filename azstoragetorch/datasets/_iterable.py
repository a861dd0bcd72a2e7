"""The iterable dataset: the order of samples, their division among processes, and resuming."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch.utils.data
from typing_extensions import Unpack

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_container_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.manifest import IfChanged
from azstoragetorch._samples.names import InvalidNames, NameRules
from azstoragetorch._samples.resume import ResumeState, positions_after
from azstoragetorch._samples.sharding import EVEN, Even, even_length, shard_range
from azstoragetorch._samples.workers import Place, Placement, ShardBy, Shared
from azstoragetorch.datasets._blobs import Blob, BlobSample, check_transform
from azstoragetorch.datasets._contents import (
    CACHE_BYTES,
    Contents,
    ListingInfo,
    ListingProgress,
    check_count,
    open_contents,
)
from azstoragetorch.datasets._iteration import OnError, Position, Samples, check_on_error, refuse_late_state
from azstoragetorch.datasets._options import IterableListOptions, IterableManifestOptions, IterableReadOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class IterableBlobDataset(torch.utils.data.IterableDataset[T_co]):
    """Iterable dataset: blobs one after the other, with the next ones in flight.

    Create one with `from_container_url`, `from_blob_urls`, or `from_manifest`.

    Blobs are read ahead in order, up to ``transfer.max_connections`` blobs and ``transfer.memory_limit`` bytes. The
    transform runs in order, in the process and thread that iterates. Data that it does not read is not fetched. Of
    blobs larger than ``transfer.part_size``, only the first part is fetched ahead. Without a transform, a sample is
    ``{"url": str, "data": bytes}``.

    **Listing.** The container is listed when the dataset is first iterated, and only once: all workers and all later
    epochs shard that listing, even if blobs are added to the container in the meantime. One forked worker lists, and
    the others use its result; for workers of spawn and forkserver, the parent lists before it starts them. Each rank
    lists separately, unless ``share_listing=True``. Create a new dataset to see new blobs.

    **Sharding.** ``shard_by="worker"`` divides the blobs among DataLoader workers, ``"rank_and_worker"`` among the
    workers of all ranks, and ``"none"`` gives all blobs to each worker. Shard s of S has the positions s, s + S, ... of
    the epoch's sequence, where s is worker x world size + rank. Rank and world size are those of torch.distributed (in
    spawned workers, those of the parent), unless ``rank`` and ``world_size`` are passed. With ``even="drop"`` or
    ``"pad"`` all shards have the same length, which collective training needs.

    **Shuffling.** ``shuffle=True`` permutes the whole sequence by (seed, epoch) before it is sharded. Call `set_epoch`
    before each epoch; otherwise, all epochs have the same order.

    **Resuming.** `state_dict` and `load_state_dict` save and restore the exact position, directly or under
    ``torchdata.stateful_dataloader.StatefulDataLoader``. With `merge_states`, a job resumes with another
    number of ranks or workers.
    """

    def __init__(
        self,
        contents: Contents,
        transform: Callable[[Blob], T_co] | None,
        placement: Placement,
        *,
        seed: int | None,
        even: Even,
        on_error: OnError,
    ) -> None:
        check_transform(transform)
        if even not in EVEN:
            raise ValueError(f"even must be one of {', '.join(map(repr, EVEN))}, not {even!r}")
        check_on_error(on_error)
        contents.list_lazily()
        self._contents = contents
        self._transform = transform
        self._seed = seed
        self._placement = placement
        self._even: Even = even
        self._on_error: OnError = on_error
        self._shared = Shared()
        self._loaded: ResumeState | None = None
        self._load = 0  # by which the workers know the loaded state; 0 if it was loaded by the worker itself
        self._current: Position | None = None

    @overload
    @classmethod
    def from_blob_urls(
        cls, blob_urls: str | Iterable[str], *, transform: None = None, **options: Unpack[IterableReadOptions]
    ) -> IterableBlobDataset[BlobSample]: ...
    @overload
    @classmethod
    def from_blob_urls(
        cls, blob_urls: str | Iterable[str], *, transform: Callable[[Blob], T], **options: Unpack[IterableReadOptions]
    ) -> IterableBlobDataset[T]: ...
    @classmethod
    def from_blob_urls(  # noqa: D417 - described by BlobDataset
        cls,
        blob_urls: str | Iterable[str],
        *,
        credential: Credential = None,
        transform: Callable[[Blob], Any] | None = None,
        transfer: TransferConfig | None = None,
        shuffle: bool = False,
        seed: int = 0,
        shard_by: ShardBy = "worker",
        rank: int | None = None,
        world_size: int | None = None,
        even: Even = "none",
        on_error: OnError = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> IterableBlobDataset[Any]:
        """Create a dataset of the blobs at the given URLs, in their order.

        Args:
            blob_urls: Same as for `BlobDataset.from_blob_urls`. The same holds for ``credential``, ``transform``,
                ``transfer``, ``cache_dir``, and ``cache_bytes``.
            shuffle: Whether to permute the sequence; by default False. `set_epoch` chooses another permutation.
            seed: Seed of the permutation, by default 0; must be the same on all ranks.
            shard_by: ``"worker"`` (the default), ``"rank_and_worker"``, or ``"none"``.
            rank: Replaces the rank of torch.distributed; pass *world_size* too.
            world_size: Replaces the world size of torch.distributed.
            even: ``"none"`` (the default): shards may differ in length by one. ``"drop"``: the surplus is left out.
                ``"pad"``: the first samples are repeated to fill up.
            on_error: What to do when a blob cannot be read or its transform fails. ``"raise"`` (the default);
                ``"skip"``; ``"warn"`` and skip; or a function of the URL and the exception, which skips the blob by
                returning. A skipped blob counts as consumed. Errors with status 401 or 403 are always raised.

        Raises:
            ValueError: a URL is not the URL of a blob, or an option is out of range.
            TypeError: an argument has the wrong type.
        """
        contents = Contents(
            urls=blob_urls, credential=credential, transfer=transfer, cache_dir=cache_dir, cache_bytes=cache_bytes
        )
        placement = Placement(shard_by, rank, world_size)
        return cls(contents, transform, placement, seed=_seed(shuffle, seed), even=even, on_error=on_error)

    @overload
    @classmethod
    def from_container_url(
        cls, container_url: str, *, transform: None = None, **options: Unpack[IterableListOptions]
    ) -> IterableBlobDataset[BlobSample]: ...
    @overload
    @classmethod
    def from_container_url(
        cls, container_url: str, *, transform: Callable[[Blob], T], **options: Unpack[IterableListOptions]
    ) -> IterableBlobDataset[T]: ...
    @classmethod
    def from_container_url(  # noqa: D417 - described above, and by BlobDataset
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
        shuffle: bool = False,
        seed: int = 0,
        shard_by: ShardBy = "worker",
        rank: int | None = None,
        world_size: int | None = None,
        even: Even = "none",
        on_error: OnError = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> IterableBlobDataset[Any]:
        """Create a dataset of the blobs in a container, which is listed when it is first needed.

        Args:
            container_url: URL of the container; a SAS in it is respected.
            prefix: Same as for `BlobDataset.from_container_url`; so are ``invalid_names``,
                ``include_folder_markers``, ``share_listing``, and ``group``. A shared listing is made at once.
            progress: Called in the process that lists, with the number of blobs listed so far.
            credential: Same as for `from_blob_urls`; so are all other arguments.

        Raises:
            ValueError: the URL is not the URL of a container, or an option is out of range.
            TypeError: an argument has the wrong type.
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
        placement = Placement(shard_by, rank, world_size)
        return cls(contents, transform, placement, seed=_seed(shuffle, seed), even=even, on_error=on_error)

    @overload
    @classmethod
    def from_manifest(
        cls, manifest_url: str, *, transform: None = None, **options: Unpack[IterableManifestOptions]
    ) -> IterableBlobDataset[BlobSample]: ...
    @overload
    @classmethod
    def from_manifest(
        cls, manifest_url: str, *, transform: Callable[[Blob], T], **options: Unpack[IterableManifestOptions]
    ) -> IterableBlobDataset[T]: ...
    @classmethod
    def from_manifest(  # noqa: D417 - described above, and by BlobDataset
        cls,
        manifest_url: str,
        *,
        container_url: str | None = None,
        if_changed: IfChanged = "raise",
        credential: Credential = None,
        transform: Callable[[Blob], Any] | None = None,
        transfer: TransferConfig | None = None,
        shuffle: bool = False,
        seed: int = 0,
        shard_by: ShardBy = "worker",
        rank: int | None = None,
        world_size: int | None = None,
        even: Even = "none",
        on_error: OnError = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> IterableBlobDataset[Any]:
        """Create a dataset of the blobs that a manifest lists. Takes one request, and does not list the container.

        Samples are numbered by the rows of the manifest, and ``metadata.fingerprint`` is its digest: all ranks have the
        same samples, and a state resumes only with the manifest that it was saved with. Without ``shuffle``, rows are
        read as they are needed. With it, each worker reads the whole manifest when an epoch begins (about 10 bytes and
        0.6 microseconds of CPU time a row), and keeps the rows of its share, at most 2,000,000 at a time.
        Needs pyarrow.

        Args:
            manifest_url: The folder of the manifest; see :func:`azstoragetorch.manifest.make_manifest`.
            container_url: Same as for `BlobDataset.from_manifest`; so is ``if_changed``.
            credential: Same as for `from_blob_urls`; so are all other arguments.

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
        placement = Placement(shard_by, rank, world_size)
        return cls(contents, transform, placement, seed=_seed(shuffle, seed), even=even, on_error=on_error)

    @property
    def metadata(self) -> ListingInfo:
        """Count, bytes, and fingerprint of the blobs in the dataset. Lists the container if that was not done yet."""
        return self._contents.info

    @property
    def epoch(self) -> int:
        """The epoch that was passed to `set_epoch` last; 0 before the first call."""
        return self._shared.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, which determines the order if the dataset shuffles.

        Call it in the main process before iterating: all workers see it, including persistent ones. A loaded state of
        another epoch is dropped.
        """
        check_count("epoch", epoch, 0)
        self._shared.epoch = epoch
        if self._loaded is not None and self._loaded.epoch != epoch:
            self._loaded = None
            self._shared.forget_load()

    def __iter__(self) -> Iterator[T_co]:
        """The samples of this process's shard.

        Raises:
            ValueError: there are blobs, but none for this rank; or the loaded state does not match.
            AzureError: the container could not be listed.
        """
        if self._shared.has_missed_load:
            return refuse_late_state()
        # Not a generator: the order, and a loaded state, are settled now and not when the first sample is drawn.
        loaded = self._take_loaded()
        self._current = self._begin(self._placement.here(), loaded)
        self._warn_of_repetition(is_resumed=loaded is not None)
        return Samples(self._contents, self._transform, self._on_error, self._current, self._shared.note_end)

    def _warn_of_repetition(self, *, is_resumed: bool) -> None:
        """Warn once, whatever number of workers there is, of what reads the same again without being asked to."""
        ranks = self._placement.ranks() if self._placement.by == "worker" else 1
        if ranks > 1 and self._shared.is_first_warning("ranks"):
            warnings.warn(
                f"shard_by='worker': each of the {ranks} ranks reads all blobs of its dataset. Pass "
                "shard_by='rank_and_worker' to give each rank a share; if the ranks have different blobs already, pass "
                "rank=0, world_size=1 with it",
                UserWarning,
                stacklevel=3,
            )
        if self._seed is not None and not is_resumed:
            self._shared.warn_of_repeated_epoch("shuffle=True")

    def __len__(self) -> int:
        """Raise TypeError, as the number of samples depends on workers, ranks and ``on_error``."""
        raise TypeError(
            "an IterableBlobDataset and its loader have no length: dataset.metadata.count is the number of its blobs "
            "(it lists them first), before they are divided among ranks and workers"
        )

    def __bool__(self) -> bool:
        return True  # which asks for no length

    def _take_loaded(self) -> ResumeState | None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self._load and not self._shared.is_first_use(self._load):
            return None
        return loaded

    def _begin(self, place: Place, loaded: ResumeState | None) -> Position:
        """Where *place* begins its epoch."""
        contents = self._contents
        contents.list_now()
        count = len(contents)
        if loaded is None:
            # Ranks are the same positions modulo their number, whatever their workers.
            dealt = even_length(count, place.shards, self._even)
            if count and not shard_range(dealt, place.world_size, place.rank):
                raise ValueError(
                    f"rank {place.rank} of world_size {place.world_size} is left without samples: the dataset has "
                    f"{count} (even={self._even!r}, {place.shards} shards)"
                )
            loaded = ResumeState(
                contents.fingerprint, self._seed, self._shared.epoch, place.shards, (0,) * place.shards
            )
        elif loaded.fingerprint != contents.fingerprint:
            raise ValueError(
                "state: the listing has changed since the state was saved (blobs were added, removed or renamed): "
                "restore the blobs, or start the epoch again without the state"
            )
        consumed, position = loaded.for_shard(place.shard, place.shards)
        state = replace(loaded, shards=place.shards, consumed=consumed, positions=())
        order = state.order(count)
        stripe = shard_range(len(order), place.shards, place.shard, self._even)
        return Position(state, place.shard, order, stripe, min(position, len(stripe)))

    def _check(self, state: ResumeState) -> None:
        if state.seed != self._seed:
            raise ValueError(
                f"state: saved with seed={state.seed}, but the dataset has seed={self._seed} (None: shuffle=False)"
            )

    def state_dict(self) -> dict[str, Any]:
        """The position to resume from: a small new dict of plain values, which can be stored as JSON.

        It describes the iterator that was created last in this process and the samples that it has yielded. Samples
        that were fetched ahead do not count. Before the first iterator, it is the beginning of the epoch.
        """
        if self._loaded is not None:
            return self._loaded.to_dict()
        if self._current is None:
            self._current = self._begin(self._placement.here(), None)
        return self._current.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration resume where *state* was taken. Later iterations start from the beginning.

        Load it in the main process before the loader starts; each worker then resumes its shard. Persistent workers
        that were started earlier raise an error. With another number of workers or ranks, *state* must cover
        all shards; see `merge_states`.

        Raises:
            ValueError: *state* is not a state of this class, or is a state of another order. Whether it matches the
                listing and the shards is checked when the iteration begins.
        """
        loaded = ResumeState.from_dict(state)
        self._check(loaded)
        self._loaded = loaded
        self._load = self._shared.number_load()

    def state_after(
        self,
        batches: int,
        *,
        batch_size: int,
        num_workers: int,
        drop_last: bool = False,
        resumed_from: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The state of a plain ``DataLoader`` with workers, after it has yielded *batches* in this epoch.

        A plain loader cannot get the state of its workers, but it takes their batches in turn, so the position follows
        from the number of batches. The state covers the shards of this rank. ``in_order=False`` is not supported.

        Args:
            batches: Yielded so far by the loader.
            batch_size: As passed to the loader.
            num_workers: As passed to the loader; not 0: without workers, use `state_dict`.
            drop_last: As passed to the loader.
            resumed_from: The state that this epoch was resumed from, if it was.

        Raises:
            ValueError: the loader cannot have yielded so many batches.
        """
        check_count("batches", batches, 0)
        check_count("batch_size", batch_size, 1)
        check_count("num_workers", num_workers, 1)
        if self._placement.by == "none":
            raise ValueError(
                "with shard_by='none' all workers read the same blobs, so a state of all of them cannot be made"
            )
        loaded = None if resumed_from is None else ResumeState.from_dict(resumed_from)
        places = [self._placement.of_worker(worker, num_workers) for worker in range(num_workers)]
        begun = [self._begin(place, loaded) for place in places]
        lengths, starts = [len(each.stripe) for each in begun], [each.consumed for each in begun]
        after = positions_after(batches, batch_size, lengths, starts, drop_last=drop_last)
        known = {each.shard: position for each, position in zip(begun, after, strict=True)}
        shards = begun[0].state.shards
        return replace(begun[0].state, positions=tuple(known.get(shard) for shard in range(shards))).to_dict()

    def __repr__(self) -> str:
        return f"IterableBlobDataset({self._contents.description})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_current": None}


def _seed(shuffle: bool, seed: int) -> int | None:
    check_count("seed", seed, 0)
    return seed if shuffle else None
