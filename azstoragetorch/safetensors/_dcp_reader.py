"""Safetensors files as a checkpoint of torch.distributed.checkpoint: reading. `BlobStorageReader` does the loading."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.planning import contiguous_strides
from azstoragetorch._tensors.progress import ProgressCallback
from azstoragetorch.checkpoint._folder import Version
from azstoragetorch.checkpoint._format import Item, Payload, storage_info
from azstoragetorch.checkpoint._reader import BlobStorageReader
from azstoragetorch.exceptions import CheckpointError
from azstoragetorch.safetensors._folder import Folder
from azstoragetorch.safetensors._model import Model


class HuggingFaceBlobReader(BlobStorageReader):
    """Loads a model that is saved as safetensors files in a folder, for `torch.distributed.checkpoint.load`.

    What torch's ``HuggingFaceStorageReader`` is for local folders. The state dict may be spread over ranks: each rank
    fetches only the bytes of its shards. Files that several ranks wrote, by :class:`HuggingFaceBlobWriter` or by
    torch's ``HuggingFaceStorageWriter``, are put together. All data is from the versions whose headers were read.

    Args:
        url: URL of the folder. ``checkpoint_id`` of ``dcp.load`` selects another folder in the same account.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.
        load_once_per: Same as for :class:`~azstoragetorch.checkpoint.BlobStorageReader`.
        process_group: Same as for :class:`~azstoragetorch.checkpoint.BlobStorageReader`.
        progress: Called with the bytes done and planned on this rank, from any thread but one call at a time.

    Loading raises :class:`~azstoragetorch.exceptions.SafetensorsError`,
    :class:`~azstoragetorch.exceptions.CheckpointError`, and errors of the service. torch wraps them, on all ranks, in
    its ``CheckpointException``.
    """

    def __init__(
        self,
        url: str,
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
        load_once_per: str = "rank",
        process_group: Any = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        super().__init__(
            url,
            credential=credential,
            transfer=transfer,
            load_once_per=load_once_per,
            process_group=process_group,
            progress=progress,
        )

    @property
    def _overwritten_hint(self) -> str:
        return "; load again"

    def _load_metadata(self, rank: int | None) -> tuple[Metadata, Version]:
        if rank is not None:
            raise CheckpointError(f"{self.checkpoint_id}: safetensors files are of all ranks", rank=rank)
        folder = Folder(self._folder.container, self._folder.address)
        model = folder.open()
        metadata = _metadata_of(model, folder.prefix)
        metadata.storage_meta = StorageMeta(checkpoint_id=self.checkpoint_id)
        versions = repr(sorted((file.url, file.version.etag) for file in model.files)).encode()
        return metadata, Version(hashlib.sha256(versions).hexdigest(), hashlib.sha256(versions).hexdigest(), None)


def _metadata_of(model: Model, prefix: str) -> Metadata:
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    for name, stored in model.tensors.items():
        chunks = []
        for chunk in stored.chunks:
            offsets, lengths = torch.Size(chunk.box.offsets), torch.Size(chunk.box.lengths)
            payload = Payload(0, stored.dtype, chunk.box.lengths, contiguous_strides(chunk.box.lengths))
            path = chunk.file.client.url.blob.removeprefix(prefix)
            item = Item(path, chunk.base, payload.nbytes, payload=payload, etag=chunk.file.version.etag)
            chunks.append(ChunkStorageMetadata(offsets, lengths))
            places[MetadataIndex(name, offsets)] = storage_info(item)
        properties = TensorProperties(dtype=stored.dtype)
        entries[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
    return Metadata(entries, storage_data=places)
