"""What torch calls to load a checkpoint: metadata, plans, errors that all ranks raise. `Load` gets the bytes."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from azure.core.exceptions import AzureError
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.broadcast import this_node
from azstoragetorch._tensors.progress import ProgressCallback
from azstoragetorch.checkpoint._folder import Version, describe, picklable
from azstoragetorch.checkpoint._format import Digests, Item, many_objects, read_item
from azstoragetorch.checkpoint._load import Load
from azstoragetorch.checkpoint._sharing import (
    SHARING,
    Sharing,
    expect_exchange,
    fingerprint,
    members_of,
    plan_sharing,
)
from azstoragetorch.checkpoint._storage import FolderStorage
from azstoragetorch.exceptions import CheckpointError, CheckpointNotFoundError


@dataclass(frozen=True)
class _RankState:
    """What a rank reports with its plan: the version that it has read, unless it has a separate one; its node.

    If it is to share what it fetches, also its global rank, and which ones are in its process group.
    """

    version: Version | None
    node: str
    rank: int = 0
    group: str = ""


class _Unread(Metadata):
    """In the place of metadata that could not be read: raises the reason as soon as the planner or the reader uses it.

    torch logs what `read_metadata` raises and raises an AssertionError instead, after it has asked for the metadata of
    the rank alone. It passes on what planners and readers raise.
    """

    def __init__(self, reason: Exception) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else self.reason


class _WithoutTraceback(logging.Filter):
    """Makes torch's record about metadata that could not be read one line. The error itself is raised later."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.module == "state_dict_loader" and isinstance(error, CheckpointError | AzureError):
            record.msg, record.args = "%s %s", (record.msg, str(error).partition("\n")[0])
            record.exc_info = record.exc_text = None
        return True


_without_traceback = _WithoutTraceback()


