"""Models as safetensors, straight from and to blobs: whole, in slices, or a part for each rank.

``header`` parses and builds headers, ``files`` opens files, ``folder`` finds those of a model, and ``model`` says where
the bytes of each tensor are. ``fetch`` gets them, with the planner that checkpoints use; ``shared`` has ranks fetch
once for all. ``open``, ``load``, ``iterate``, ``into``, ``save``, and ``save_folder`` are what users call.
"""

from __future__ import annotations

from azstoragetorch.safetensors._into import LoadedKeys, load_into
from azstoragetorch.safetensors._iterate import iter_tensors
from azstoragetorch.safetensors._load import load_file, load_model_folder
from azstoragetorch.safetensors._open import TensorSlice, safe_open
from azstoragetorch.safetensors._save import save_file
from azstoragetorch.safetensors._save_folder import save_folder

__all__ = [
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
