"""Distributed checkpoints (`torch.distributed.checkpoint`) on Azure Blob Storage.

Pass a `BlobStorageWriter` to ``dcp.save`` or ``dcp.async_save`` and a `BlobStorageReader` to ``dcp.load``, or call
`enable_urls` and pass URLs. Other functions find, inspect, convert, and delete checkpoints.

A checkpoint is a folder in torch's format. A save is all or nothing: one request, for the blob ``.metadata``, makes it
visible. :doc:`The guide </guide/checkpoints>` describes concurrent jobs, failures, and untrusted checkpoints.
"""

# Structure: `_writer` and `_reader` implement torch's interfaces, and share `_storage`; `_urls` gives them to torch for
# URLs. `_encoding` encodes items for data blobs. `_load` executes the plan of a load: `_reads` determines the ranges,
# `_receiving` receives them, and `_sharing` lets ranks fetch shared data once. `_format` parses and writes metadata;
# `_folder` knows the names in a folder. The package `_tensors` plans requests and copies bytes into tensors. `_commit`
# explains how concurrent saves, deletions, and cleaning stay consistent. `_catalog` lists checkpoints in the order of
# `_order`, `_cleaning` deletes them, `_inspect` reads metadata, and `_convert` loads entries and converts.

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
