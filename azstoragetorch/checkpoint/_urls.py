"""Make URLs work as ``checkpoint_id`` of torch's own functions, without a writer or reader.

The public functions are replaced by ones that choose the writer or reader. A module that has imported one of them
before keeps torch's own. Inside it, torch chooses a writer or reader in one private function, which is not extensible,
so that function is replaced where `save` and `load` look it up.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential, is_trusted
from azstoragetorch._blob.url import parse_url
from azstoragetorch._engine.config import TRUSTED_HOSTS, TransferConfig
from azstoragetorch.checkpoint._reader import BlobStorageReader
from azstoragetorch.checkpoint._writer import BlobStorageWriter

_SETUPS: tuple[Any, ...] = (state_dict_saver, state_dict_loader)  # where torch calls `_storage_setup`
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "save": (dcp, state_dict_saver),
    "async_save": (dcp, state_dict_saver),
    "load": (dcp, state_dict_loader),
}
_OURS = re.compile(r"(?:azt?|abfss?|wasbs?)://?", re.IGNORECASE)
_PERHAPS_OURS = re.compile(r"https?://?", re.IGNORECASE)  # torch can load from other web servers through fsspec


@dataclass(frozen=True, slots=True)
class _Access:
    """How the folders of all URLs are reached."""

    credential: Credential = field(repr=False)
    transfer: TransferConfig | None

    def storage(self, checkpoint_id: object, *, is_reader: bool) -> BlobStorageReader | BlobStorageWriter | None:
        """The writer or reader for *checkpoint_id*, or None if torch is to choose one.

        Raises:
            TypeError: *checkpoint_id* is a path object made of a URL.
            ValueError: *checkpoint_id* is not a valid URL, or its host is not one of Azure Storage.
        """
        url = self._url_of(checkpoint_id)
        if url is None:
            return None
        if is_reader:
            return BlobStorageReader(url, credential=self.credential, transfer=self.transfer)
        return BlobStorageWriter(url, credential=self.credential, transfer=self.transfer)

    def _url_of(self, checkpoint_id: object) -> str | None:
        """*checkpoint_id* if it is the URL of a folder of blobs."""
        text = os.fspath(checkpoint_id) if isinstance(checkpoint_id, (str, os.PathLike)) else None
        if not isinstance(text, str) or (found := _OURS.match(text) or _PERHAPS_OURS.match(text)) is None:
            return None
        if not isinstance(checkpoint_id, str):
            raise TypeError(
                f"checkpoint_id: {type(checkpoint_id).__name__} objects have one of the slashes after {found[0]} only, "
                "and torch would save to a local folder of that name: pass the URL as a str"
            )
        if not found[0].endswith("//"):
            return None
        return text if self._is_of_azure(text, is_scheme_ours=_OURS.match(text) is not None) else None

    def _is_of_azure(self, text: str, *, is_scheme_ours: bool) -> bool:
        """Whether the credential may be sent to the host of the URL *text*, which somebody else may have written."""
        try:
            url = parse_url(text, argument="checkpoint_id")
        except ValueError:
            if is_scheme_ours:
                raise
            return False
        hosts = (self.transfer or TransferConfig()).trusted_hosts
        if url.is_azure or url.is_loopback or url.sas is not None or is_trusted(url, hosts):
            return True
        if is_scheme_ours:
            raise ValueError(
                f"checkpoint_id {str(url)!r}: the host {url.host!r} is not one of Azure Storage, and gets no "
                f'credential. If you trust it, pass transfer=TransferConfig(trusted_hosts=["{url.host}"]) to '
                f"enable_urls, or set the environment variable {TRUSTED_HOSTS}={url.host}"
            )
        return False


class _Setup:
    """Stands in for torch's function that chooses a writer or reader, and calls it for everything but URLs of blobs."""

    def __init__(self, stock: Any, access: _Access) -> None:
        self.stock = stock
        self._access = access

    def __call__(self, storage: Any, checkpoint_id: Any, reader: bool = False) -> Any:
        chosen = None if storage or not checkpoint_id else self._access.storage(checkpoint_id, is_reader=reader)
        return chosen or self.stock(storage, checkpoint_id, reader=reader)


