"""Distributed checkpoints (`torch.distributed.checkpoint`) on Azure Blob Storage, and their management.

``writer`` and ``reader`` are what torch calls; what they have in common is in ``storage``. ``encoding`` turns items
into the bytes of data blobs. A ``load`` carries out what torch's planner asks for: ``reads`` says what that is of which
blobs, ``receiving`` gets it into memory, and ``sharing`` has ranks fetch once for all. Below them
``format`` knows what a checkpoint consists of and ``folder`` where it all is; ``_tensors`` plans the requests and gets
their bytes into tensors. ``commit`` is how saves, deletions and cleaning stay out of each other's way, and argues why.
``catalog`` finds checkpoints and keeps the last, by ``order``; ``cleaning`` removes them, ``inspect`` looks into them,
and ``convert`` loads entries and converts. ``urls`` has torch's functions choose the writer or reader for a URL.
Connections and threads belong to the core.
"""

from __future__ import annotations

from azstoragetorch._tensors.progress import ProgressCallback, TqdmProgress
from azstoragetorch.checkpoint._catalog import keep_last, latest_checkpoint, list_checkpoints
from azstoragetorch.checkpoint._cleaning import clean, delete_checkpoint
from azstoragetorch.checkpoint._convert import checkpoint_to_torch_save, load_keys, torch_save_to_checkpoint
from azstoragetorch.checkpoint._inspect import CheckpointSummary, Entry, inspect_checkpoint
from azstoragetorch.checkpoint._reader import BlobStorageReader
from azstoragetorch.checkpoint._urls import disable_urls, enable_urls
from azstoragetorch.checkpoint._writer import BlobStorageWriter

__all__ = [
    "BlobStorageReader",
    "BlobStorageWriter",
    "CheckpointSummary",
    "Entry",
    "ProgressCallback",
    "TqdmProgress",
    "checkpoint_to_torch_save",
    "clean",
    "delete_checkpoint",
    "disable_urls",
    "enable_urls",
    "inspect_checkpoint",
    "keep_last",
    "latest_checkpoint",
    "list_checkpoints",
    "load_keys",
    "torch_save_to_checkpoint",
]
