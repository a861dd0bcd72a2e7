"""Save: items from tensor memory into blobs of fresh names, then one atomic ``.metadata`` that makes them count.

Until ``.metadata`` is replaced, readers see the checkpoint that was there before; from then on the new one. Every
error of every block reaches the caller, and so, through torch, every rank.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from azure.core.exceptions import AzureError, ResourceExistsError
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.engine import Cancelled, Scope, engine_for
from azstoragetorch.checkpoint._alarm import alarmed
from azstoragetorch.checkpoint._encoding import ENVELOPE, Encoder, size_hint
from azstoragetorch.checkpoint._folder import describe, plain
from azstoragetorch.checkpoint._format import (
    METADATA,
    VERSION,
    data_name,
    dump_metadata,
    metadata_name,
    new_save_id,
    storage_info,
)
from azstoragetorch.checkpoint._planning import partition
from azstoragetorch.checkpoint._progress import Meter, Progress
from azstoragetorch.checkpoint._storage import FolderStorage
from azstoragetorch.exceptions import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    FatalBlobIOWriteError,
)

log = logging.getLogger("azstoragetorch")

_AUTO_BLOBS = 256  # of a checkpoint: a large job has one for each rank, a small one is spread
_SINGLE = 24 * MiB  # a blob up to this size is copied together and put at once, which saves a round trip
_WHOLE = 64 * MiB  # a blob up to this size is one block: another try sends no more than this again


class BlobStorageWriter(FolderStorage, StorageWriter):
    """Saves distributed checkpoints as folders of blobs, for `torch.distributed.checkpoint.save` and ``async_save``.

    A save is all or nothing: it takes effect by the one request that puts ``.metadata``, after the data of all ranks.
    Whatever happens before, a checkpoint that was there stays as it is and loadable; its data is deleted after. What
    an interrupted save leaves behind is no checkpoint, and :func:`~azstoragetorch.checkpoint.clean` removes it.

    The folder is in torch's own file format: downloaded, it loads with ``FileSystemReader``.

    Args:
        url: URL of the folder, in any of the forms that :doc:`the guide </guide/urls>` lists. ``checkpoint_id`` of
            ``dcp.save`` names another one in the same account.
        credential: As for :class:`~azstoragetorch.io.BlobIO`.
        transfer: How to transfer; see :class:`azstoragetorch.TransferConfig`. With ``validate_content`` the service
            checks an MD5 of every block.
        overwrite: Replace a checkpoint that is there. If False, raise instead, before anything is uploaded.
        blobs_per_rank: Spread what a rank saves over this many blobs. By default over one for each request in
            flight, as long as they are of ``block_size`` and no more than 256 in all.
        extensions: Stream extensions of torch that transform every item, such as compression.
        progress: Called with the bytes done and planned on this rank, from any thread but one call at a time.

    Raises:
        ValueError: *url* is none, or names a snapshot; ``blobs_per_rank`` is less than 1.
        TypeError: an argument has a wrong type.

    Saving raises :class:`~azstoragetorch.exceptions.CheckpointError` and what the service refuses as types of
    ``azure.core.exceptions``; on more than one rank torch wraps them, on all ranks, into its ``CheckpointException``.
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
        progress: Progress | None = None,
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
        self._save_id = new_save_id()
        self._rank = 0
        self._metadata_rank: int | None = None  # of the metadata that is ours to write; None is the one of all ranks

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a new save, into the folder *checkpoint_id* if that is not None.

        Raises:
            TypeError: *checkpoint_id* is not a str; a path object loses one of the slashes after the scheme.
            ValueError: it is not a URL, or it is one in another account.
        """
        super().reset(checkpoint_id)
        self._save_id = new_save_id()

    def storage_meta(self) -> StorageMeta:
        """What identifies this save."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:
        """Begin a save on this rank; called by torch.

        Raises:
            CheckpointExistsError: there is a checkpoint, and it is not to be overwritten.
            CheckpointError: ranks are not to coordinate, and there is a checkpoint of ranks that did.
        """
        self._save_id = new_save_id()
        rank = kwargs.get("rank")
        self._rank = rank if rank is not None else 0
        coordinates = kwargs.get("use_collectives", True)
        self._metadata_rank = None if coordinates else self._rank
        if not self._overwrite and (is_coordinator or not coordinates):
            for name in {METADATA, metadata_name(self._metadata_rank)}:
                if self._folder.blob(name).version() is not None:
                    raise self._exists()
        elif not coordinates and self._folder.blob(METADATA).version() is not None:
            # Readers look for it first, so they would go on loading it.
            raise self._error(
                "there is a checkpoint that was saved with collectives, which one without cannot replace; delete it "
                "first or save to another folder"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to prepare: where items go is decided while they are written."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Agree on the name of the alarm; those of data are unique without it. Called by torch on the coordinator."""
        if len(plans) == 1:
            return plans
        planning = new_save_id()
        return [replace(plan, storage_data=planning) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Upload the items of *plan*; called by torch on every rank.

        Raises:
            CheckpointError: an item could not be saved; the message names it, the rank and the reason.
        """
        sizes = [size_hint(item) for item in plan.items]
        meter = Meter(self._progress, sum(sizes))
        runs = partition(sizes, self._blobs_per_rank or self._blob_count(sum(sizes)))
        config = self._folder.transfer
        largest = max((self._block_size(sum(sizes[at] + ENVELOPE for at in run)) for run in runs), default=1)
        at_once = max(1, min(config.max_concurrency, config.memory_limit // largest))
        blobs_at_once = max(1, min(len(runs), at_once))
        results: list[list[WriteResult]] = [[] for _ in runs]
        planner_lock = threading.Lock()

        def task(number: int) -> Callable[[Scope], None]:
            def run(scope: Scope) -> None:
                name = data_name(self._rank, number, self._save_id)
                items = [plan.items[at] for at in runs[number]]
                encoder = Encoder(name, items, planner, planner_lock, self._extensions, config.block_size, meter)
                results[number] = self._write_blob(encoder, at_once // blobs_at_once, scope)

            return run

        scope = Scope()
        try:
            with alarmed(self._folder, plan.storage_data, scope):
                engine_for(config).run_all([task(number) for number in range(len(runs))], blobs_at_once, scope)
        except Cancelled:
            raise self._error("gave up, since another rank has failed; the save has no effect") from None
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for written in results for result in written])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the save count; called by torch on the coordinator when all ranks have succeeded.

        Raises:
            CheckpointExistsError: there is a checkpoint by now, and it is not to be overwritten.
            CheckpointError: an item is missing, or its blob is; nothing was changed.
        """
        written = {result.index: result.storage_data for rank in results for result in rank}
        self._check_complete(metadata, written)
        replaced = self._check_present(written)
        metadata = replace(metadata, storage_data=written, storage_meta=self.storage_meta(), version=VERSION)
        paths = frozenset(info.relative_path for info in written.values())
        try:
            self._folder.put_metadata(
                dump_metadata(metadata), paths, self._metadata_rank, create_only=not self._overwrite
            )
        except ResourceExistsError as error:
            raise self._exists() from error
        except FatalBlobIOWriteError as error:
            raise self._error(f"the metadata could not be written: {error}") from error
        tasks = [lambda _scope, path=path: self._discard(path) for path in replaced]
        engine_for(self._folder.transfer).run_all(tasks, self._folder.transfer.max_connections)

    def _discard(self, path: str) -> None:
        try:
            self._folder.blob(path).delete()
        except AzureError as error:
            log.warning("%s: %s of the replaced checkpoint was not deleted: %s", self.checkpoint_id, path, error)

    # -- one blob -----------------------------------------------------------------------------------------------------

    def _blob_count(self, size: int) -> int:
        """Blobs for *size* bytes: one for each request in flight, but not very many over all ranks."""
        config = self._folder.transfer
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return max(1, min(-(-size // config.block_size), config.max_concurrency, _AUTO_BLOBS // ranks))

    def _block_size(self, size: int) -> int:
        """Bytes of a block of a blob of about *size* bytes: all, unless another try would send too much again."""
        return max(self._folder.transfer.block_size, size if size <= _WHOLE else 0)

    def _write_blob(self, encoder: Encoder, concurrency: int, scope: Scope) -> list[WriteResult]:
        name = encoder.name
        block_size = self._block_size(encoder.size_hint)
        single = min(_SINGLE, 3 * self._folder.transfer.block_size // 2)
        writer = self._folder.blob(name).writer()
        try:
            with scope.holding(writer.cancel):
                pieces = encoder.pieces(scope)
                first: list[memoryview] = []
                if encoder.size_hint <= single:
                    first = list(_until(single, pieces))
                if encoder.is_done:
                    writer.put(first)
                else:
                    rest = itertools.chain(first, pieces)
                    writer.write_pieces(rest, block_size=block_size, concurrency=concurrency)
                    writer.commit()
        except BaseException as error:
            writer.abort()
            scope.check()  # another blob has failed, which is the error to tell
            if not isinstance(error, Exception):
                raise
            cause = error.__cause__ if isinstance(error, FatalBlobIOWriteError) and error.__cause__ else error
            is_item = cause is encoder.error
            place = f"{encoder.key!r} in {name}" if is_item else name
            raise self._error(
                f"could not save {place}, so the save has no effect: {describe(cause)}",
                key=encoder.key if is_item else None,
            ) from plain(cause)
        return [WriteResult(index, item.length, storage_info(item)) for index, item in encoder.written]

    # -- committing ---------------------------------------------------------------------------------------------------

    def _check_complete(self, metadata: Metadata, written: dict[MetadataIndex, Any]) -> None:
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                missing = MetadataIndex(key) not in written
            else:
                missing = any(MetadataIndex(key, chunk.offsets) not in written for chunk in entry.chunks)
            if missing:
                raise self._error(f"no rank has saved all of {key!r}, so the save has no effect", key=key)

    def _check_present(self, written: dict[MetadataIndex, Any]) -> set[str]:
        """Raise unless all data blobs are there as they were written: somebody may have cleaned up meanwhile.

        Notes their ETags in *written*. Returns the data blobs of the checkpoint that is about to be replaced.
        """
        needed: dict[str, int] = {}
        for info in written.values():
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        versions: dict[str, BlobVersion | None] = {}
        replaced: set[str] = set()

        def look(path: str) -> Callable[[Scope], None]:
            return lambda _scope: versions.__setitem__(path, self._folder.blob(path).version())

        tasks = [lambda _scope: replaced.update(self._paths_of_present()), *map(look, needed)]
        engine_for(self._folder.transfer).run_all(tasks, self._folder.transfer.max_connections)
        for path, size in needed.items():
            version = versions[path]
            if version is None or version.size != size:
                state = "deleted" if version is None else "changed"
                raise self._error(f"{path} was {state} while the save was under way, so the save has no effect")
        for info in written.values():
            info.etag = versions[info.relative_path].etag  # type: ignore[union-attr]  # checked above
        return replaced

    def _paths_of_present(self) -> frozenset[str]:
        if not self._overwrite:
            return frozenset()
        try:
            return self._folder.data_paths(self._metadata_rank)
        except CheckpointNotFoundError:
            return frozenset()
        except CheckpointError as error:
            log.warning(
                "%s: the checkpoint to replace cannot be read, so its data stays: %s", self.checkpoint_id, error
            )
            return frozenset()

    def _exists(self) -> CheckpointExistsError:
        return CheckpointExistsError(
            f"{self.checkpoint_id}: there is a checkpoint, and overwrite=False; it is unchanged",
            checkpoint=self.checkpoint_id,
            rank=self._rank,
        )

    def _error(self, what: str, *, key: str | None = None) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint_id}: rank {self._rank}: {what}", checkpoint=self.checkpoint_id, key=key, rank=self._rank
        )


def _until(size: int, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """The first of *pieces*, until they are longer than *size* together: what is no tensor tells its size late."""
    taken = 0
    for piece in pieces:
        yield piece
        taken += piece.nbytes
        if taken > size:
            return
