"""Checkpoints of a Lightning Trainer in blobs.

    plugin = BlobCheckpointIO("https://ACCOUNT.blob.core.windows.net/CONTAINER/run", root="checkpoints")
    trainer = Trainer(plugins=[plugin], callbacks=[ModelCheckpoint(dirpath="checkpoints", save_last=True)])
    trainer.fit(model, ckpt_path="last")

Lightning still uses paths. Paths below *root* are blobs below the URL, and all others are local files. A save is all or
nothing: an existing blob stays until the new one is complete.

``ModelCheckpoint`` searches the local disk for the last checkpoint and for a free name. So the plugin writes a small
local file of the same name for each blob, when it is created and when it saves. On a new machine, ``ckpt_path="last"``
and names such as ``last-v1.ckpt`` work as with local files.
"""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import torch
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import BlobClient, BlobServiceClient, ContainerClient

from azstoragetorch import join_url
from azstoragetorch.io import BlobIO

try:
    from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
except ImportError:
    try:
        from pytorch_lightning.plugins.io import CheckpointIO, TorchCheckpointIO
    except ImportError:
        CheckpointIO = object  # type: ignore[assignment,misc]  # the plugin works wherever its three methods are called
        TorchCheckpointIO = None  # type: ignore[assignment,misc]

_NOTE = "This checkpoint is a blob: "
_log = logging.getLogger(__name__)


class BlobCheckpointIO(CheckpointIO):
    """Stores checkpoints below *root* as blobs below *url*, which may contain a SAS."""

    def __init__(self, url: str, *, root: str | os.PathLike[str] = ".", credential: Any = None) -> None:
        super().__init__()
        self._url = url
        self._root = Path(os.path.abspath(root))  # noqa: PTH100 - normalizes, without following links
        self._credential = credential
        self.note_blobs()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not used: pass credential= to BlobCheckpointIO")
        if self._is_local(path):
            if not self._place(path).is_relative_to(tempfile.gettempdir()):
                _log.warning("%s is saved as a local file: it is not below %s", path, self._root)
            self._local(path).save_checkpoint(checkpoint, path)
            return
        self._refuse_links(path)
        with BlobIO(self.url_of(path), "wb", credential=self._credential) as blob:
            torch.save(checkpoint, blob)
        if "://" not in os.fspath(path):
            self._note(self._place(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if self._is_local(path):
            loaded: dict[str, Any] = self._local(path).load_checkpoint(
                path, map_location=map_location or "cpu", weights_only=weights_only
            )
            return loaded
        # Lightning's own checkpoints hold more than tensors; it passes False for those that it is told to trust.
        weights_only = True if weights_only is None else weights_only
        url = self.url_of(path)
        try:
            with BlobIO(url, "rb", credential=self._credential) as blob:
                return torch.load(blob, map_location=map_location or "cpu", weights_only=weights_only)
        except ResourceNotFoundError as error:
            raise FileNotFoundError(f"checkpoint {path}: the blob {url.partition('?')[0]} does not exist") from error

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        if self._is_local(path):
            self._local(path).remove_checkpoint(path)
            return
        with (
            BlobClient.from_blob_url(self.url_of(path), credential=self._sdk_credential()) as blob,
            suppress(ResourceNotFoundError),
        ):
            blob.delete_blob()
        if "://" not in os.fspath(path) and self._is_note(self._place(path)):
            self._place(path).unlink()

    def teardown(self) -> None:
        """Nothing is held open."""

    def url_of(self, path: str | os.PathLike[str]) -> str:
        """The URL of the blob for *path*."""
        text = os.fspath(path)
        if "://" in text:
            return text
        whole = self._place(path)
        if not whole.is_relative_to(self._root) or whole == self._root:
            raise ValueError(f"{text!r} is not below root, {str(self._root)!r}")
        return join_url(self._url, whole.relative_to(self._root).as_posix())

    def note_blobs(self) -> None:
        """Write a local note for each checkpoint in a blob."""
        blob = BlobClient.from_blob_url(join_url(self._url, "x"))
        place, _, sas = blob.url.partition("?")
        container_url = place[: -len(quote(f"/{blob.blob_name}", safe="~/"))]
        folder = blob.blob_name[:-1]
        with ContainerClient.from_container_url(
            f"{container_url}?{sas}" if sas else container_url, credential=self._sdk_credential()
        ) as container:
            for found in container.list_blobs(name_starts_with=folder):
                name = PurePosixPath(found.name[len(folder) :])
                place_here = self._root / name
                if name.suffix == ".ckpt" and ".." not in name.parts and not name.is_absolute():
                    self._note(place_here, found.last_modified.timestamp())

    def _note(self, place: Path, modified: float | None = None) -> None:
        if os.path.lexists(place) and not self._is_note(place):
            return  # a file of the user
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{_NOTE}{self.url_of(place).partition('?')[0]}\n", encoding="utf-8")
        if modified is not None:
            os.utime(place, (modified, modified))

    @staticmethod
    def _is_note(place: Path) -> bool:
        if place.is_symlink() or not place.is_file():
            return False
        with place.open("rb") as file:
            return file.read(len(_NOTE)) == _NOTE.encode()

    @staticmethod
    def _place(path: str | os.PathLike[str]) -> Path:
        return Path(os.path.abspath(path))  # noqa: PTH100 - normalizes, without following links

    def _is_local(self, path: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(path) and not self._place(path).is_relative_to(self._root)

    def _local(self, path: str | os.PathLike[str]) -> Any:
        """Lightning's way to local files: under ``ddp_spawn`` it hands over the weights in a temporary one."""
        if TorchCheckpointIO is None:
            raise ValueError(f"{os.fspath(path)!r} is not below root, {str(self._root)!r}")
        return TorchCheckpointIO()

    def _refuse_links(self, path: str | os.PathLike[str]) -> None:
        folder = self._place(path).parent
        for found in folder.glob("*.ckpt") if folder.is_dir() else ():
            if found.is_symlink():
                raise ValueError(
                    f"{found} is a link, which other machines do not see: use ModelCheckpoint(save_last=True) instead "
                    "of save_last='link', and remove the link"
                )

    def _sdk_credential(self) -> Any:
        credential = self._credential
        if credential is None and "sig=" not in self._url:
            if self._url.startswith("http://"):  # Azurite, with its published key, as in BlobIO
                emulator = BlobServiceClient.from_connection_string("UseDevelopmentStorage=true").credential
                return AzureNamedKeyCredential(emulator.account_name, emulator.account_key)
            from azure.identity import DefaultAzureCredential

            credential = DefaultAzureCredential()
        is_taken = isinstance(credential, (AzureSasCredential, AzureNamedKeyCredential))
        return credential if is_taken or hasattr(credential, "get_token") else None