class _Function:
    """Stands in for a public function of torch, and passes it a writer or reader if it is called with a URL of blobs.

    torch logs the `checkpoint_id` that a function is called with, so the SAS is removed from it.
    """

    def __init__(self, stock: Any, access: _Access) -> None:
        update_wrapper(self, stock)
        self.stock = stock
        self._access = access
        self._is_reader = stock.__name__ == "load"

    def __call__(self, *args: Any, checkpoint_id: Any = None, **options: Any) -> Any:
        storage = "storage_reader" if self._is_reader else "storage_writer"
        if checkpoint_id and options.get(storage) is None:
            chosen = self._access.storage(checkpoint_id, is_reader=self._is_reader)
            if chosen is not None:
                checkpoint_id, options[storage] = chosen.checkpoint_id, chosen
        return self.stock(*args, checkpoint_id=checkpoint_id, **options)

    def __reduce__(self) -> str:
        return str(self.stock.__name__)  # as functions pickle: by name, so that another process looks up its own


def enable_urls(*, credential: Credential = None, transfer: TransferConfig | None = None) -> None:
    """Let `torch.distributed.checkpoint` save to URLs and load from them without a writer or reader, in this process.

    Afterwards ``dcp.save``, ``dcp.async_save``, and ``dcp.load`` use :class:`BlobStorageWriter` and
    :class:`BlobStorageReader` if ``checkpoint_id`` is the URL of a folder of blobs and no ``storage_writer`` or
    ``storage_reader`` is passed. The URL has any of the forms that :doc:`the guide </guide/urls>` lists. The host of an
    ``http`` or ``https`` URL must be one of Azure Storage or this machine, or be trusted (``trusted_hosts`` of
    *transfer*), or the URL must have a SAS. Local paths and all other URLs remain torch's own.

    Without this function, torch saves to such URLs through fsspec. If a save that overwrites a checkpoint is
    interrupted, torch then deletes a data file of the *previous* checkpoint.

    Call it in every process, before the first save or load. Another call replaces *credential* and *transfer*, and
    :func:`disable_urls` ends it. Functions that a module imported earlier by ``from ... import`` work as well, with two
    exceptions: ``async_save`` with ``AsyncCheckpointerType.PROCESS`` remains torch's own, and torch writes a SAS in the
    URL to its debug log.

    Args:
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`. A SAS in a URL takes precedence.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        TypeError: an argument has the wrong type.
        RuntimeError: this release of torch chooses writers and readers in another way.
    """
    ClientFactory(credential, transfer)  # raises if a type is wrong
    access = _Access(credential, transfer)
    try:
        setups = [_stock_of(place._storage_setup) for place in _SETUPS]  # noqa: SLF001 - there is no public way
    except AttributeError:
        raise RuntimeError(
            f"enable_urls does not work with torch {torch.__version__}, which chooses writers and readers in another "
            "way: pass storage_writer=BlobStorageWriter(url) and storage_reader=BlobStorageReader(url) instead"
        ) from None
    for place, setup in zip(_SETUPS, setups, strict=True):
        place._storage_setup = _Setup(setup, access)  # noqa: SLF001 - as above
    for name, places in _FUNCTIONS.items():
        function = _Function(_stock_of(getattr(dcp, name)), access)
        for place in places:
            setattr(place, name, function)


def disable_urls() -> None:
    """Undo :func:`enable_urls`: URLs are torch's own again."""
    for place in _SETUPS:
        place._storage_setup = _stock_of(place._storage_setup)  # noqa: SLF001 - as above
    for name, places in _FUNCTIONS.items():
        for place in places:
            setattr(place, name, _stock_of(getattr(place, name)))


def _stock_of(function: Any) -> Any:
    """The function of torch that *function* stands in for, or *function* itself."""
    return function.stock if isinstance(function, (_Setup, _Function)) else function
