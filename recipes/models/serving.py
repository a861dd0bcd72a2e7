"""Weights for an engine that serves a model: names and tensors in a stream, of the shards of this rank."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from azstoragetorch.safetensors import iter_tensors, save_folder
from recipes.access import credential_of_environment

# Layers of which ranks hold rows, and layers of which they hold columns, as engines divide transformers.
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
COLUMNS = ("o_proj", "down_proj")


def shard_of(rank: int, world: int) -> Callable[[str], tuple[int, int, int] | None]:
    """Which part of the tensor of a name is that of *rank* of *world*."""

    def choose(name: str) -> tuple[int, int, int] | None:
        layer = name.split(".")[-2] if "." in name else name
        dim = 0 if layer in ROWS else 1 if layer in COLUMNS else None
        return None if dim is None else (dim, rank, world)

    return choose


def weights(url: str, *, rank: int = 0, world: int = 1, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the model in the folder *url*: what ``load_weights`` of an engine takes.

    They come in the order in which they arrive, and only requests in flight take memory.
    """
    return iter_tensors(url, shard=shard_of(rank, world), **options)


def load_weights(
    model: nn.Module, stream: Iterable[tuple[str, torch.Tensor]], renamed: Mapping[str, str] | None = None
) -> set[str]:
    """Copy the weights of *stream* into *model*, as engines do; returns the names of the parameters that were loaded.

    *renamed* has the name in the model of each name in the files that differs.
    """
    parameters = dict(model.named_parameters())
    loaded = set()
    with torch.no_grad():
        for name, tensor in stream:
            target = parameters[(renamed or {}).get(name, name)]
            target.copy_(tensor)
            loaded.add((renamed or {}).get(name, name))
    return loaded


def tiny_weights() -> dict[str, torch.Tensor]:
    """Weights with the names of a transformer's, for a try."""
    layers = [f"model.layers.{number}.{name}" for number in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
    return {f"{layer}.weight": torch.randn(64, 64) for layer in layers} | {"model.norm.weight": torch.ones(64)}


def main() -> None:
    parser = argparse.ArgumentParser(description="List the weights of one rank as they arrive.")
    parser.add_argument("url", help="a folder of safetensors; a SAS may be in it")
    parser.add_argument("--create", action="store_true", help="first save tiny weights there")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=2)
    arguments = parser.parse_args()
    credential = credential_of_environment()
    if arguments.create:
        save_folder(tiny_weights(), arguments.url, credential=credential)
    for name, tensor in weights(arguments.url, rank=arguments.rank, world=arguments.world, credential=credential):
        print(f"{name}: {tuple(tensor.shape)}")


if __name__ == "__main__":
    main()