class BlobStorageReader(FolderStorage, StorageReader):
    """Loads distributed checkpoints from folders of blobs, for `torch.distributed.checkpoint.load`.

    Reads what :class:`BlobStorageWriter` wrote, on any number of ranks, and what torch's ``FileSystemWriter`` and
    ``FsspecWriter`` wrote. Each rank fetches only the bytes that it needs, whatever the sharding of the save.

    The metadata is a pickle, which is parsed and never executed. Entries other than tensors are pickles too, and the
    planner unpickles them: torch's default planner trusts them, unless ``weights_only=True`` is passed here.

    A load that fails may have modified some tensors: the attribute ``touched`` of its error names them.

    Args:
        url: URL of the folder, in any of the forms that :doc:`the guide </guide/urls>` lists. ``checkpoint_id`` of
            ``dcp.load`` selects another folder in the same account.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`. ``memory_limit`` bounds the memory that
            a load uses in addition to the tensors themselves.
        version: Load only this save: the ``save_id`` in the ``storage_meta`` of the metadata that ``dcp.save``
            returned, or the ETag of ``.metadata``. By default, the current checkpoint.
        load_once_per: ``"rank"``: every rank fetches what it needs. ``"node"`` or ``"world"``: one rank of each node or
            of the job fetches the data that several ranks need, such as replicated weights, and broadcasts it.
        process_group: The group that is passed to ``dcp.load``; used for broadcasting. With ``load_once_per``, a group
            of other ranks is an error.
        check_etags: Refuse data blobs that are not the versions that the save wrote. Copies in other folders are not
            checked, because they have other ETags. Pass False after restoring a backup into the original folder.
        extension_registry: The registry of torch's stream extensions; by default, torch's own.
        weights_only: Refuse entries other than tensors that `torch.load` refuses with ``weights_only=True``, before the
            planner unpickles them. torch's default planner unpickles everything, which can run code from the
            checkpoint.
        progress: Called with the bytes done and planned on this rank, from any thread but one call at a time.
        verify: Compare everything that is loaded with the digests of the save, and raise an error that names the entry,
            the blob, and both digests if they differ. The checkpoint must have digests: it was saved with ``base=`` or
            ``digests=True``. Of entries that are loaded in part or converted to another type, all bytes are fetched.
            With ``load_once_per``, the rank that fetches data compares it.

    Raises:
        ValueError: *url* is not a valid URL, or names a snapshot; ``load_once_per`` is not one of the three values.
        TypeError: an argument has the wrong type.

    Loading raises :class:`~azstoragetorch.exceptions.CheckpointError`, and errors of the service as types of
    ``azure.core.exceptions``. torch wraps them, on all ranks, in its ``CheckpointException``.
    """

    def __init__(
        self,
        url: str,
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
        version: str | None = None,
        load_once_per: str = "rank",
        process_group: Any = None,
        check_etags: bool = True,
        extension_registry: Any = None,
        weights_only: bool = False,
        progress: ProgressCallback | None = None,
        verify: bool = False,
    ) -> None:
        if load_once_per not in SHARING:
            raise ValueError(f"load_once_per must be one of {', '.join(map(repr, SHARING))}, not {load_once_per!r}")
        if version is not None and not isinstance(version, str):
            raise TypeError(f"version must be a str or None, not {type(version).__name__}")
        super().__init__(url, credential, transfer)
        self._wanted = version
        self._version: Version | None = None
        self._load_once_per = load_once_per
        self._group = process_group
        self._check_etags = check_etags
        self._registry = extension_registry
        self._weights_only = weights_only
        self._progress = progress
        self._verify = verify
        self._metadata: Metadata | None = None  # for the digests
        self._load_id = uuid.uuid4().hex
        self._rank = 0
        self._failure: Exception | None = None
        self._storage: dict[MetadataIndex, Any] = {}
        self._is_original = False

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a new load, from the folder *checkpoint_id* unless that is None.

        Raises:
            TypeError: *checkpoint_id* is not a str; a path object loses one of the slashes after the scheme.
            ValueError: *checkpoint_id* is not a URL, or is in another account.
        """
        super().reset(checkpoint_id)
        self._load_id = uuid.uuid4().hex
        self._failure, self._storage, self._version, self._metadata = None, {}, None, None

    def read_metadata(self, *_args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the checkpoint, or with ``rank=``, of the checkpoint that this rank saved alone.

        torch passes ``rank=`` after the first call has failed; errors are then raised when the result is used.

        Raises:
            CheckpointNotFoundError: the folder has no complete checkpoint.
            CheckpointError: the metadata is damaged, or contains something that could run code.
            AzureError: the service refused the request, or could not be reached.
        """
        rank = kwargs.get("rank")
        root = logging.getLogger()  # torch's loader uses it
        root.removeFilter(_without_traceback)
        before, self._failure = self._failure, None
        if rank is not None and before is not None and not isinstance(before, CheckpointNotFoundError):
            self._failure = before
            return _Unread(before)  # torch asks after any failure; only a missing checkpoint is a reason to
        try:
            metadata, version = self._load_metadata(rank)
            self._check_version(version)
        except Exception as error:
            is_missing = isinstance(error, CheckpointNotFoundError)
            if rank is None:
                self._failure = error
                root.addFilter(_without_traceback)
                raise
            return _Unread(before if is_missing and before is not None else error)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self._load_id
        self._version = version if rank is None else None  # ranks that did not coordinate have one each
        return metadata

    @property
    def _overwritten_hint(self) -> str:
        return "; if it was restored from a copy, read it with check_etags=False"

    def _load_metadata(self, rank: int | None) -> tuple[Metadata, Version]:
        """The metadata of all ranks, or that of *rank* alone. Other formats have another way."""
        return self._folder.load(rank)

    def _check_version(self, version: Version) -> None:
        if self._wanted is not None and self._wanted not in (version.save_id, version.etag):
            raise CheckpointError(
                f"{self.checkpoint_id}: there is the checkpoint of save {version.save_id} (ETag {version.etag}), not "
                f"{self._wanted}, which was asked for",
                checkpoint=self.checkpoint_id,
            )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:  # noqa: ARG002 - torch's
        """Begin a load on this rank; called by torch.

        Raises:
            Exception: the metadata could not be read; the error is that of `read_metadata`.
        """
        if isinstance(metadata, _Unread):
            raise metadata.reason
        rank = kwargs.get("rank")
        self._rank = rank if rank is not None else 0
        self._storage = metadata.storage_data or {}
        self._metadata = metadata if self._verify else None
        saved_to = getattr(getattr(metadata, "storage_meta", None), "checkpoint_id", None)
        self._is_original = str(saved_to) == self.checkpoint_id

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Add to the plan which version this rank has read, and on which node it runs."""
        state = _RankState(self._version, this_node())
        if self._load_once_per != "rank" and dist.is_available() and dist.is_initialized():
            state = replace(state, rank=dist.get_rank(), group=fingerprint(members_of(self._group)))
        plan.storage_data = state
        expect_exchange(self._group)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Decide which rank fetches data that several ranks need; called by torch on the coordinator.

        Raises:
            CheckpointError: ranks have read different versions, because another checkpoint was saved in the meantime;
                or ``process_group`` is not that of the load.
        """
        states = [plan.storage_data for plan in plans]
        self._check_agreed([state.version for state in states if isinstance(state, _RankState)])
        for plan, state in zip(plans, states, strict=True):
            plan.storage_data = state.node if isinstance(state, _RankState) else None
        if self._load_once_per != "rank" and len(plans) > 1:
            self._check_group([state for state in states if isinstance(state, _RankState)])
            shared = plan_sharing(plans, by_node=self._load_once_per == "node", size_of=self._size_of)
            for plan, sharing in zip(plans, shared, strict=True):
                plan.storage_data = sharing
        return plans

    def _check_agreed(self, versions: list[Version | None]) -> None:
        """Raise on the coordinator, and so through torch on all ranks, unless all have read the same."""
        digests = [version.digest if version is not None else None for version in versions]
        if len(set(digests)) > 1:
            other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
            saves = [version.save_id if version is not None else None for version in (versions[0], versions[other])]
            raise CheckpointError(
                f"{self.checkpoint_id}: rank 0 has read the checkpoint of save {saves[0]} and rank {other} that of "
                f"save {saves[1]}, since another was saved in the meantime; nothing was loaded: load again",
                checkpoint=self.checkpoint_id,
            )

    def _check_group(self, states: list[_RankState]) -> None:
        """Raise unless all ranks share in the group of the load: in another one, they would wait for others."""
        loading = fingerprint([state.rank for state in states])
        wrong = next((number for number, state in enumerate(states) if state.group != loading), None)
        if wrong is None:
            return
        size = dist.get_world_size(self._group)
        found = f"has {size}" if size != len(states) else f"has other ranks (seen on rank {wrong} of the load)"
        raise CheckpointError(
            f"{self.checkpoint_id}: {len(states)} ranks load, but the process group that BlobStorageReader has for "
            f"load_once_per={self._load_once_per!r} {found}; nothing was loaded. Pass the process_group of dcp.load to "
            "BlobStorageReader, too",
            checkpoint=self.checkpoint_id,
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load the items of *plan*; called by torch on every rank.

        Raises:
            CheckpointError: an item could not be loaded. The message names the item, the rank, and the reason;
                ``touched`` has the entries that may have been modified.
        """
        sharing = plan.storage_data if isinstance(plan.storage_data, Sharing) else None
        keep = sharing.kept() if sharing is not None else ()
        mine = plan.items if sharing is None else sharing.mine(plan.items)
        failure: CheckpointError | None = None
        load = Load(
            self._folder, planner, self._registry, keep, weights_only=self._weights_only, hint=self._overwritten_hint
        )
        try:
            load.verify_with(self._digests())
            with many_objects():
                wanted = [(item, self._item(item.storage_index)) for item in mine]
            load.run(wanted, self._progress)
        except Exception as error:  # noqa: BLE001 - raised below, by all ranks that share
            failure = self._failed(error, load)
        if sharing is not None:
            try:
                sharing.exchange(plan.items, load, failure, self._group)
            except Exception as error:  # noqa: BLE001 - raised below
                failure = failure or self._failed(error, load)
        if failure is not None:
            raise failure from picklable(failure.__cause__ or failure)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _digests(self) -> Digests | None:
        """The digests to compare with; None if nothing is compared.

        Raises:
            CheckpointError: the checkpoint has no digests, or they are damaged.
        """
        if self._metadata is None:
            return None
        found = self._folder.digests(self._metadata)
        if isinstance(found, str):
            raise CheckpointError(
                f"it cannot be verified: {found}; load it without verify=True, or save it with digests=True",
                checkpoint=self.checkpoint_id,
            )
        return found

    def _item(self, index: MetadataIndex) -> Item:
        info = self._storage.get(index)
        if info is None:
            raise CheckpointError(f"the metadata does not say where {index.fqn!r} is stored", key=index.fqn)
        item = read_item(info)
        if not (self._check_etags and self._is_original) and item.etag is not None:
            item = Item(item.path, item.offset, item.length, item.transforms, item.payload)
        return item

    def _size_of(self, index: MetadataIndex) -> int:
        return getattr(self._storage.get(index), "length", 0)

    def _failed(self, error: Exception, load: Load) -> CheckpointError:
        touched = load.touched()
        state = (
            f"{len(touched)} entries of the state dict may have been written to (see touched), first {min(touched)!r}"
            if touched
            else "no tensor was written to"
        )
        failure = CheckpointError(
            f"{self.checkpoint_id}: rank {self._rank} could not load: {describe(error)}; {state}",
            checkpoint=self.checkpoint_id,
            key=getattr(error, "key", None),
            rank=self._rank,
            touched=touched,
        )
        failure.__cause__ = error.__cause__ or error
        return failure
