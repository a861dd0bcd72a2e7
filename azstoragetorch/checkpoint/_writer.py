"""Save: items from tensor memory into blobs of fresh names, then one atomic ``.metadata`` that makes them count.

Until ``.metadata`` is replaced, readers see the checkpoint that was there before; from then on the new one. Every
error of every block reaches the caller, and so, through torch, every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from azure.core.exceptions import AzureError
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from azstoragetorch._blob.client import BlobVersion
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.job import Job
from azstoragetorch._engine.scope import Cancelled, Scope, on_error
from azstoragetorch._engine.threads import engine_for, one_at_a_time
from azstoragetorch._tensors.planning import partition
from azstoragetorch._tensors.progress import ProgressCallback, ProgressCounter
from azstoragetorch.checkpoint._base import LATEST, Digesting, digesting
from azstoragetorch.checkpoint._cleaning import delete_of_rank
from azstoragetorch.checkpoint._commit import commit
from azstoragetorch.checkpoint._data_blob import block_size_of, write_blob
from azstoragetorch.checkpoint._encoding import ENVELOPE, Encoder, size_hint
from azstoragetorch.checkpoint._folder import Folder, Seen, describe, picklable
from azstoragetorch.checkpoint._format import (
    VERSION,
    Digests,
    Place,
    data_name,
    digests_name,
    dump_digests,
    dump_metadata,
    metadata_name,
    new_save_id,
    place_of,
    read_item,
    storage_info,
    take_digest,
)
from azstoragetorch.checkpoint._joint_failure import fail_together
from azstoragetorch.checkpoint._save import Save, Saves
from azstoragetorch.checkpoint._storage import FolderStorage
from azstoragetorch.exceptions import (
    AZStorageTorchError,
    CheckpointConflictError,
    CheckpointError,
    CheckpointExistsError,
    FatalBlobIOWriteError,
)

log = logging.getLogger("azstoragetorch")

_AUTO_BLOBS = 256  # of a checkpoint: a large job has one for each rank, a small one is spread


class BlobStorageWriter(FolderStorage, StorageWriter):
    """Saves distributed checkpoints as folders of blobs, for `torch.distributed.checkpoint.save` and ``async_save``.

    A save is all or nothing: after the data of all ranks is stored, one request writes ``.metadata`` and thereby
    commits the save. Until then, an existing checkpoint is unchanged and can be loaded; afterwards, its data is
    deleted. Data that an interrupted save leaves behind is not a checkpoint, and
    :func:`~azstoragetorch.checkpoint.clean` deletes it.

    The folder has torch's own file format: after a download, ``FileSystemReader`` loads it.

    Args:
        url: URL of the folder, in any of the forms that :doc:`the guide </guide/urls>` lists. ``checkpoint_id`` of
            ``dcp.save`` selects another folder in the same account. Later saves without ``checkpoint_id`` use that
            folder too, as with torch's writers. Pass it to every save if a signal handler may save with the same
            writer.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`. With ``validate_content``, the service
            checks an MD5 of every block.
        overwrite: Replace an existing checkpoint. If False, raise an error instead, before anything is uploaded.
        blobs_per_rank: Number of blobs over which a rank distributes its data. By default, one for each concurrent
            request, but fewer if blobs would be smaller than ``block_size``, or if all ranks together would write more
            than 256 blobs.
        extensions: Stream extensions of torch that transform every item, such as compression.
        progress: Called with the bytes done and planned on this rank, from any thread but one call at a time.
        base: A checkpoint of which unchanged tensors are copied by the service instead of being uploaded: the URL of
            its folder in the same account, or ``"latest"``, the checkpoint that this save replaces or else the newest
            one in the folders next to it. The new checkpoint is complete and does not depend on the base. If the base
            cannot be used, everything is uploaded, with a warning. See :doc:`/guide/deltas`.
        digests: Store a digest of each item, so that loads with ``verify=True`` and later saves with ``base=`` can
            compare. ``base=`` implies it.

    Raises:
        ValueError: *url* or *base* is not a valid URL, or names a snapshot; ``blobs_per_rank`` is less than 1.
        TypeError: an argument has the wrong type.

    Saving raises :class:`~azstoragetorch.exceptions.CheckpointError`, and errors of the service as types of
    ``azure.core.exceptions``. With more than one rank, torch wraps them, on all ranks, in its ``CheckpointException``.
    """

    def __init__(
        self,
        url: str,
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
        overwrite: bool = True,
        blobs_per_rank: int | None = None,
        extensions: Sequence[Any] = (),
        progress: ProgressCallback | None = None,
        base: str | None = None,
        digests: bool = False,
    ) -> None:
        if blobs_per_rank is not None and (isinstance(blobs_per_rank, bool) or not isinstance(blobs_per_rank, int)):
            raise TypeError(f"blobs_per_rank must be an integer or None, not {type(blobs_per_rank).__name__}")
        if blobs_per_rank is not None and blobs_per_rank < 1:
            raise ValueError(f"blobs_per_rank must be at least 1, not {blobs_per_rank}")
        super().__init__(url, credential, transfer)
        self._overwrite = overwrite
        self._blobs_per_rank = blobs_per_rank
        self._extensions = tuple(extensions)
        self._progress = progress
        self._base = _checked_base(base)
        self._digests = digests
        self._saves = Saves()
        self._last: Save | None = None  # for callers that finish on another thread than they began on

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    @property
    def checkpoint_id(self) -> str:
        """The URL of the folder, without a SAS. During a save, that of the save in progress on this thread."""
        save = self._saves.innermost()
        return (save.folder if save is not None else self._folder).url

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a new save, to the folder *checkpoint_id* unless that is None.

        Raises:
            TypeError: *checkpoint_id* is not a str; a path object loses one of the slashes after the scheme.
            ValueError: *checkpoint_id* is not a URL, or is in another account.
        """
        folder = self._folder if checkpoint_id is None else self._folder.at(checkpoint_id)
        self._folder = folder
        self._saves.begin(folder)

    def storage_meta(self) -> StorageMeta:
        """Return the metadata that identifies this save; torch calls it first."""
        prepared = self._saves.prepared()
        save = self._saves.begin(self._folder) if prepared is None else self._saves.begin_again(prepared)
        return StorageMeta(checkpoint_id=save.folder.url, save_id=save.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:
        """Begin a save on this rank; called by torch.

        Raises:
            CheckpointExistsError: the folder has a checkpoint, and ``overwrite=False``.
            CheckpointError: ``use_collectives=False``, and the folder has a checkpoint that was saved with collectives.
        """
        save = self._saves.prepared() or self._saves.begin(self._folder)
        save.is_set_up = True
        self._last = save
        rank = kwargs.get("rank")
        save.rank = rank if rank is not None else 0
        if not kwargs.get("use_collectives", True):
            save.metadata_rank = save.rank
        self._find_base(save)
        if not save.is_own and not is_coordinator:
            return
        with on_error(partial(self._saves.end, save)):
            if save.is_own and save.folder.is_complete():
                if not self._overwrite:
                    raise _exists(save)
                # Readers look for it first, so they would still load it.
                raise _error(
                    save,
                    "there is a checkpoint that was saved with collectives, which one without cannot replace; delete "
                    "it first or save to another folder",
                )
            save.seeing = Job(partial(save.folder.see, save.metadata_rank))
            if self._overwrite:
                self._begin_early(save, save.seeing)
                return
            save.see()
            if save.seen is not None and save.seen.exists:
                raise _exists(save)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged: items are assigned to blobs while they are written."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Choose the name of the blob that signals a failure; called by torch on the coordinator.

        Raises:
            AzureError: the metadata that is there could not be read.
        """
        save = self._saves.to_write() or self._last
        if save is not None:
            with on_error(partial(self._saves.end, save)):
                save.see()  # before any rank uploads: `_commit` depends on it
        if len(plans) == 1:
            return plans
        planning = new_save_id()
        return [replace(plan, storage_data=planning) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Upload the items of *plan*; called by torch on every rank.

        Raises:
            CheckpointError: an item could not be saved; the message names the item, the rank, and the reason.
        """
        save = self._saves.to_write() or self._last
        if save is None or save.is_written:
            save = self._saves.begin(self._folder)
            self._find_base(save)
        save.is_written = True
        with on_error(partial(self._saves.end, save)):
            save.see()
            written = self._write(save, plan, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def _write(self, save: Save, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        sizes = [size_hint(item) for item in plan.items]
        counter = ProgressCounter(self._progress, sum(sizes))
        runs = partition(sizes, self._blobs_per_rank or self._blob_count(sum(sizes)))
        config = save.folder.transfer
        digesting = save.digesting.result() if save.digesting is not None else None
        has_base = digesting is not None and digesting.base is not None
        largest = max(
            (block_size_of(sum(sizes[at] + ENVELOPE for at in run), config, has_base=has_base) for run in runs),
            default=1,
        )
        # Copies do not use the network, so more of them at once are faster, unless the caller has set a limit.
        is_free = has_base and isinstance(config.max_concurrency, str)
        most = config.max_connections if is_free else config.initial_concurrency
        at_once = max(1, min(most, config.memory_limit // largest))
        blobs_at_once = max(1, min(len(runs), at_once))
        planner_calls = one_at_a_time()

        def write(numbered: tuple[int, range], scope: Scope) -> list[WriteResult]:
            number, run = numbered
            name = data_name(save.rank, number, save.save_id, is_own=save.is_own)
            items = [plan.items[at] for at in run]
            encoder = Encoder(
                name, items, planner, planner_calls, self._extensions, config.block_size, counter, digesting
            )
            return self._write_blob(save, encoder, digesting, at_once // blobs_at_once, scope)

        scope = Scope()
        try:
            with fail_together(save.folder, plan.storage_data, scope):
                results = engine_for(config).map(write, list(enumerate(runs)), blobs_at_once, scope)
        except Cancelled:
            raise _error(save, "gave up, since another rank has failed; the save has no effect") from None
        return [result for of_blob in results for result in of_blob]

    def _find_base(self, save: Save) -> None:
        """Begin to find out how the items of *save* get digests. If they get none, this takes no time at all."""
        if self._base is None and not self._digests:
            return
        save.digesting = Job(partial(digesting, save.folder, save.metadata_rank, self._base))
        self._begin_early(save, save.digesting)

    def _begin_early(self, save: Save, job: Job[Any]) -> None:
        config = save.folder.transfer
        if config.max_connections > 1:
            engine_for(config).submit(job.run)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the save; called by torch on the coordinator when all ranks have succeeded.

        Raises:
            CheckpointExistsError: a checkpoint was saved in the meantime, and ``overwrite=False``.
            CheckpointConflictError: another save was committed in the meantime; this one has no effect.
            CheckpointError: an item or its blob is missing; the previous checkpoint is unchanged.
        """
        written = {result.index: result.storage_data for rank in results for result in rank}
        paths = frozenset(info.relative_path for info in written.values())
        save = self._saves.to_finish(paths) or self._last
        if save is None or save.seen is None:
            raise CheckpointError(
                f"{self.checkpoint_id}: finish was called for a save that set_up_storage_writer did not begin as "
                "that of the coordinator",
                checkpoint=self.checkpoint_id,
            )
        try:
            self._check_complete(save, metadata, written)
            digests = self._check_present(save, written)
            meta = StorageMeta(checkpoint_id=save.folder.url, save_id=save.save_id)
            metadata.storage_meta = meta  # for the caller of dcp.save, who gets it
            whole = replace(metadata, storage_data=written, storage_meta=meta, version=VERSION)
            paths |= {digests} if digests is not None else frozenset()
            sample = min(((info.relative_path, info.etag) for info in written.values()), default=None)
            self._commit(save, dump_metadata(whole, digests), paths, save.seen, sample)
            self._discard(save, paths, save.seen)
            if save.is_own and save.rank == 0 and save.seen.exists:
                self._discard_ranks(save)
        finally:
            self._saves.end(save)

    def _commit(
        self, save: Save, content: bytes, paths: frozenset[str], seen: Seen, sample: tuple[str, str] | None
    ) -> None:
        try:
            commit(save.folder, save.metadata_rank, content, paths, sample=sample, seen=seen, save_id=save.save_id)
        except CheckpointConflictError as error:
            if self._overwrite or not save.folder.see(save.metadata_rank).exists:
                raise
            raise _exists(save) from error
        except (AzureError, FatalBlobIOWriteError) as error:
            is_known = isinstance(error, AzureError)  # else the message says what is not known
            effect = ", so the save has no effect" if is_known else ""
            raise _error(save, f"the metadata could not be written{effect}: {error}") from picklable(error)

    def _discard(self, save: Save, paths: frozenset[str], seen: Seen) -> None:
        """Delete the data of the checkpoint that was replaced. The save counts, whatever comes of that."""
        folder = save.folder
        try:
            if seen.content is not None:
                replaced = folder.paths_in(seen.content, save.metadata_rank) - paths
                folder.each(lambda path: folder.blob(path).delete(), sorted(replaced))
        except (AzureError, AZStorageTorchError) as error:
            log.warning("%s: data of the replaced checkpoint was not deleted, clean will: %s", folder.url, error)

    def _discard_ranks(self, save: Save) -> None:
        """Delete what ranks saved for themselves that do not exist any more: on as many ranks it would be loaded."""
        folder, found = save.folder, _world_size()
        try:
            while folder.blob(metadata_name(found)).version() is not None:
                found += 1
            for rank in reversed(range(_world_size(), found)):  # the highest first, so that all are found again
                delete_of_rank(folder, rank)
        except (AzureError, AZStorageTorchError) as error:
            log.warning("%s: what other ranks saved before was not deleted: %s", folder.url, error)

    # -- one blob -----------------------------------------------------------------------------------------------------

    def _blob_count(self, size: int) -> int:
        """Blobs for *size* bytes: one for each request in flight, but not very many over all ranks."""
        config = self._folder.transfer
        return max(1, min(-(-size // config.block_size), config.initial_concurrency, _AUTO_BLOBS // _world_size()))

    def _write_blob(
        self, save: Save, encoder: Encoder, digesting: Digesting | None, concurrency: int, scope: Scope
    ) -> list[WriteResult]:
        base = digesting.base if digesting is not None else None
        try:
            write_blob(save.folder, encoder, base, concurrency, scope)
        except Exception as error:  # noqa: BLE001 - of the service, the planner or an extension
            scope.check()  # another blob has failed, which is the error to raise
            cause = error.__cause__ if isinstance(error, FatalBlobIOWriteError) and error.__cause__ else error
            is_item = cause is encoder.error
            place = f"{encoder.key!r} in {encoder.name}" if is_item else encoder.name
            raise _error(
                save,
                f"could not save {place}, so the save has no effect: {describe(cause)}",
                key=encoder.key if is_item else None,
            ) from picklable(cause)
        return [WriteResult(index, item.length, storage_info(item)) for index, item in encoder.written]

    # -- committing ---------------------------------------------------------------------------------------------------

    def _check_complete(self, save: Save, metadata: Metadata, written: dict[MetadataIndex, Any]) -> None:
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                missing = MetadataIndex(key) not in written
            else:
                missing = any(MetadataIndex(key, chunk.offsets) not in written for chunk in entry.chunks)
            if missing:
                raise _error(save, f"no rank has saved all of {key!r}, so the save has no effect", key=key)

    def _check_present(self, save: Save, written: dict[MetadataIndex, Any]) -> str | None:
        """Raise unless all data blobs are there as they were written.

        Notes their ETags in *written*. Digests go from there to a side blob, whose name is returned.
        """
        needed: dict[str, int] = {}
        by_place: dict[Place, str] = {}
        for info in written.values():
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
            digest = take_digest(info)
            if digest is not None:
                by_place[place_of(read_item(info))] = digest
        name = digests_name(save.rank, save.save_id, is_own=save.is_own) if by_place else None
        folder = save.folder

        def check(path: str | None) -> BlobVersion | None:
            if path is not None:
                return folder.blob(path).version()
            if name is not None:
                self._put_digests(save, name, by_place)
            return None

        found = folder.each(check, [None, *needed])[1:]
        versions: dict[str, BlobVersion] = {}
        for (path, size), version in zip(needed.items(), found, strict=True):
            if version is None or version.size != size:
                state = "deleted" if version is None else "changed"
                raise _error(save, f"{path} was {state} while the save was in progress, so the save has no effect")
            versions[path] = version
        for info in written.values():
            info.etag = versions[info.relative_path].etag
        return name

    def _put_digests(self, save: Save, name: str, by_place: dict[Place, str]) -> None:
        try:
            save.folder.blob(name).put(dump_digests(save.save_id, by_place))
        except (AzureError, FatalBlobIOWriteError) as error:
            what = f"the digests could not be written, so the save has no effect: {error}"
            raise _error(save, what) from picklable(error)
        save.folder.remember_digests(name, Digests(save.save_id, by_place))


def _checked_base(base: str | None) -> Folder | str | None:
    """*base* as a folder, which keeps a SAS out of pickles, or as it is."""
    if base is not None and not isinstance(base, str):
        raise TypeError(f"base must be a URL, 'latest' or None, not {type(base).__name__}")
    return base if base in (None, LATEST) else Folder(base, False)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _exists(save: Save) -> CheckpointExistsError:
    return CheckpointExistsError(
        f"{save.folder.url}: there is a checkpoint, and overwrite=False; it is unchanged",
        checkpoint=save.folder.url,
        rank=save.rank,
    )


def _error(save: Save, what: str, *, key: str | None = None) -> CheckpointError:
    url = save.folder.url
    return CheckpointError(f"{url}: rank {save.rank}: {what}", checkpoint=url, key=key, rank=save.rank)
