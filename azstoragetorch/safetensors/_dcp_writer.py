"""Safetensors files as a checkpoint of torch.distributed.checkpoint: writing.

Every rank writes its tensors, or its parts of tensors, into separate files. What makes them a model comes last, from
the coordinator: an index; or, if ranks write parts, the parts put together into whole tensors, or nothing. In the last
case every file has the number of files of the save in its metadata, so that a reader sees when one is missing.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.checkpoint._storage import FolderStorage
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._copying import bytes_of_model, layout_of_model
from azstoragetorch.safetensors._files import open_files
from azstoragetorch.safetensors._folder import SUFFIX, Folder
from azstoragetorch.safetensors._model import OFFSETS, SAVE, SHARDING, model_of_files
from azstoragetorch.safetensors._save import kind_of, layout_of, write_file, write_pieces
from azstoragetorch.safetensors._save_folder import Before, commit, delete, encode_index, look, names_of

_Files = dict[tuple[int, int], list[WriteItem]]
"""The items of each file, by the rank that writes it and its number in the mapping."""


class HuggingFaceBlobWriter(FolderStorage, StorageWriter):
    """Saves a state dict as safetensors files in a folder, for `torch.distributed.checkpoint.save`.

    What torch's ``HuggingFaceStorageWriter`` is for local folders. The state dict has tensors only, without nesting:
    pass ``model.state_dict()``. If tensors are sharded over ranks, choose how to store them:

    - ``save_distributed=True``: each rank writes files with its parts, which :class:`HuggingFaceBlobReader`,
      :func:`load_model_folder`, and torch's ``HuggingFaceStorageReader`` put together. The folder must not have a
      model.
    - ``enable_consolidation=True``: the parts are then put together into files that any reader of safetensors can
      load. The coordinator does this, in memory of limited size, and deletes the parts.

    A model that the folder has is replaced at once, by the index, as :func:`save_folder` does.

    Args:
        url: URL of the folder. ``checkpoint_id`` of ``dcp.save`` selects another folder in the same account.
        fqn_to_index_mapping: The number of the file, from 1, for each name. By default, one file for each rank.
        save_distributed: Ranks store parts of tensors. Otherwise, a tensor that is sharded is an error.
        enable_consolidation: Ranks store parts of tensors, which are then put together.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Saving raises :class:`~azstoragetorch.exceptions.SafetensorsError`, and errors of the service. With more than one
    rank, torch wraps them, on all ranks, in its ``CheckpointException``.
    """

    def __init__(
        self,
        url: str,
        *,
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__(url, credential, transfer)
        self._mapping = dict(fqn_to_index_mapping) if fqn_to_index_mapping is not None else None
        self._in_parts = save_distributed or enable_consolidation
        self._consolidates = enable_consolidation
        self._before: Before | None = None
        self._names: list[str] = []
        self._place = ""

    @property
    def _target(self) -> Folder:
        return Folder(self._folder.container, self._folder.address)

    def storage_meta(self) -> StorageMeta:
        """Return the metadata that identifies this save."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Begin a save on this rank; called by torch.

        Raises:
            SafetensorsError: parts are to be stored in a folder that has a model.
        """
        self._before = None
        if is_coordinator:
            self._before = look(self._target, overwrite=not self._in_parts or self._consolidates)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged; called by torch on every rank."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide which rank writes which files; called by torch on the coordinator.

        Raises:
            SafetensorsError: an entry is not a tensor, or is a part of one and parts are not stored; or
                ``fqn_to_index_mapping`` lacks a name.
        """
        assert self._before is not None
        files = self._files_of(plans)
        save = os.urandom(8).hex()
        if self._in_parts:
            place = f"sharded-{save}/" if self._consolidates else ""
            count = max((number for _, number in files), default=1)
            names = {key: f"{place}shard-{key[0] + 1:05d}-model-{key[1]:05d}-of-{count:05d}{SUFFIX}" for key in files}
        else:
            names = dict(zip(files, names_of(max(1, len(files)), self._before), strict=False))
        self._names = list(names.values())
        self._place = f"{save}/{len(files)}"
        return [
            replace(plan, storage_data=(self._place, {names[key]: key[1] for key in files if key[0] == rank}))
            for rank, plan in enumerate(plans)
        ]

    def _files_of(self, plans: list[SavePlan]) -> _Files:
        files: _Files = defaultdict(list)
        for rank, plan in enumerate(plans):
            for item in plan.items:
                self._check(item)
                files[rank, self._number(item)].append(item)
        return dict(sorted(files.items()))

    def _number(self, item: WriteItem) -> int:
        if self._mapping is None:
            return 1
        if item.index.fqn not in self._mapping:
            raise self._error(f"fqn_to_index_mapping has no number for {item.index.fqn!r}", item.index.fqn)
        return self._mapping[item.index.fqn]

    def _check(self, item: WriteItem) -> None:
        data, name = item.tensor_data, item.index.fqn
        if item.type == WriteItemType.BYTE_IO or data is None:
            raise self._error(f"{name!r} is not a tensor, and safetensors files have only tensors", name)
        if not self._in_parts and data.chunk.sizes != data.size:
            raise self._error(
                f"{name!r} is sharded: rank-local parts of it are {list(data.chunk.sizes)} of {list(data.size)}; pass "
                "save_distributed=True, or enable_consolidation=True to have the parts put together",
                name,
            )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Upload the files of this rank; called by torch on every rank.

        Raises:
            SafetensorsError: a tensor cannot be stored in a safetensors file.
            FatalBlobIOWriteError: a write failed.
        """
        place, files = plan.storage_data
        folder = self._target
        results: list[WriteResult] = []
        for name, number in files.items():
            items = [item for item in plan.items if self._number(item) == number]
            _check_once(items)
            results += self._write_file(folder, name, place, items, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(
        self, folder: Folder, name: str, place: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        tensors: dict[str, torch.Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item in items:
            value: Any = planner.resolve_data(item)
            fqn = item.index.fqn
            assert item.tensor_data is not None
            kind_of(fqn, value, folder.url)
            tensors[fqn] = value.detach()
            offsets[fqn] = {OFFSETS: list(item.tensor_data.chunk.offsets)}
        metadata = {"format": "pt"}
        if self._in_parts:
            metadata |= {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0", SAVE: place}
        layout = layout_of(tensors, metadata, folder.url)
        write_file(folder.blob(name), tensors, layout)
        return [WriteResult(item.index, tensors[item.index.fqn].nbytes, name) for item in items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the files as a model; called by torch on the coordinator when all ranks have succeeded.

        Raises:
            SafetensorsError: another save was committed in the meantime; this one has no effect.
            AzureError, FatalBlobIOWriteError: a write failed.
        """
        before, folder = self._before, self._target
        assert before is not None
        if self._consolidates:
            self._consolidate(folder, before, metadata)
        elif not self._in_parts:
            placed = {written.index.fqn: written.storage_data for rank in results for written in rank}
            total = sum(written.size_in_bytes for rank in results for written in rank)
            if not placed:
                write_file(folder.blob(self._names_or_single()[0]), {}, layout_of({}, {"format": "pt"}, folder.url))
            commit(folder, before, self._names_or_single(), encode_index(placed, total))

    def _names_or_single(self) -> list[str]:
        assert self._before is not None
        if not self._names:
            self._names = names_of(1, self._before)
        return self._names

    def _consolidate(self, folder: Folder, before: Before, metadata: Metadata) -> None:
        """Put the parts of all ranks together, into files for the numbers of the mapping."""
        model = model_of_files(folder.url, open_files([folder.blob(name) for name in self._names], "which was written"))
        groups: dict[int, list[str]] = defaultdict(list)
        for name in metadata.state_dict_metadata:
            groups[self._mapping[name] if self._mapping is not None else 1].append(name)
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != model.tensors[name].shape:
                raise self._error(f"no rank has saved all of {name!r}, so the save has no effect", name)
        names = names_of(max(1, len(groups)), before)
        placed: dict[str, str] = {}
        for file, (_, group) in zip(names, sorted(groups.items()) or [(1, [])], strict=True):
            layout = layout_of_model(model, group, {"format": "pt"})
            write_pieces(folder.blob(file), layout, bytes_of_model(model, layout.names))
            placed |= dict.fromkeys(group, file)
        total = sum(model.tensors[name].nbytes for name in placed)
        commit(folder, before, names, encode_index(placed, total))
        delete(folder, self._names)

    def _error(self, what: str, name: str | None = None) -> SafetensorsError:
        return SafetensorsError(f"{self.checkpoint_id}: {what}", url=self.checkpoint_id, tensor=name)


def _check_once(items: list[WriteItem]) -> None:
    """Raise unless *items* have each name once: a file has one tensor of a name."""
    name, count = Counter(item.index.fqn for item in items).most_common(1)[0]
    if count > 1:
        raise SafetensorsError(
            f"{name!r} has {count} parts on one rank, and a safetensors file has one tensor of a name", tensor=name
        )
