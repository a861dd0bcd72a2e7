"""Train with Lightning, keep the checkpoints in blobs, resume from the last one.

    python -m recipes.frameworks.lightning https://ACCOUNT.blob.core.windows.net/CONTAINER/run

Run it again, on this machine or another one: it continues after the last epoch that is in a blob.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from azstoragetorch.lightning import BlobCheckpointIO
from recipes.access import credential_of_environment


class Regression(LightningModule):
    """A line through noisy points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.layer(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        inputs = torch.linspace(-1, 1, 64).unsqueeze(1)
        return DataLoader(TensorDataset(inputs, 3 * inputs + 1), batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with Lightning, and resume.")
    parser.add_argument("url", help="a folder for the checkpoints; a SAS may be in it")
    parser.add_argument("--epochs", type=int, default=2, help="how many more to train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # nothing has to stay on this machine
        root = Path(folder) / "checkpoints"
        plugin = BlobCheckpointIO(options.url, root=root, credential=credential_of_environment())
        last = root / "last.ckpt"
        done = plugin.load_checkpoint(last)["epoch"] + 1 if last.exists() else 0
        print(f"{done} epochs are in blobs")
        trainer = Trainer(
            plugins=[plugin],
            callbacks=[ModelCheckpoint(dirpath=root, save_last=True)],
            max_epochs=done + options.epochs,
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Regression(), ckpt_path="last")
        print(f"trained to epoch {trainer.current_epoch}: loss {trainer.callback_metrics.get('loss', '-')}")


if __name__ == "__main__":
    main()
