"""Datasets of litdata in blobs; needs litdata (the extra ``litdata``).

::

    azstoragetorch.litdata.register()
    container = "azure://<account>.blob.core.windows.net/<container>"
    dataset = litdata.StreamingDataset(f"{container}/train")
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.memory import filled_bytes
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._files.transfer import Hooks, get_stream

try:
    from filelock import FileLock, Timeout
    from litdata.streaming.downloader import Downloader, register_downloader
except ImportError as error:
    raise ImportError(f"azstoragetorch.litdata needs litdata ({error}): pip install litdata") from error

__all__ = ["BlobDownloader", "register"]

_PREFIXES = ("azure://", "az://", "azt://", "abfs://", "abfss://", "wasb://", "wasbs://", "http://", "https://")
_OPTIONS = {"account_url", "credential", "transfer"}
_INDEX = "index.json"


def register() -> None:
    """Let litdata read datasets from blobs through this package, in this process and in those that it forks.

    Afterwards ``litdata.StreamingDataset`` reads ``azure://`` URLs with :class:`BlobDownloader`. The URL is
    ``azure://<account>.blob.core.windows.net/<container>/<folder>``, or ``azure://<container>/<folder>`` with the
    account in ``storage_options={"account_url": ...}`` or in the environment variable ``AZURE_STORAGE_ACCOUNT_NAME``.
    litdata takes strings with other schemes for local paths. Pass such URLs as its ``Dir``, with a folder for the
    cache: ``Dir(path="cache", url="https://...")``. A SAS is not part of the URL, but of ``storage_options``.

    Processes that are spawned have to call this function, too.
    """
    for prefix in _PREFIXES:
        register_downloader(prefix, BlobDownloader, overwrite=True)


class BlobDownloader(Downloader):  # type: ignore[misc]  # litdata need not be installed where types are checked
    """Downloads the chunks of a litdata dataset from blobs; created by litdata after :func:`register`.

    ``storage_options`` of the dataset can have these entries:

    - ``account_url``: the URL of the account, for ``azure://<container>/<folder>``.
    - ``credential``: same as for :class:`~azstoragetorch.io.BlobIO`, such as an ``AzureSasCredential``.
    - ``transfer``: a :class:`azstoragetorch.TransferConfig`.

    Raises:
        TypeError: there is another entry, or an entry has the wrong type.
    """

    def __init__(
        self,
        remote_dir: str,
        cache_dir: str,
        chunks: list[dict[str, Any]],
        storage_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(remote_dir, cache_dir, chunks, storage_options, **options)
        found = dict(storage_options or {})
        if unknown := sorted(found.keys() - _OPTIONS):
            raise TypeError(
                f"storage_options has {', '.join(map(repr, unknown))}, which azstoragetorch does not know: expected "
                f"{', '.join(sorted(_OPTIONS))}"
            )
        self._account_url = str(found.get("account_url") or "").rstrip("/")
        try:
            place = parse_blob_url(self._url_of(f"{remote_dir}/x"))
        except ValueError:
            place = None  # the first download says what is wrong
        self._clients = ClientFactory(found.get("credential"), found.get("transfer"), place)

    def download_file(self, remote_filepath: str, local_filepath: str) -> None:
        """Download a blob to a file that is complete as soon as it exists; called by litdata.

        Returns without a file if another process is downloading it: litdata waits for that.

        Raises:
            ResourceNotFoundError: the blob does not exist.
            AzureError: the service refused the request, or could not be reached.
            OSError: the file cannot be written.
        """
        if Path(local_filepath).exists():
            return
        lock = FileLock(f"{local_filepath}.lock", timeout=1 if remote_filepath.endswith(_INDEX) else 0)
        with suppress(Timeout), lock:
            if not Path(local_filepath).exists():
                self._fetch(self._client(remote_filepath), local_filepath)

    def download_bytes(self, remote_filepath: str, offset: int, length: int, local_chunkpath: str) -> bytes:  # noqa: ARG002 - litdata's
        """Return *length* bytes of a blob from *offset* on, by one request; called by litdata.

        Raises:
            AzureError: same as for `download_file`.
        """
        if length <= 0:
            return b""
        opened = self._client(remote_filepath).open_range(ByteRange(offset, offset + length))
        try:
            return filled_bytes(len(opened.span), lambda view: opened.receive([view]))
        finally:
            opened.close()

    def download_fileobj(self, remote_filepath: str, fileobj: BinaryIO) -> None:
        """Write a whole blob to *fileobj*; called by litdata.

        Raises:
            AzureError: same as for `download_file`.
        """
        get_stream(self._client(remote_filepath), fileobj, _no_hooks())

    async def adownload_fileobj(self, remote_filepath: str) -> bytes:
        """Return a whole blob; called by litdata.

        Raises:
            AzureError: same as for `download_file`.
        """
        client = self._client(remote_filepath)
        return (await asyncio.get_running_loop().run_in_executor(None, client.read))[0]

    def _fetch(self, client: BlobClient, local: str) -> None:
        part = Path(f"{local}.tmp.{os.getpid()}")
        with on_error(lambda: part.unlink(missing_ok=True)):
            with part.open("wb") as file:
                get_stream(client, file, _no_hooks())
            part.replace(local)

    def _client(self, remote: str) -> BlobClient:
        return self._clients.blob(self._url_of(remote))

    def _url_of(self, remote: str) -> str:
        scheme, _, rest = remote.partition("://")
        if self._account_url:
            return f"{self._account_url}/{rest}"
        return f"az://{rest}" if scheme == "azure" else remote


def _no_hooks() -> Hooks:
    return Hooks(Scope(), lambda _: None)
