"""Shards of WebDataset in blobs; needs webdataset (the extra ``webdataset``).

::

    azstoragetorch.webdataset.register()
    container = "https://<account>.blob.core.windows.net/<container>"
    dataset = webdataset.WebDataset(container + "/train-{000..099}.tar")
"""

from __future__ import annotations

from typing import Any

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential, is_trusted
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.io import BlobIO

try:
    from webdataset import gopen_schemes
except ImportError as error:
    raise ImportError(f"azstoragetorch.webdataset needs webdataset ({error}): pip install webdataset") from error

__all__ = ["register"]

_OURS = ("abfs", "abfss", "az", "azt", "wasb", "wasbs")
_SHARED = ("http", "https")  # also of other web servers, which remain WebDataset's own


def register(
    _worker: int | None = None, /, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> None:
    """Let WebDataset read shards from blobs, and write them, in this process.

    Afterwards ``WebDataset``, ``TarWriter``, and ``ShardWriter`` accept URLs of blobs, in any of the forms that
    :doc:`the guide </guide/urls>` lists. An ``http`` or ``https`` URL is one of a blob if its host is one of Azure
    Storage or this machine, or is trusted (``trusted_hosts`` of *transfer*), or if the URL has a SAS; other web servers
    remain WebDataset's own. Shards are read ahead in parallel. A shard that is written exists once it is complete: if
    the ``with`` block of its writer raises, nothing is written.

    Forked worker processes need nothing more. For workers that are spawned, pass this function as ``worker_init_fn`` of
    the ``DataLoader``; with *credential* or *transfer*, pass ``functools.partial(register, credential=...)``. Calling
    it again replaces *credential* and *transfer*.

    Args:
        _worker: Ignored; the number of the worker that ``worker_init_fn`` gets.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`. It is sent to hosts of Azure Storage and to trusted
            ones.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        TypeError: an argument has the wrong type.
    """
    clients = ClientFactory(credential, transfer)
    for scheme in _OURS:
        gopen_schemes[scheme] = _Opener(clients, None)
    for scheme in _SHARED:
        found = gopen_schemes.get(scheme)
        gopen_schemes[scheme] = _Opener(clients, found.stock if isinstance(found, _Opener) else found)


class _Opener:
    """What WebDataset calls for the URLs of a scheme. *stock* opens those that are not of blobs."""

    def __init__(self, clients: ClientFactory, stock: Any) -> None:
        self._clients = clients
        self.stock = stock

    def __call__(self, url: str, mode: str = "rb", bufsize: int = 8192, **options: Any) -> Any:
        if self.stock is not None and not self._is_of_blob(url):
            return self.stock(url, mode, bufsize, **options)
        return BlobIO._of(self._clients.blob(url), mode=mode)  # noqa: SLF001 - of this package

    def _is_of_blob(self, url: str) -> bool:
        try:
            place = parse_blob_url(url)
        except ValueError:
            return False
        is_known = place.is_azure or place.is_loopback or place.sas is not None
        return is_known or is_trusted(place, self._clients.config.trusted_hosts)
