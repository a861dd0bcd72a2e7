"""Where Ray Train keeps its checkpoints: a folder in blobs, as a file system of pyarrow."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.fs

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.filesystem import AzureBlobFileSystem
from azstoragetorch.ray._sending import clients_below


def checkpoint_storage(
    url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system and the path for the folder *url*: what ``ray.train.RunConfig`` takes to store checkpoints.

    ::

        files, path = checkpoint_storage(f"{container}/runs")
        config = RunConfig(storage_filesystem=files, storage_path=path)

    Each file that is reported becomes a blob, written completely or not at all, and workers upload their own files.

    Args:
        url: URL of a container or folder.
        credential: Same as for `list_blobs`; see :doc:`the guide on file systems </guide/filesystem>` for what is used
            if it is None.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: *url* is not a valid URL.
        TypeError: an argument has the wrong type, or the credential cannot be sent to a worker.
    """
    place, _ = clients_below(url, credential, transfer)
    account = replace(place, container="", blob="", sas=None)
    files = AzureBlobFileSystem(
        account_host=str(account).rstrip("/"),
        sas_token=None if place.sas is None else place.sas.reveal(),
        credential=credential if place.sas is None else None,
        transfer=transfer,
        skip_instance_cache=True,
    )
    path = f"{place.container}/{place.blob}".rstrip("/")
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), path
