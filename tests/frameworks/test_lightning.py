"""The Lightning plugin under a real Trainer: what ModelCheckpoint does with local files, it does with blobs."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.azurite.container import Container

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed; `make frameworks` installs it")
from azstoragetorch.lightning import BlobCheckpointIO  # noqa: E402

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


def test_a_path_below_the_root_is_a_blob_and_a_url_too(container: Container, tmp_path: Path) -> None:
    plugin = BlobCheckpointIO(container.blob_url("run"), root=tmp_path, credential=container.key)
    state = {"state_dict": {"w": torch.randn(100)}, "epoch": 3}
    path = tmp_path / "deep" / "epoch=3-step=4.ckpt"
    plugin.save_checkpoint(state, path)
    name = "run/deep/epoch=3-step=4.ckpt"
    assert container.names() == [name]
    assert torch.equal(torch.load(io.BytesIO(container.get(name)))["state_dict"]["w"], state["state_dict"]["w"])
    loaded = plugin.load_checkpoint(path, map_location=lambda storage, _: storage)
    assert torch.equal(loaded["state_dict"]["w"], state["state_dict"]["w"])
    assert plugin.load_checkpoint(container.blob_url(name))["epoch"] == 3
    assert path.read_text() == f"This checkpoint is a blob: {container.blob_url(name)}\n"
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(path)
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=f"the blob {container.blob_url('run')}/deep/epoch"):
        plugin.load_checkpoint(path)
    assert container.names() == []
    with pytest.raises(TypeError, match="storage_options are not supported"):
        plugin.save_checkpoint(state, path, storage_options={"a": 1})
    with pytest.raises(ValueError, match="is the folder of the checkpoints"):
        plugin.save_checkpoint(state, tmp_path)


def test_other_paths_are_local_files(
    container: Container, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warning, unless they are temporary: the user may expect a blob."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    plugin = BlobCheckpointIO(container.blob_url("run"), root=tmp_path / "root", credential=container.key)
    for place, is_warned in ((tmp_path / "temporary" / "a.ckpt", False), (tmp_path / "outside.ckpt", True)):
        plugin.save_checkpoint({"epoch": 3}, place)
        assert ("is saved as a local file: it is not below" in caplog.text) is is_warned
        assert plugin.load_checkpoint(place) == {"epoch": 3}
        plugin.remove_checkpoint(place)
        assert not place.exists()
    assert container.names() == []


def test_a_sas_in_the_url(container: Container, tmp_path: Path) -> None:
    plugin = BlobCheckpointIO(container.blob_sas_url("run"), root=tmp_path)
    plugin.save_checkpoint({"epoch": 3}, tmp_path / "a.ckpt")
    assert container.names() == ["run/a.ckpt"]
    again = BlobCheckpointIO(container.blob_sas_url("run"), root=tmp_path / "new")
    assert (tmp_path / "new/a.ckpt").read_text() == f"This checkpoint is a blob: {container.blob_url('run')}/a.ckpt\n"
    assert again.load_checkpoint(tmp_path / "new/a.ckpt") == {"epoch": 3}
    again.remove_checkpoint(tmp_path / "new/a.ckpt")
    assert container.names() == []


def test_an_interrupted_save_leaves_the_checkpoint_that_was_there(container: Container, tmp_path: Path) -> None:
    class Fails:
        def __reduce__(self) -> Any:
            raise OSError("the disk is on fire")

    plugin = BlobCheckpointIO(container.blob_url("run"), root=tmp_path, credential=container.key)
    plugin.save_checkpoint({"w": torch.ones(100)}, tmp_path / "last.ckpt")
    with pytest.raises(OSError, match="the disk is on fire"):
        plugin.save_checkpoint({"w": torch.zeros(100), "x": Fails()}, tmp_path / "last.ckpt")
    assert torch.equal(plugin.load_checkpoint(tmp_path / "last.ckpt")["w"], torch.ones(100))


def test_names_outside_the_root_get_no_local_file(container: Container, tmp_path: Path) -> None:
    for name in ("run//etc/outside.ckpt", "run/ok.ckpt", "run/model.bin"):
        container.put(name, b"")
    BlobCheckpointIO(container.blob_url("run"), root=tmp_path / "root", credential=container.key)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["ok.ckpt"]


def test_a_file_of_the_user_is_not_overwritten(container: Container, tmp_path: Path) -> None:
    container.put("run/mine.ckpt", b"blob")
    (tmp_path / "mine.ckpt").write_bytes(b"file")
    BlobCheckpointIO(container.blob_url("run"), root=tmp_path, credential=container.key)
    assert (tmp_path / "mine.ckpt").read_bytes() == b"file"


def test_the_older_package_gets_its_own_plugin(tmp_path: Path) -> None:
    """A Trainer accepts only plugins of its own package."""
    program = (
        "import pytorch_lightning\nfrom pytorch_lightning.plugins.io import CheckpointIO\n"
        "from azstoragetorch.lightning import BlobCheckpointIO\nassert issubclass(BlobCheckpointIO, CheckpointIO)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=280, cwd=Path(__file__).parents[2])
