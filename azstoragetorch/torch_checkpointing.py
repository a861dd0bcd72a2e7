"""Checkpoints of torch_checkpointing in blobs; needs that package (the extra ``torch-checkpointing``).

::

    container = "https://<account>.blob.core.windows.net/<container>"
    storage = BlobStorageConfig(f"{container}/run")
    manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
    manager.save("step-100", {"model": model.state_dict(), "step": 100})

torch_checkpointing writes a checkpoint ``X`` to ``tmp_X`` and commits it by renaming that. Blobs have no directories
that could be renamed in one step. So the service copies each of them, and a marker makes the copies count at once:
while the blob ``X.incomplete`` exists, ``X`` does not. It is written before the first copy, and deleting it is the
commit. A rename that is killed leaves it behind, and the next one to ``X`` replaces what is there.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from azure.core.exceptions import AzureError, HttpResponseError, ResourceModifiedError, ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, BlobProperties, ClientFactory, ContainerClient
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL, check_name, parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._files.description import describe_found
from azstoragetorch._files.server_copy import copy_on_server
from azstoragetorch._files.transfer import CopyOptions, Hooks, copy_blob
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.io import BlobIO

try:
    from torch_checkpointing.storage.base_storage import ReadArgs, Storage, StorageConfig
except ImportError as error:
    raise ImportError(
        f"azstoragetorch.torch_checkpointing needs torch_checkpointing ({error}): pip install torch-checkpointing"
    ) from error

__all__ = ["BlobStorage", "BlobStorageConfig"]

INCOMPLETE = ".incomplete"  # follows the name of a directory that is being renamed to that name
_log = logging.getLogger("azstoragetorch")


class BlobStorageConfig(StorageConfig):  # type: ignore[misc]  # need not be installed where types are checked
    """The ``storage_config`` of a ``CheckpointManager`` that keeps its checkpoints in blobs below *url*.

    The id of a checkpoint is then a path relative to *url*, such as ``"step-100"``, or the URL of a folder below it.

    It can be pickled, for the process that torch_checkpointing writes in. A SAS or account key is included only for
    child processes.

    Args:
        url: URL of the folder, in any of the forms that :doc:`the guide </guide/urls>` lists.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: *url* is not a valid URL, or is a snapshot or version.
        TypeError: an argument has the wrong type.
    """

    def __init__(self, url: str, *, credential: Credential = None, transfer: TransferConfig | None = None) -> None:
        place = parse_url(url)
        if place.is_read_only:
            raise ValueError(f"url {str(place)!r} is a snapshot or version, which cannot be written")
        self._root = replace(place, blob=place.blob.strip("/"), sas=None)
        self._container = ClientFactory(credential, transfer, place).container(place)

    @property
    def url(self) -> str:
        """The URL of the folder, without a SAS."""
        return str(self._root)

    def create_storage(self) -> BlobStorage:
        """Return the storage; called by torch_checkpointing in each process."""
        return BlobStorage(self._root, self._container)

    def __repr__(self) -> str:
        return f"BlobStorageConfig({self.url!r})"


class BlobStorage(Storage):  # type: ignore[misc]  # need not be installed where types are checked
    """Files below a URL; created by torch_checkpointing from a :class:`BlobStorageConfig`.

    Errors are those of a local file system where it has one (``FileNotFoundError``, ``FileExistsError``,
    ``IsADirectoryError``), otherwise those of :class:`~azstoragetorch.io.BlobIO`. A directory exists as long as there
    is a file in it.
    """

    def __init__(self, root: BlobURL, container: ContainerClient) -> None:
        self._root = root
        self._url = str(root)
        self._container = container
        self._has_warned = False

    def __repr__(self) -> str:
        return f"BlobStorage({self._url!r})"

    @property
    def mmap_fill_workers(self) -> int:
        """Always 1, because one stream reads ahead in parallel, and sees one version of the file."""
        return 1

    # -- files ------------------------------------------------------------------------------------------------------

    def stream_read(self, path: Path, read_args: ReadArgs | None = None) -> io.RawIOBase:
        """Open a file to read.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        client = self._blob(path)
        is_whole = read_args is None or read_args.pre_read_full_file
        try:
            if is_whole:
                head = client.head()
                version, data = head.version, head.data
            else:
                version, data = client.get_properties().version, b""
        except ResourceNotFoundError as error:
            raise FileNotFoundError(f"{client.url} does not exist") from error
        return cast("io.RawIOBase", BlobIO._of(client, version, data))  # noqa: SLF001 - ours

    def stream_write(self, path: Path) -> io.IOBase:
        """Open a file to write. It changes when the stream is closed without an error, and only then."""
        return BlobIO._of(self._blob(path), mode="wb")  # noqa: SLF001 - ours

    def write(self, path: Path, data: Any) -> None:
        """Replace a file.

        Raises:
            FatalBlobIOWriteError: the write failed; the file is unchanged.
        """
        self._blob(path).put(memoryview(data).cast("B"))

    def delete(self, path: Path) -> None:
        """Delete a file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        client = self._blob(path)
        if not client.delete():
            raise FileNotFoundError(f"{client.url} does not exist")

    def getsize(self, path: Path) -> int:
        """The size of a file in bytes.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        client = self._blob(path)
        version = client.version()
        if version is None:
            raise FileNotFoundError(f"{client.url} does not exist")
        return version.size

    def exists(self, path: Path) -> bool:
        """Whether there is a file, or a directory that was renamed completely."""
        return self._is_file(self._name(path)) or self.isdir(path)

    # -- directories ------------------------------------------------------------------------------------------------

    def isdir(self, path: Path) -> bool:
        """Whether there is a directory: a file below it, and no rename to it that was not completed."""
        name = self._name(path)
        return self._has_files(name) and (not name or self._container.blob(name + INCOMPLETE).version() is None)

    def mkdir(self, path: Path, recursive: bool = True) -> None:  # noqa: ARG002 - of torch_checkpointing
        """Do nothing: a directory exists as soon as there is a file in it."""
        self._name(path)

    def rmdir(self, path: Path) -> None:
        """Delete a directory with everything in it. From the first step on, it does not exist.

        Raises:
            FileNotFoundError: the directory does not exist.
        """
        name = self._checked(path)
        if not self._has_files(name):
            raise FileNotFoundError(f"{self._url}: there is no directory {name!r}")
        mark = self._container.blob(name + INCOMPLETE)
        mark.put(b"")
        self._delete_all(name)
        mark.delete()

    def ls(self, path: Path) -> list[str]:
        """The names of the files and directories in a directory. Directories that are incomplete are left out.

        Raises:
            FileNotFoundError: the directory does not exist.
        """
        name = self._name(path)
        prefix = f"{name}/" if name else ""
        files: list[str] = []
        folders: set[str] = set()
        for page in self._container.pages(prefix=prefix, delimiter="/"):
            files += [found[len(prefix) :] for found in page.names]
            folders.update(found[len(prefix) :].rstrip("/") for found in (*page.prefixes, *page.directories))
        marks = {found for found in files if found.endswith(INCOMPLETE)}
        folders -= {mark.removesuffix(INCOMPLETE) for mark in marks} | {""}
        if not files and not folders and name != self._root.blob:
            raise FileNotFoundError(f"{self._url}: there is no directory {name!r}")
        return sorted({*files, *folders} - marks)

    def rename(
        self,
        src_path: Path,
        dst_path: Path,
        is_directory: bool = False,
        background_cleanup: bool = False,  # noqa: ARG002 - the cleanup is deletions at once, and takes no time to speak of
    ) -> None:
        """Rename a file, or a directory to one that does not exist. The service copies: nothing is uploaded again.

        A directory is there completely or not at all, whenever this process is killed.

        Raises:
            FileNotFoundError: there is nothing at *src_path*.
            FileExistsError: a directory would be renamed to one that exists, or to a file.
            IsADirectoryError: a file would be renamed to a directory.
            BlobChangedError: another process changed a file, or renamed something to *dst_path*, in the meantime.
        """
        source, target = self._checked(src_path), self._checked(dst_path)
        found = None if is_directory else self._container.blob(source).find_properties()
        if found is not None:
            if self.isdir(dst_path):
                raise IsADirectoryError(f"{self._blob(dst_path).url} is a directory: {source} was not renamed to it")
            if source != target:
                self._copy(source, found, target, Scope())
                self._container.blob(source).delete(etag=found.version.etag)
            return
        names, _ = self._below(source)
        if not names:
            raise FileNotFoundError(f"{self._url}: there is nothing at {source!r} to rename")
        self._commit(source, target, names)
        try:
            self._delete_all(source)
        except AzureError as error:
            _log.warning("%s: was renamed, and not all of %s was deleted: %s", self._blob(dst_path).url, source, error)

    def remap_path(self, path: Path) -> str:
        """The URL of a file or directory."""
        return str(self._container.url.with_blob(name)) if (name := self._name(path)) else self._url

    # -- how it is done ---------------------------------------------------------------------------------------------

    def _commit(self, source: str, target: str, names: list[str]) -> None:
        """Copy the directory *source*, the files *names*, to *target*, which is there when everything is."""
        mark = self._container.blob(target + INCOMPLETE)
        left = mark.version()  # by a rename that was killed
        if self._is_file(target) or (left is None and self._has_files(target)):
            raise FileExistsError(
                f"{self._container.url.with_blob(target)} exists, so {source} was not renamed to it: delete it first, "
                "or save under another name"
            )
        is_ours, now = mark.replace(os.urandom(16).hex().encode(), etag=left.etag if left is not None else None)
        if not is_ours or now is None:
            raise self._conflict(target)
        self._delete_all(target)

        def copy(name: str, scope: Scope) -> None:
            found = self._container.blob(f"{source}/{name}").get_properties(scope)
            self._copy(f"{source}/{name}", found, f"{target}/{name}", scope)

        self._each(copy, names)
        try:
            mark.delete(etag=now.version.etag)
        except ResourceModifiedError as error:
            raise self._conflict(target) from error

    def _conflict(self, target: str) -> BlobChangedError:
        return BlobChangedError(
            f"{self._container.url.with_blob(target)}: another process is renaming something to it: jobs that run at "
            "the same time need separate folders"
        )

    def _copy(self, source: str, found: BlobProperties, target: str, scope: Scope) -> None:
        origin, copied = self._container.blob(source), self._container.blob(target)
        try:
            copy_on_server(origin, copied, found, scope)
        except (ResourceNotFoundError, ResourceModifiedError):
            raise
        except HttpResponseError as error:  # the service may not read the source by URL, as a firewall can have it
            if not self._has_warned:
                self._has_warned = True
                _log.warning("%s: copies pass through this machine, since the service refused: %s", self._url, error)
            copy_blob(origin, copied, Hooks(scope, lambda _count: None), CopyOptions(is_forced=True))

    def _below(self, name: str) -> tuple[list[str], list[str]]:
        """The names of all files and of all markers of directories below the directory *name*, relative to it."""
        prefix = f"{name}/"
        files: list[str] = []
        markers: list[str] = []
        for page in self._container.pages(prefix=prefix):
            files += [found[len(prefix) :] for found in page.names]
            markers += [found[len(prefix) :].rstrip("/") for found in page.directories]
        return files, [found for found in markers if found]

    def _has_files(self, name: str) -> bool:
        prefix = f"{name}/" if name else ""
        return any(page.names for page in self._container.pages(prefix=prefix))

    def _delete_all(self, name: str) -> None:
        """Delete everything below the directory *name*, and in a hierarchical account the directory."""
        files, markers = self._below(name)
        self._each(lambda found, _scope: self._container.blob(f"{name}/{found}").delete(), files)
        for found in sorted(markers, key=lambda marker: marker.count("/"), reverse=True):  # not while they are full
            self._container.blob(f"{name}/{found}").delete()
        itself = self._container.blob(name).find_properties()
        if itself is not None and describe_found(itself).is_folder:
            self._container.blob(name).delete(etag=itself.version.etag)

    def _each(self, action: Callable[[str, Scope], Any], names: list[str]) -> None:
        self._container.engine.map(action, names, self._container.config.max_connections)

    def _is_file(self, name: str) -> bool:
        found = self._container.blob(name).find_properties() if name else None
        return found is not None and not describe_found(found).is_folder

    def _blob(self, path: Path) -> BlobClient:
        return self._container.blob(self._checked(path))

    def _checked(self, path: Path) -> str:
        name = self._name(path)
        if name == self._root.blob:
            raise ValueError(f"path {str(path)!r} is all of {self._url}: name a file or directory in it")
        return name

    def _name(self, path: Path) -> str:
        """The name of the blob, or the prefix without its last slash, that *path* stands for."""
        text = str(path)
        scheme, is_url, rest = text.partition(":/")
        if is_url and scheme.isalnum():  # a path has one slash where the URL had two
            place = parse_url(f"{scheme}://{rest.lstrip('/')}", argument="path")
            if replace(place, blob="", sas=None) != replace(self._root, blob=""):
                raise ValueError(f"path {text!r} is not in the container of {self._url}, which the storage is for")
            prefix = f"{self._root.blob}/" if self._root.blob else ""
            name = place.blob.strip("/")
            if not f"{name}/".startswith(prefix):
                raise ValueError(f"path {text!r} is not below {self._url}, which the storage is for")
        else:
            name = "/".join(part for part in (self._root.blob, text.strip("/")) if part and part != ".")
        if name:
            check_name(name, "path")
        return name
