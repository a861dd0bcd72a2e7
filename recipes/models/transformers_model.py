"""Load a transformers model from a folder of blobs, and save one to it. Only small files touch the local disk."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from azstoragetorch import join_url
from azstoragetorch.io import BlobIO
from azstoragetorch.safetensors import load_into, save_folder, snapshot
from recipes.access import credential_of_environment


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Save a tiny model to blobs, load it, and compare what both compute.")
    parser.add_argument("url", help="a folder for the model; a SAS may be in it")
    arguments = parser.parse_args()
    credential = credential_of_environment()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=100, **size)).eval()
    save_pretrained(made, arguments.url, credential=credential)
    loaded = load_pretrained(arguments.url, credential=credential)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        is_same = torch.equal(made(tokens).logits, loaded(tokens).logits)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    print(f"{parameters} parameters; both models compute {'the same' if is_same else 'something else'}")


if __name__ == "__main__":
    main()
