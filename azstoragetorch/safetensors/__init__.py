"""Models as safetensors, straight from and to blobs: whole, in slices, or a part for each rank.

``header`` parses and builds headers, ``files`` opens files, ``folder`` finds those of a model, and ``model`` says where
the bytes of each tensor are. ``fetch`` gets them, with the planner that checkpoints use; ``shared`` has ranks fetch
once for all. ``open``, ``load``, ``iterate``, ``into``, ``save``, and ``save_folder`` are what users call, and
``dcp_reader`` and ``dcp_writer`` are what torch.distributed.checkpoint calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from azstoragetorch.safetensors._into import LoadedKeys, load_into
from azstoragetorch.safetensors._iterate import iter_tensors
from azstoragetorch.safetensors._load import load_file, load_model_folder
from azstoragetorch.safetensors._open import TensorSlice, safe_open
from azstoragetorch.safetensors._save import save_file
from azstoragetorch.safetensors._save_folder import save_folder

if TYPE_CHECKING:
    from azstoragetorch.safetensors._dcp_reader import HuggingFaceBlobReader
    from azstoragetorch.safetensors._dcp_writer import HuggingFaceBlobWriter

__all__ = [
    "HuggingFaceBlobReader",
    "HuggingFaceBlobWriter",
    "LoadedKeys",
    "TensorSlice",
    "iter_tensors",
    "load_file",
    "load_into",
    "load_model_folder",
    "safe_open",
    "save_file",
    "save_folder",
]


def __getattr__(name: str) -> Any:
    # torch.distributed.checkpoint takes longer to import than all the rest, and serving does not need it.
    if name == "HuggingFaceBlobReader":
        from azstoragetorch.safetensors._dcp_reader import HuggingFaceBlobReader

        return HuggingFaceBlobReader
    if name == "HuggingFaceBlobWriter":
        from azstoragetorch.safetensors._dcp_writer import HuggingFaceBlobWriter

        return HuggingFaceBlobWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
