"""The Lightning plugin under a real Trainer: what ModelCheckpoint does with local files, it does with blobs.

`make frameworks` runs these with Lightning installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from recipes.checkpoints.lightning import BlobCheckpointIO
from tests.azurite.container import Container

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed; `make frameworks` installs it")
pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


class Line(pl.LightningModule):  # type: ignore[misc,name-defined]
    """A model that notes the epochs that it has trained in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.epochs: list[int] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def on_train_epoch_start(self) -> None:
        self.epochs.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4)


def fit(container: Container, root: Path, epochs: int, *, ckpt_path: str | None = None, **options: Any) -> Line:
    """Train on a machine where *root* is the folder for checkpoints."""
    save_last = options.pop("save_last", True)
    plugin = BlobCheckpointIO(container.blob_url("run"), root=root, credential=container.key)
    keep = pl.callbacks.ModelCheckpoint(dirpath=root, filename="e{epoch}", save_last=save_last, save_top_k=-1)
    trainer = pl.Trainer(
        plugins=[plugin],
        callbacks=[keep],
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root.parent,
        **{"devices": 1, **options},
    )
    model = Line()
    trainer.fit(model, ckpt_path=ckpt_path)
    return model


def test_the_last_checkpoint_is_found_on_another_machine(container: Container, tmp_path: Path) -> None:
    assert fit(container, tmp_path / "one" / "checkpoints", 2).epochs == [0, 1]
    names = ["run/eepoch=0.ckpt", "run/eepoch=1.ckpt", "run/last.ckpt"]
    assert container.names() == names
    assert fit(container, tmp_path / "two" / "checkpoints", 4, ckpt_path="last").epochs == [2, 3]
    assert "run/eepoch=3.ckpt" in container.names()


@pytest.mark.parametrize("second", ["one", "two"])
def test_equal_names_get_a_version(container: Container, tmp_path: Path, second: str) -> None:
    """A second run from the beginning overwrites nothing, on this machine or another."""
    fit(container, tmp_path / "one" / "checkpoints", 1)
    first = {name: container.get(name) for name in container.names()}
    fit(container, tmp_path / second / "checkpoints", 1)
    assert container.names() == [
        "run/eepoch=0-v1.ckpt", "run/eepoch=0.ckpt", "run/last-v1.ckpt", "run/last.ckpt",
    ]  # fmt: skip
    assert {name: container.get(name) for name in first} == first


def test_links_are_refused(container: Container, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use ModelCheckpoint\\(save_last=True\\) instead of save_last='link'"):
        fit(container, tmp_path / "one" / "checkpoints", 3, save_last="link")


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_spawned_ranks_hand_their_weights_over(container: Container, tmp_path: Path, strategy: str) -> None:
    """Lightning saves the final weights to a temporary local file through the plugin; checkpoints are blobs."""
    root = tmp_path / "one" / "checkpoints"
    model = fit(container, root, 1, strategy=strategy, devices=2)
    assert container.names() == ["run/eepoch=0.ckpt", "run/last.ckpt"]
    saved = BlobCheckpointIO(container.blob_url("run"), root=root, credential=container.key)
    weights = saved.load_checkpoint(root / "last.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(weights["layer.weight"], model.layer.weight.detach())


def test_a_trainer_takes_the_plugin(container: Container, tmp_path: Path) -> None:
    plugin = BlobCheckpointIO(container.blob_url("run"), root=tmp_path, credential=container.key)
    trainer = pl.Trainer(plugins=[plugin], max_epochs=0, logger=False, default_root_dir=tmp_path)
    assert trainer.strategy.checkpoint_io is plugin
