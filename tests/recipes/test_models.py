"""The recipe for serving: each rank streams its part of the weights."""

from __future__ import annotations

import torch
from torch import nn

from azstoragetorch.safetensors import save_folder
from recipes.models.serving import load_weights, shard_of, weights
from tests.azurite.container import Container


class Block(nn.Module):
    """A feed-forward block, of which *world* ranks hold a part each."""

    def __init__(self, world: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up_proj = nn.Linear(16, 64 // world, bias=False)
        self.down_proj = nn.Linear(64 // world, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(self.norm(x))))


def test_the_ranks_together_compute_what_the_model_computes(container: Container) -> None:
    url = container.blob_url("model")
    model = Block()
    save_folder(model, url, max_shard_size=3000, credential=container.key)
    x = torch.randn(5, 16)
    total = torch.zeros(5, 16)
    for rank in range(4):
        part = Block(world=4)
        names = load_weights(part, weights(url, rank=rank, world=4, credential=container.key))
        assert names == {name for name, _ in model.named_parameters()}
        total += part(x)
    torch.testing.assert_close(total, model(x))


def test_parts_by_the_name_of_the_layer() -> None:
    choose = shard_of(1, 4)
    assert choose("model.layers.0.mlp.up_proj.weight") == (0, 1, 4)
    assert choose("model.layers.0.mlp.down_proj.weight") == (1, 1, 4)
    assert choose("model.norm.weight") is None
