"""Where a checkpoint is: a folder of blobs, and the requests that concern it as a whole."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from dataclasses import replace

from azure.core.exceptions import AzureError, ResourceNotFoundError
from torch.distributed.checkpoint.metadata import Metadata

from azstoragetorch._blob.client import BlobClient, ContainerClient
from azstoragetorch._blob.credentials import Credential, CredentialHolder
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.listing import Page
from azstoragetorch._blob.url import parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.checkpoint._format import load_metadata, metadata_name, read_item
from azstoragetorch.exceptions import CheckpointError, CheckpointNotFoundError

_CACHED = 2  # checkpoints whose metadata is kept; that of a large job takes tens of megabytes
_REMEMBERED = 16  # saves of this process whose data blobs are known without reading their metadata

_cache: OrderedDict[tuple[str, str], Metadata] = OrderedDict()
_written: OrderedDict[bytes, frozenset[str]] = OrderedDict()  # by the SHA-256 of the metadata
_cache_lock = threading.Lock()


class Folder:
    """A folder in a container. Cheap, lazy and picklable, as the clients that it hands out."""

    def __init__(self, url: str, credential: Credential = None, transfer: TransferConfig | None = None) -> None:
        if transfer is not None and not isinstance(transfer, TransferConfig):
            raise TypeError(f"transfer must be a TransferConfig, not {type(transfer).__name__}")
        parsed = parse_url(url)
        if parsed.is_read_only:
            raise ValueError(f"url {str(parsed)!r}: a checkpoint has no snapshot or version")
        self.address = replace(parsed, blob=parsed.blob.strip("/"), sas=None)
        self.transfer = transfer or TransferConfig()
        self._credential = CredentialHolder(credential, parsed.sas, named=parsed)
        self._container = ContainerClient(self.address.with_blob(""), self._credential, self.transfer)

    @property
    def url(self) -> str:
        """The address, without a SAS."""
        return str(self.address)

    @property
    def prefix(self) -> str:
        """What the names of all blobs of the folder begin with."""
        return f"{self.address.blob}/" if self.address.blob else ""

    def at(self, url: str) -> Folder:
        """The folder *url*, reached as this one is if it is in the same account and *url* has no SAS."""
        parsed = parse_url(url)
        other = Folder(url, False, self.transfer)
        if parsed.sas is None:
            here, there = self.address, parsed
            if (here.scheme, here.host, here.account_path) != (there.scheme, there.host, there.account_path):
                raise ValueError(
                    f"{url!r} is in another account than {self.url!r}, whose credential is not sent there; make a new "
                    "reader or writer for it"
                )
            other._credential = self._credential
            other._container = ContainerClient(other.address.with_blob(""), self._credential, self.transfer)
        return other

    def child(self, name: str) -> Folder:
        """The folder *name* in this one."""
        other = Folder(self.url, False, self.transfer)
        other.address = self.address.with_blob(self.prefix + name.strip("/"))
        other._credential, other._container = self._credential, self._container
        return other

    def blob(self, name: str) -> BlobClient:
        """The blob *name* of this folder."""
        return self._container.blob(self.prefix + name)

    def listing(self, *, delimiter: str = "", uncommitted: bool = False) -> list[Page]:
        """What is in the folder; names begin with `prefix`."""
        return list(self._container.pages(prefix=self.prefix, delimiter=delimiter, uncommitted=uncommitted))

    def metadata(self, rank: int | None = None) -> Metadata:
        """The metadata of the checkpoint here, or that of *rank* alone; fetched again only if it has changed.

        Raises:
            CheckpointNotFoundError: there is no checkpoint.
            CheckpointError: the metadata is broken or hostile.
            AzureError: the service refused, or could not be reached.
        """
        client = self.blob(metadata_name(rank))
        with _cache_lock:
            known = [etag for url, etag in _cache if url == str(client.url)]
        version = client.version() if known else None
        if version is not None and version.etag in known:
            with _cache_lock:
                cached = _cache.get((str(client.url), version.etag))
            if cached is not None:
                return _copy(cached)
        data, version = self._read_metadata(rank)
        metadata = self._parsed(data, rank)
        with _cache_lock:
            _cache[str(client.url), version.etag] = metadata
            while len(_cache) > _CACHED:
                _cache.popitem(last=False)
        return _copy(metadata)

    def data_paths(self, rank: int | None = None) -> frozenset[str]:
        """The data blobs that the checkpoint here, or that of *rank* alone, refers to; raises as `metadata` does."""
        data, _ = self._read_metadata(rank)
        with _cache_lock:
            known = _written.get(hashlib.sha256(data).digest())
        if known is not None:
            return known
        return frozenset(read_item(info).path for info in self._parsed(data, rank).storage_data.values())

    def put_metadata(self, content: bytes, paths: frozenset[str], rank: int | None, *, create_only: bool) -> None:
        """Make *content*, which refers to the data blobs *paths*, the metadata of the checkpoint here."""
        self.blob(metadata_name(rank)).put(content, create_only=create_only)
        with _cache_lock:
            _written[hashlib.sha256(content).digest()] = paths
            while len(_written) > _REMEMBERED:
                _written.popitem(last=False)

    def _read_metadata(self, rank: int | None) -> tuple[bytes, BlobVersion]:
        try:
            return self.blob(metadata_name(rank)).read()
        except ResourceNotFoundError as error:
            raise self._not_found(metadata_name(rank), rank) from error

    def _parsed(self, data: bytes, rank: int | None) -> Metadata:
        try:
            return load_metadata(data)
        except CheckpointError as error:
            where = self.blob(metadata_name(rank)).url
            raise CheckpointError(f"{where}: {error}", checkpoint=self.url, key=error.key, rank=rank) from None

    def _not_found(self, name: str, rank: int | None) -> CheckpointNotFoundError:
        """Say why there is no checkpoint here, as far as a look at the folder tells."""
        why = "there is no checkpoint here"
        try:
            for page in self._container.pages(prefix=self.address.blob):
                if self.address.blob in page.names:
                    why = "this is a blob, not the folder of a checkpoint; pass the URL of the folder"
                elif any(found.startswith(self.prefix) for found in page.names):
                    why = "there are blobs but no complete checkpoint: a save is under way or was interrupted"
                break
        except (AzureError, ValueError):
            pass  # not everybody may list
        return CheckpointNotFoundError(f"{self.url}: {why} (no {name!r})", checkpoint=self.url, rank=rank)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"


def _copy(metadata: Metadata) -> Metadata:
    # What is large is shared: nobody changes it. torch writes into storage_meta.
    meta = getattr(metadata, "storage_meta", None)
    return replace(metadata, storage_meta=replace(meta) if meta is not None else None)


def plain(error: BaseException) -> BaseException:
    """*error* if it can be sent to another rank, else one that can and says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made a moment ago
    except Exception:  # noqa: BLE001 - any error at all means that it cannot
        return CheckpointError(f"{type(error).__name__}: {error}")
    return error


def describe(error: BaseException) -> str:
    """*error* in one line."""
    return f"{error}" if isinstance(error, (AzureError, CheckpointError)) else f"{type(error).__name__}: {error}"


def is_url(checkpoint_id: object) -> bool:
    """Whether *checkpoint_id* is the URL of a folder of blobs."""
    try:
        Folder(checkpoint_id, False)  # type: ignore[arg-type]  # it raises TypeError
    except (TypeError, ValueError):
        return False
    return True
