"""The folder of a checkpoint, and the requests for the folder as a whole."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from azure.core.exceptions import AzureError, ResourceNotFoundError
from torch.distributed.checkpoint.metadata import Metadata

from azstoragetorch._blob.client import BlobClient, ClientFactory, ContainerClient, Page
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.threads import engine_for
from azstoragetorch.checkpoint._fence import TOMBSTONE_SIZE, is_tombstone
from azstoragetorch.checkpoint._format import (
    METADATA,
    Digests,
    ParsedMetadata,
    digests_of,
    is_rank_metadata,
    largest_digests,
    load_digests,
    load_metadata,
    metadata_name,
    read_item,
)
from azstoragetorch.exceptions import CheckpointError, CheckpointNotFoundError

T = TypeVar("T")
R = TypeVar("R")

_CACHED = 2  # checkpoints whose metadata is kept; that of a large job takes tens of megabytes
_REMEMBERED = 16  # saves of this process whose data blobs are known without reading their metadata


@dataclass(frozen=True, slots=True)
class Seen:
    """The metadata blob at one moment. *etag* is None without a blob, *content* without a checkpoint."""

    etag: str | None
    content: bytes | None

    @property
    def exists(self) -> bool:
        """Whether there was a checkpoint."""
        return self.content is not None


@dataclass(frozen=True, slots=True)
class Version:
    """What sets one checkpoint apart from others at its place. Copying and cleaning change its ETag alone."""

    etag: str
    digest: str
    save_id: str | None


class _Recent(dict[T, R]):
    """The last few entries. Every step is one of the interpreter's own, so no thread, handler or child waits for it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def put(self, key: T, value: R) -> None:
        """Add an entry in the place of the oldest."""
        self.pop(key, None)
        self[key] = value
        for oldest in list(self)[: -self._count]:
            self.pop(oldest, None)


@dataclass(frozen=True, slots=True)
class _Known:
    """What this process knows of checkpoints."""

    metadata: _Recent[tuple[str, str], tuple[ParsedMetadata, Version]]  # by URL and ETag
    paths: _Recent[bytes, frozenset[str]]  # data blobs, by the SHA-256 of the metadata
    digests: _Recent[str, Digests]  # by URL of the side blob


_known: PerProcess[_Known] = PerProcess(lambda: _Known(_Recent(_CACHED), _Recent(_REMEMBERED), _Recent(_CACHED)))


