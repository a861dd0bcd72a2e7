"""The recipe for transformers, with the real package and a small model that is made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from azstoragetorch.safetensors import load_model_folder, save_folder, snapshot
from tests.azurite.container import Container

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(300)]


@pytest.fixture
def model() -> object:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def outputs(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits  # type: ignore[operator]


def test_a_model_is_saved_to_blobs_and_loaded_from_them(container: Container, model: object) -> None:
    from recipes.models.transformers_model import load_pretrained, save_pretrained

    url = container.blob_url("llama")
    save_pretrained(model, url, credential=container.key)  # type: ignore[arg-type]
    loaded = load_pretrained(url, credential=container.key)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_transformers_loads_what_save_folder_saved(container: Container, model: object, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from recipes.models.transformers_model import save_pretrained

    url = container.blob_url("llama")
    save_pretrained(model, url, credential=container.key)  # type: ignore[arg-type]
    save_folder(model, url, max_shard_size=30_000, credential=container.key)  # type: ignore[arg-type]
    local = snapshot(url, tmp_path / "local", ignore=(), credential=container.key)
    assert len(list(local.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(local).eval()
    assert torch.equal(outputs(loaded), outputs(model))


def test_what_save_pretrained_saved_is_loaded(container: Container, model: object, tmp_path: Path) -> None:
    from recipes.models.transformers_model import load_pretrained

    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")  # type: ignore[attr-defined]
    for path in (tmp_path / "saved").iterdir():
        container.put(f"theirs/{path.name}", path.read_bytes())
    url = container.blob_url("theirs")
    assert torch.equal(outputs(load_pretrained(url, credential=container.key)), outputs(model))
    names = set(load_model_folder(url, credential=container.key))
    assert "model.embed_tokens.weight" in names
