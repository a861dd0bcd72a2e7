"""Checkpoints of a Lightning ``Trainer`` in blobs; needs Lightning (the extra ``lightning``).

::

    container = "https://<account>.blob.core.windows.net/<container>"
    plugin = BlobCheckpointIO(f"{container}/run", root="checkpoints")
    saver = ModelCheckpoint(dirpath="checkpoints", save_last=True)
    trainer = Trainer(plugins=[plugin], callbacks=[saver])
    trainer.fit(model, ckpt_path="last")
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import join_url, parse_url, why_refused
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.io import BlobIO

try:
    # Lightning has two packages, with a Trainer each that accepts only its own plugins.
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning.plugins.io import CheckpointIO, TorchCheckpointIO
    else:
        try:
            from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
        except ImportError:
            from pytorch_lightning.plugins.io import CheckpointIO, TorchCheckpointIO
except ImportError as error:
    raise ImportError(f"azstoragetorch.lightning needs Lightning ({error}): pip install lightning") from error

__all__ = ["BlobCheckpointIO"]

_NOTE = "This checkpoint is a blob: "
_log = logging.getLogger("azstoragetorch")


class BlobCheckpointIO(CheckpointIO):  # type: ignore[misc]  # Lightning need not be installed where types are checked
    """A plugin for Lightning's ``Trainer`` that keeps the checkpoints below a local folder in blobs instead.

    Lightning still uses paths: a path below *root* is the blob of the same name below *url*, a URL is that blob, and
    any other path is a local file. A save is all or nothing: the blob that was there stays until the new one is
    complete.

    ``ModelCheckpoint`` looks at the local disk to find the last checkpoint and to choose a name that is not taken. So
    each blob has a short local file of the same name, which is written when the plugin is created and when it saves.
    On a new machine, ``ckpt_path="last"`` and names such as ``last-v1.ckpt`` therefore work as with local files.

    Args:
        url: URL of the folder, in any of the forms that :doc:`the guide </guide/urls>` lists.
        root: The local folder that stands for *url*: pass the same one as ``dirpath`` of ``ModelCheckpoint``.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: *url* is not a valid URL.
        AzureError: the service refused to list *url*, or could not be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        root: str | os.PathLike[str] = ".",
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        place = parse_url(url)
        if place.is_read_only:
            raise ValueError(f"url {str(place)!r} is a snapshot or version, which cannot be written")
        self._url = url
        self._root = _absolute(root)
        self._clients = ClientFactory(credential, transfer, place)
        self._note_blobs()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save *checkpoint* as the blob for *path*; called by Lightning.

        Raises:
            TypeError: there are *storage_options*.
            ValueError: there is a link next to *path*, as ``save_last="link"`` makes.
            FatalBlobIOWriteError: the blob could not be written; it is unchanged.
        """
        if storage_options is not None:
            raise TypeError("storage_options are not supported: pass credential= and transfer= to BlobCheckpointIO")
        if self._is_local(path):
            if not _absolute(path).is_relative_to(tempfile.gettempdir()):
                _log.warning("%s is saved as a local file: it is not below %s", path, self._root)
            TorchCheckpointIO().save_checkpoint(checkpoint, path)
            return
        self._refuse_links(path)
        with self._blob_io(path, "wb") as blob:
            torch.save(checkpoint, blob)
        if not _is_url(path):
            self._note(_absolute(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the checkpoint *path*; called by Lightning.

        Raises:
            FileNotFoundError: there is no such blob or file.
        """
        map_location = "cpu" if map_location is None else map_location
        if self._is_local(path):
            of_lightning = TorchCheckpointIO()
            local: dict[str, Any] = of_lightning.load_checkpoint(
                path, map_location=map_location, weights_only=weights_only
            )
            return local
        # Lightning's checkpoints contain more than tensors; it passes False for those that the user trusts.
        weights_only = True if weights_only is None else weights_only
        try:
            with self._blob_io(path, "rb") as blob:
                loaded: dict[str, Any] = torch.load(blob, map_location=map_location, weights_only=weights_only)
                return loaded
        except ResourceNotFoundError as error:
            where = self._client(path).url
            raise FileNotFoundError(f"checkpoint {os.fspath(path)}: the blob {where} does not exist") from error

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint *path*, if it exists; called by Lightning."""
        if self._is_local(path):
            TorchCheckpointIO().remove_checkpoint(path)
            return
        self._client(path).delete()
        if not _is_url(path) and _is_note(_absolute(path)):
            _absolute(path).unlink()

    def teardown(self) -> None:
        """Do nothing: nothing is kept open."""

    def _url_of(self, path: str | os.PathLike[str]) -> str:
        """The URL of the blob that stands for *path*."""
        if _is_url(path):
            return os.fspath(path)
        if _absolute(path) == self._root:
            raise ValueError(f"{os.fspath(path)!r} is the folder of the checkpoints, not a checkpoint")
        return join_url(self._url, _absolute(path).relative_to(self._root).as_posix())

    def _client(self, path: str | os.PathLike[str]) -> BlobClient:
        return self._clients.blob(self._url_of(path))

    def _blob_io(self, path: str | os.PathLike[str], mode: str) -> BlobIO:
        return BlobIO._of(self._client(path), mode=mode)  # noqa: SLF001 - of this package

    def _is_local(self, path: str | os.PathLike[str]) -> bool:
        """Whether *path* is a file: under ``ddp_spawn``, Lightning passes the weights on in a temporary one."""
        return not _is_url(path) and not _absolute(path).is_relative_to(self._root)

    # -- the local files that stand for blobs ---------------------------------------------------------------------

    def _note_blobs(self) -> None:
        """Write a local file for each checkpoint that is a blob and has none on this machine."""
        place = parse_url(self._url)
        prefix = f"{place.blob.strip('/')}/" if place.blob else ""
        for page in self._clients.container(place).pages(prefix=prefix, with_modified=True):
            for blob_name, modified in zip(page.names, page.modified, strict=True):
                name = PurePosixPath(blob_name[len(prefix) :])
                if name.suffix == ".ckpt" and not name.is_absolute() and why_refused(str(name)) is None:
                    self._note(self._root / name, parsedate_to_datetime(modified).timestamp())

    def _note(self, place: Path, modified: float | None = None) -> None:
        if os.path.lexists(place) and not _is_note(place):
            return  # a file or link of the user
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{_NOTE}{self._client(place).url}\n", encoding="utf-8")
        if modified is not None:
            os.utime(place, (modified, modified))

    def _refuse_links(self, path: str | os.PathLike[str]) -> None:
        if _is_url(path):
            return
        folder = _absolute(path).parent
        for found in folder.glob("*.ckpt") if folder.is_dir() else ():
            if found.is_symlink():
                raise ValueError(
                    f"{found} is a link, which other machines do not see: use ModelCheckpoint(save_last=True) instead "
                    "of save_last='link', and remove the link"
                )


def _is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - normalizes, without following links


def _is_note(place: Path) -> bool:
    if place.is_symlink() or not place.is_file():
        return False
    with place.open("rb") as file:
        return file.read(len(_NOTE)) == _NOTE.encode()