class Folder:
    """A folder in a container. Cheap, lazy and picklable, as the clients that it hands out."""

    def __init__(self, url: str, credential: Credential = None, transfer: TransferConfig | None = None) -> None:
        parsed = parse_url(url)
        if parsed.is_read_only:
            raise ValueError(f"url {str(parsed)!r}: a checkpoint has no snapshot or version")
        self.address = replace(parsed, blob=parsed.blob.strip("/"), sas=None)
        self._clients = ClientFactory(credential, transfer, parsed)
        self.transfer = self._clients.config
        self._sas = parsed.sas
        self._container = self._clients.container(parsed)

    @property
    def url(self) -> str:
        """The address, without a SAS."""
        return str(self.address)

    @property
    def prefix(self) -> str:
        """What the names of all blobs of the folder begin with."""
        return f"{self.address.blob}/" if self.address.blob else ""

    @property
    def container(self) -> ContainerClient:
        """The container that it is in."""
        return self._container

    def at(self, url: str) -> Folder:
        """The folder *url*, reached as this one is if it is in the same account and *url* has no SAS.

        Raises:
            ValueError: *url* is not a URL, or is in another account and has no SAS.
        """
        return self.reach(Folder(url, False, self.transfer))

    def reach(self, other: Folder) -> Folder:
        """The folder *other*, with the credential and the transfer of this one unless its URL has a SAS."""
        reached = Folder(other.url, False, self.transfer)
        if other._sas is not None:
            reached._sas, reached._container = (
                other._sas,
                reached._clients.container(replace(other.address, sas=other._sas)),
            )
            return reached
        here, there = self.address, other.address
        if (here.scheme, here.host, here.account_path) != (there.scheme, there.host, there.account_path):
            raise ValueError(
                f"{other.url!r} is in another account than {self.url!r}, whose credential is not sent there; make a "
                "new reader or writer for it"
            )
        reached._clients, reached._sas = self._clients, self._sas
        reached._container = self._clients.container(replace(other.address, sas=self._sas))
        return reached

    def child(self, name: str) -> Folder:
        """The folder *name* in this one."""
        other = Folder(self.url, False, self.transfer)
        other.address = self.address.with_blob(self.prefix + name.strip("/"))
        other._clients, other._sas, other._container = self._clients, self._sas, self._container
        return other

    def parent(self) -> Folder | None:
        """The folder that this one is in; None for a container."""
        if not self.address.blob:
            return None
        other = Folder(self.url, False, self.transfer)
        other.address = replace(self.address, blob=self.address.blob.rpartition("/")[0])
        other._clients, other._sas, other._container = self._clients, self._sas, self._container
        return other

    def blob(self, name: str) -> BlobClient:
        """The blob *name* of this folder."""
        return self._container.blob(self.prefix + name)

    def listing(self, *, delimiter: str = "", uncommitted: bool = False) -> list[Page]:
        """What is in the folder; names begin with `prefix`."""
        return list(self._container.pages(prefix=self.prefix, delimiter=delimiter, uncommitted=uncommitted))

    def names(self, *, uncommitted: bool = False) -> set[str]:
        """The names of the blobs in the folder itself, not in folders below."""
        pages = self.listing(delimiter="/", uncommitted=uncommitted)
        return {name.removeprefix(self.prefix) for page in pages for name in page.names}

    def each(self, action: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What *action* returns for each of *items*; as many at once as there may be connections."""
        engine = engine_for(self.transfer)
        return engine.map(lambda item, _scope: action(item), list(items), self.transfer.max_connections)

    def is_complete(self) -> bool:
        """Whether there is a checkpoint that all ranks saved together."""
        found = self.blob(METADATA).version()
        return found is not None and found.size != TOMBSTONE_SIZE

    # -- metadata -----------------------------------------------------------------------------------------------------

    def see(self, rank: int | None = None) -> Seen:
        """The metadata blob as it is now: of the checkpoint here, or that of *rank* alone.

        Raises:
            AzureError: the service refused the request, or could not be reached.
        """
        try:
            content, version = self.blob(metadata_name(rank)).read()
        except ResourceNotFoundError:
            return Seen(None, None)
        return Seen(version.etag, None if is_tombstone(content) else content)

    def load(self, rank: int | None = None) -> tuple[Metadata, Version]:
        """The metadata of the checkpoint here, or that of *rank* alone; fetched again only if it has changed.

        It is the caller's to change.

        Raises:
            CheckpointNotFoundError: the checkpoint does not exist.
            CheckpointError: the metadata is broken or hostile.
            AzureError: the service refused the request, or could not be reached.
        """
        found = self.find(rank)
        if found is None:
            raise self._not_found(metadata_name(rank), rank)
        return found

    def find(self, rank: int | None = None) -> tuple[Metadata, Version] | None:
        """Do as `load`; None if the checkpoint does not exist."""
        client = self.blob(metadata_name(rank))
        url = str(client.url)
        known = _known.get().metadata
        if any(place == url for place, _ in list(known)):
            present = client.version()
            cached = known.get((url, present.etag)) if present is not None else None
            if cached is not None:
                return cached[0].make(), cached[1]
        seen = self.see(rank)
        if seen.etag is None or seen.content is None:
            return None
        with self._reading(rank):
            parsed = ParsedMetadata(seen.content)
            metadata = parsed.make()
        version = Version(seen.etag, hashlib.sha256(seen.content).hexdigest(), _save_id(metadata))
        known.put((url, seen.etag), (parsed, version))
        return metadata, version

    def metadata(self, rank: int | None = None) -> Metadata:
        """Do as `load`, without the version."""
        return self.load(rank)[0]

    def paths_in(self, content: bytes, rank: int | None = None) -> frozenset[str]:
        """The data blobs and the side blob that *content*, the metadata here or that of *rank* alone, refers to.

        Raises:
            CheckpointError: the metadata is broken or hostile.
        """
        known = _known.get().paths.get(hashlib.sha256(content).digest())
        if known is not None:
            return known
        with self._reading(rank):
            metadata = load_metadata(content)
            paths = frozenset(read_item(info).path for info in metadata.storage_data.values())
        digests = digests_of(metadata)
        paths |= {digests} if digests is not None else frozenset()
        return frozenset(path for path in paths if path != METADATA and not is_rank_metadata(path))

    def remember(self, content: bytes, paths: frozenset[str]) -> None:
        """Note that *content*, which this process has written, refers to the blobs *paths*."""
        _known.get().paths.put(hashlib.sha256(content).digest(), paths)

    def digests(self, metadata: Metadata) -> Digests | str:
        """The digests of the checkpoint here, which *metadata* describes, or why they cannot be used.

        Raises:
            AzureError: the service refused the request, or could not be reached.
        """
        name = digests_of(metadata)
        if name is None:
            return "it was saved without digests"
        known = _known.get().digests.get(str(self.blob(name).url))
        if known is not None:
            return known
        reader = self.blob(name).reader()
        try:
            if reader.size() > largest_digests(len(metadata.storage_data or {})):
                return f"its digests {name} are damaged: they are too long"
            found = load_digests(reader.read(0))
        except ResourceNotFoundError:
            return f"its digests {name} are missing"
        except CheckpointError as error:
            return f"its digests {name} are damaged: {error}"
        finally:
            reader.close()
        if found.save_id != _save_id(metadata):
            return f"its digests {name} are those of another save"
        self.remember_digests(name, found)
        return found

    def remember_digests(self, name: str, digests: Digests) -> None:
        """Note that the side blob *name*, which is never overwritten, has these *digests*."""
        _known.get().digests.put(str(self.blob(name).url), digests)

    def save_id(self, rank: int | None = None) -> str | None:
        """The id of the save that is here now, as far as it is known."""
        try:
            return self.load(rank)[1].save_id
        except (AzureError, CheckpointError):
            return None

    @contextmanager
    def _reading(self, rank: int | None) -> Iterator[None]:
        """Say in errors which metadata is broken."""
        try:
            yield
        except CheckpointError as error:
            where = self.blob(metadata_name(rank)).url
            raise CheckpointError(f"{where}: {error}", checkpoint=self.url, key=error.key, rank=rank) from None

    def _not_found(self, name: str, rank: int | None) -> CheckpointNotFoundError:
        """The error for a folder without a checkpoint, with the reason that its listing suggests."""
        why, above = "there is no checkpoint here", self.url.rpartition("/")[0] if self.address.blob else self.url
        step = f"; to see which checkpoints there are, run: azstoragetorch checkpoint ls {above}"
        try:
            for page in self._container.pages(prefix=self.address.blob):
                if self.address.blob in page.names:
                    why, step = "this is a blob, not the folder of a checkpoint", "; pass the URL of the folder"
                elif any(found.startswith(self.prefix) for found in page.names):
                    why = "there are blobs but no complete checkpoint: a save is in progress or was interrupted"
                break
        except (AzureError, ValueError):
            pass  # not everybody may list
        return CheckpointNotFoundError(f"{self.url}: {why} (no {name!r}){step}", checkpoint=self.url, rank=rank)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"


def _save_id(metadata: Metadata) -> str | None:
    found = getattr(getattr(metadata, "storage_meta", None), "save_id", None)
    return str(found) if found is not None else None


def picklable(error: BaseException) -> BaseException:
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
