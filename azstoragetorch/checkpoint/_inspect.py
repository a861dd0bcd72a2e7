"""Describe the contents of a checkpoint, reading only its metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._format import digests_of, read_item


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a checkpoint. Tensors have a dtype, a shape, and a number of saved shards; other entries do not."""

    key: str
    nbytes: int
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    shards: int = 1


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """The contents of a checkpoint. ``str()`` returns a table; ``nbytes`` counts the data of the entries.

    ``has_digests`` says that it was saved with digests, which ``verify=True`` compares with.
    """

    url: str
    entries: tuple[Entry, ...]
    blobs: int = field(default=0)
    has_digests: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.entries)

    def __str__(self) -> str:
        rows = [
            (
                entry.key,
                str(entry.dtype).removeprefix("torch.") if entry.dtype is not None else "object",
                "x".join(map(str, entry.shape)) if entry.shape else "" if entry.shape is None else "scalar",
                str(entry.shards),
                f"{entry.nbytes:,}",
            )
            for entry in self.entries
        ]
        rows.insert(0, ("key", "type", "shape", "shards", "bytes"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        form = "{:<%d}  {:<%d}  {:<%d}  {:>%d}  {:>%d}" % tuple(widths)  # noqa: UP031 - a format of a format
        lines = [form.format(*row) for row in rows]
        total = f"{len(self.entries)} entries, {self.nbytes:,} bytes, {self.blobs} data blobs"
        total += ", with digests" if self.has_digests else ""
        return "\n".join([self.url, *(line.rstrip() for line in lines), total])


def inspect_checkpoint(
    url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> CheckpointSummary:
    """List the contents of the checkpoint in the folder *url*, from its metadata only. ``print`` shows a table.

    Raises:
        CheckpointNotFoundError: the folder has no complete checkpoint.
        CheckpointError: the metadata is damaged, or contains something that could run code.
        AzureError: the service refused the request, or could not be reached.
    """
    folder = Folder(url, credential, transfer)
    metadata = folder.metadata()
    lengths = {index.fqn: info.length for index, info in metadata.storage_data.items()}
    entries = []
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            dtype, shape = entry.properties.dtype, tuple(entry.size)
            entries.append(Entry(key, math.prod(shape) * dtype.itemsize, dtype, shape, len(entry.chunks)))
        else:
            entries.append(Entry(key, lengths.get(key, 0)))
    paths = {read_item(info).path for info in metadata.storage_data.values()}
    return CheckpointSummary(folder.url, tuple(entries), len(paths), digests_of(metadata) is not None)
