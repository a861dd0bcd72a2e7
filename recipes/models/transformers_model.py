"""Load a transformers model from a folder of blobs, and save one to it. Only small files touch the local disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from azstoragetorch import join_url
from azstoragetorch.io import BlobIO
from azstoragetorch.safetensors import load_into, save_folder, snapshot


def load_pretrained(url: str, **options: Any) -> PreTrainedModel:
    """The causal language model in the folder *url*; *options* such as ``credential=`` are for the transfers."""
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(snapshot(url, folder, **options))
    # Created without memory: nothing is initialized that the weights replace.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    load_into(model, url, **options)
    restore_buffers(model, config)
    return model.eval()


def restore_buffers(model: PreTrainedModel, config: Any) -> None:
    """Compute the buffers that no file has, such as the frequencies of rotary embeddings."""
    for module in model.modules():
        if any(name in module._non_persistent_buffers_set for name, _ in module.named_buffers(recurse=False)):  # noqa: SLF001
            fresh = type(module)(config)
            for name in module._non_persistent_buffers_set:  # noqa: SLF001
                setattr(module, name, getattr(fresh, name))


def save_pretrained(model: PreTrainedModel, url: str, **options: Any) -> None:
    """Save *model* to the folder *url*, from which `load_pretrained` and, after a download, transformers load it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        for path in Path(folder).iterdir():
            with BlobIO(join_url(url, path.name), "wb", **options) as blob:
                blob.write(path.read_bytes())
    save_folder(model, url, **options)
