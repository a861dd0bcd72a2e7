"""Models as safetensors, straight from and to blobs: whole, in slices, or a part for each rank.

Files and folders have the formats of the package safetensors and of the Hugging Face Hub. :doc:`The guide
</guide/safetensors>` says which function to call for what.
"""

# `_header` parses and builds headers, `_files` opens files, `_folder` finds those of a model, and `_model` says where
# the bytes of each tensor are. `_fetch` gets them, with the planner that checkpoints use; `_shared` has ranks fetch
# once for all. `_open`, `_load`, `_iterate`, `_into`, `_save`, and `_save_folder` are what users call, and
# `_dcp_reader` and `_dcp_writer` are what torch.distributed.checkpoint calls.

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from azstoragetorch.safetensors._describe import FileSummary, ModelSummary, TensorSummary, describe_model
from azstoragetorch.safetensors._into import LoadedKeys, load_into
from azstoragetorch.safetensors._iterate import iter_tensors
from azstoragetorch.safetensors._load import load_file, load_model_folder
from azstoragetorch.safetensors._open import TensorSlice, safe_open
from azstoragetorch.safetensors._save import save_file
from azstoragetorch.safetensors._save_folder import save_folder
from azstoragetorch.safetensors._snapshot import snapshot

if TYPE_CHECKING:
    from azstoragetorch.safetensors._convert import (
        checkpoint_to_safetensors,
        safetensors_to_checkpoint,
        safetensors_to_torch_save,
        torch_save_to_safetensors,
    )
    from azstoragetorch.safetensors._dcp_reader import HuggingFaceBlobReader
    from azstoragetorch.safetensors._dcp_writer import HuggingFaceBlobWriter

__all__ = [
    "FileSummary",
    "HuggingFaceBlobReader",
    "HuggingFaceBlobWriter",
    "LoadedKeys",
    "ModelSummary",
    "TensorSlice",
    "TensorSummary",
    "checkpoint_to_safetensors",
    "describe_model",
    "iter_tensors",
    "load_file",
    "load_into",
    "load_model_folder",
    "safe_open",
    "safetensors_to_checkpoint",
    "safetensors_to_torch_save",
    "save_file",
    "save_folder",
    "snapshot",
    "torch_save_to_safetensors",
]

# torch.distributed.checkpoint takes longer to import than all the rest, and serving does not need it.
_LATE = {
    "HuggingFaceBlobReader": "_dcp_reader",
    "HuggingFaceBlobWriter": "_dcp_writer",
    "checkpoint_to_safetensors": "_convert",
    "safetensors_to_checkpoint": "_convert",
    "safetensors_to_torch_save": "_convert",
    "torch_save_to_safetensors": "_convert",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
