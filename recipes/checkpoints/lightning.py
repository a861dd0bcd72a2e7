"""Checkpoints of a Lightning Trainer in blobs.

    plugin = BlobCheckpointIO("https://ACCOUNT.blob.core.windows.net/CONTAINER/run", root="checkpoints")
    trainer = Trainer(plugins=[plugin], callbacks=[ModelCheckpoint(dirpath="checkpoints", save_last=True)])
    trainer.fit(model, ckpt_path="checkpoints/last.ckpt")

Lightning goes on thinking in paths; those below *root* are blobs below the URL. A save is all or nothing: the blob that
was there stays until the new one is complete.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import BlobClient

from azstoragetorch.io import BlobIO

try:
    from lightning.pytorch.plugins.io import CheckpointIO
except ImportError:
    try:
        from pytorch_lightning.plugins.io import CheckpointIO
    except ImportError:
        CheckpointIO = object  # type: ignore[assignment,misc]  # the plugin works wherever its three methods are called


class BlobCheckpointIO(CheckpointIO):
    """Keeps what Lightning saves to *root* in blobs below *url*. Pass the SAS as *credential*, not in the URL."""

    def __init__(self, url: str, *, root: str | os.PathLike[str] = ".", credential: Any = None) -> None:
        super().__init__()
        self._url = url.rstrip("/")
        self._root = Path(root).absolute()
        self._credential = credential

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not used: pass credential= to BlobCheckpointIO")
        with BlobIO(self.url_of(path), "wb", credential=self._credential) as blob:
            torch.save(checkpoint, blob)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # Lightning's own checkpoints hold more than tensors; it passes False for those that it is told to trust.
        weights_only = True if weights_only is None else weights_only
        with BlobIO(self.url_of(path), "rb", credential=self._credential) as blob:
            return torch.load(blob, map_location=map_location or "cpu", weights_only=weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        credential = self._credential
        if credential is None:
            from azure.identity import DefaultAzureCredential

            credential = DefaultAzureCredential()
        is_own = isinstance(credential, (AzureSasCredential, AzureNamedKeyCredential)) or hasattr(
            credential, "get_token"
        )
        with (
            BlobClient.from_blob_url(self.url_of(path), credential=credential if is_own else None) as blob,
            suppress(ResourceNotFoundError),
        ):
            blob.delete_blob()

    def teardown(self) -> None:
        """Nothing is held open."""

    def url_of(self, path: str | os.PathLike[str]) -> str:
        """The blob that stands for *path*."""
        text = os.fspath(path)
        if "://" in text:
            return text
        whole = Path(text).absolute()
        if not whole.is_relative_to(self._root) or ".." in whole.parts:
            raise ValueError(f"{text!r} is not below {str(self._root)!r}, which is what the blobs stand for")
        return f"{self._url}/{quote(whole.relative_to(self._root).as_posix())}"
