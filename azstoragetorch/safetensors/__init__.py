"""Models as safetensors, straight from and to blobs: whole, in slices, or a part for each rank.

``header`` parses and builds headers, ``files`` opens files and ``model`` says where the bytes of each tensor are;
``fetch`` gets them, with the planner that checkpoints use. ``open``, ``load`` and ``save`` are what users call.
"""

from __future__ import annotations

from azstoragetorch.safetensors._load import load_file
from azstoragetorch.safetensors._open import TensorSlice, safe_open
from azstoragetorch.safetensors._save import save_file

__all__ = ["TensorSlice", "load_file", "safe_open", "save_file"]
