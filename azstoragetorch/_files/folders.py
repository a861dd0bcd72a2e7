"""Copies of local folders below one URL, each complete or not there.

A copy NAME has its files in ``NAME/<id of the save>/``, under names that no other save uses. The blob
``NAME/.complete.json`` lists them and is written last, by one conditional request: it replaces only what the save saw
when it began. So an interrupted save changes nothing, and of two saves of one name at the same time one fails. The list
is parsed, never executed, and names outside the folder are refused.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from azure.core.exceptions import ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_url, why_refused
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._files.paths import PARTIAL_PREFIX, CopyError, display
from azstoragetorch._files.transfer import Hooks, get_file, put_file
from azstoragetorch._files.walk import walk

COMPLETE = ".complete.json"
_FORMAT = 1
_MOST_REPLACED = 100  # times that a folder is put back by others while it is replaced
_MAX_LIST = 64 * MiB  # a larger list was not written by this package
_SPECIAL = frozenset('\\:*?"<>|')  # in names that a Windows system would take for something else


@dataclass(frozen=True, slots=True)
class Complete:
    """A complete copy: the id of its save, the sizes of its files, and the ETag of the list."""

    save_id: str
    files: Mapping[str, int]
    etag: str


def new_save_id() -> str:
    """An id that no other save has."""
    return uuid.uuid4().hex


def files_of(folder: Path) -> list[str]:
    """The names of all files in *folder*, relative and with slashes, sorted.

    Raises:
        CopyError: something in it cannot be copied.
        OSError: it cannot be read.
    """
    names = []
    for entry in walk(folder, "files"):
        if entry.problem:
            raise CopyError(f"{entry.problem}; nothing was saved")
        if entry.is_left_out:
            continue
        if not _is_inside(entry.name):
            raise CopyError(
                f"{display(entry.path)}: the name has a character that not every system allows; nothing was saved: "
                "rename the file"
            )
        names.append(entry.name)
    return names


class Folders:
    """Copies of folders below *url*, by name. Cheap, lazy and picklable, as the clients that it uses.

    Raises:
        ValueError: *url* is not a valid URL.
        TypeError: an argument has the wrong type.
    """

    def __init__(self, url: str, credential: Credential = None, transfer: TransferConfig | None = None) -> None:
        place = parse_url(url)
        if place.is_read_only:
            raise ValueError(f"url {str(place)!r} is a snapshot or version, which cannot be written")
        self._place = replace(place, blob=place.blob.strip("/"), sas=None)
        self._container = ClientFactory(credential, transfer, place).container(place)

    @property
    def url(self) -> str:
        """The URL of the place, without a SAS."""
        return str(self._place)

    def names(self) -> dict[str, bool]:
        """The names of all copies, and whether each is complete."""
        found: dict[str, bool] = {}
        prefix = self._prefix()
        for page in self._container.pages(prefix=prefix):
            for blob_name in page.names:
                name, slash, rest = blob_name[len(prefix) :].partition("/")
                if slash:
                    found[name] = found.get(name, False) or rest == COMPLETE
        return found

    def find(self, name: str) -> Complete | None:
        """The complete copy *name*, or None.

        Raises:
            CopyError: its list of files is not valid.
        """
        blob = self._blob(name, COMPLETE)
        version = blob.version()
        if version is None:
            return None
        if version.size > _MAX_LIST:
            raise CopyError(f"{blob.url}: has {version.size} bytes, so it is not a list of the files of a checkpoint")
        try:
            content, version = blob.read()
        except ResourceNotFoundError:
            return None
        save_id, files = _parse(content, str(blob.url))
        return Complete(save_id, files, version.etag)

    def upload(self, name: str, save_id: str, folder: Path, files: Iterable[str]) -> dict[str, int]:
        """Copy *files* of *folder* to blobs that belong to *save_id*; return their sizes. Does not commit.

        Raises:
            CopyError: a file changed during the copy.
            FatalBlobIOWriteError: a blob could not be written.
            OSError: a file cannot be read.
        """
        engine, config = self._container.engine, self._container.config

        def put(file: str, scope: Scope) -> tuple[str, int]:
            path = folder / file
            put_file(path, self._blob(name, save_id, file), None, Hooks(scope, _ignore))
            return file, path.stat().st_size

        small: list[str] = []
        large: list[str] = []  # each is sent in parallel already, with as much memory as there may be
        for file in files:
            (small if (folder / file).stat().st_size < config.block_size else large).append(file)
        return dict(engine.map(put, small, config.initial_concurrency) + engine.map(put, large, 1))

    def commit(self, name: str, save_id: str, files: Mapping[str, int], seen: Complete | None) -> None:
        """Make *files* the copy *name* in the place of what was *seen*, and delete what was replaced.

        Raises:
            CopyError: another save of *name* was committed, or data was deleted, in the meantime; nothing was changed.
            FatalBlobIOWriteError: the service does not say whether it was done.
        """
        blob = self._blob(name, COMPLETE)
        found = self._each(lambda file: self._blob(name, save_id, file).version(), files)
        for (file, size), version in zip(files.items(), found, strict=True):
            if version is None or version.size != size:
                raise CopyError(f"{blob.url}: {file} was deleted or changed during the save, which has no effect")
        content = json.dumps({"format": _FORMAT, "save": save_id, "files": dict(files)}, indent=1).encode()
        is_ours, _ = blob.replace(content, etag=seen.etag if seen is not None else None)
        if not is_ours:
            raise CopyError(
                f"{blob.url}: another save was committed during this one, which has no effect: jobs that run at the "
                "same time need separate folders"
            )
        if seen is not None:
            self._each(lambda file: self._blob(name, seen.save_id, file).delete(), seen.files)

    def download(self, name: str, target: Path) -> None:
        """Copy the complete copy *name* to the folder *target*, which is replaced as a whole.

        Files that are already in *target* with the same content are not fetched again.

        Raises:
            FileNotFoundError: *name* does not exist or is not complete.
            CopyError: a file could not be copied; *target* is unchanged.
            OSError: a file cannot be written; *target* is unchanged.
        """
        complete = self.find(name)
        if complete is None:
            raise FileNotFoundError(f"{self.url}/{name}: there is no complete checkpoint (no {COMPLETE})")
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=target.parent))
        fresh = hidden / "new"
        try:
            fresh.mkdir()
            self._fetch(name, complete, target, fresh)
            _replace(target, fresh, hidden)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def _fetch(self, name: str, complete: Complete, target: Path, fresh: Path) -> None:
        """Copy all files to the folder *fresh*, from the blobs or, where it is the same, from the folder *target*."""

        def get(file: str, scope: Scope) -> None:
            blob, path = self._blob(name, complete.save_id, file), fresh / file
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                if stat.S_ISREG((target / file).lstat().st_mode):
                    os.link(target / file, path)  # compared with the blob below, and replaced if it differs
            get_file(blob, path, Hooks(scope, _ignore))
            if path.stat().st_size != complete.files[file]:
                raise CopyError(f"{blob.url}: is not as long as it was when it was saved")

        self._container.engine.map(get, list(complete.files), self._container.config.initial_concurrency)

    def delete(self, name: str) -> None:
        """Delete the copy *name*, complete or not: first it is no longer complete, then its data is deleted."""
        self._blob(name, COMPLETE).delete()
        prefix = self._prefix(name)
        names = [blob_name for page in self._container.pages(prefix=prefix) for blob_name in page.names]
        self._each(lambda blob_name: self._container.blob(blob_name).delete(), names)

    def _each(self, action: Any, items: Iterable[str]) -> list[Any]:
        config = self._container.config
        return self._container.engine.map(lambda item, _scope: action(item), list(items), config.max_connections)

    def _prefix(self, *names: str) -> str:
        return "".join(f"{part}/" for part in (self._place.blob, *names) if part)

    def _blob(self, *names: str) -> BlobClient:
        return self._container.blob(self._prefix(*names)[:-1])

    def __repr__(self) -> str:
        return f"Folders({self.url!r})"


def _replace(target: Path, fresh: Path, hidden: Path) -> None:
    """Move the folder *fresh* to *target*, and what is there to *hidden*.

    On a file system that nodes share, others may do the same at the same time.
    """
    for attempt in range(_MOST_REPLACED):
        old = hidden / f"old-{attempt}"
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            fresh.rename(target)
        except BaseException as error:
            if os.path.lexists(target) and isinstance(error, OSError):
                continue  # it is there again
            if os.path.lexists(old) and not os.path.lexists(target):
                old.rename(target)
            raise
        return
    raise CopyError(f"{target}: other processes replace it all the time; nothing was copied")


def _ignore(_count: int) -> None:
    """Report no progress."""


def _parse(content: bytes, where: str) -> tuple[str, dict[str, int]]:
    """The id of the save and the files in the list *content*, which anybody may have written."""
    damaged = CopyError(f"{where}: is damaged: it is not a list of the files of a checkpoint")
    try:
        found = json.loads(content)
        form, save_id, files = found["format"], found["save"], found["files"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damaged from None
    if form != _FORMAT:
        raise CopyError(f"{where}: has the format {form!r}, which this version does not know: upgrade azstoragetorch")
    if not isinstance(save_id, str) or not save_id.isalnum() or not isinstance(files, dict):
        raise damaged
    if not all(type(size) is int and _is_inside(name) for name, size in files.items()):
        raise damaged
    return save_id, files


def _is_inside(name: str) -> bool:
    """Whether *name* is that of a file in a folder, on every system."""
    parts = PurePosixPath(name).parts
    is_plain = bool(parts) and "/".join(parts) == name and "/" not in parts and not _SPECIAL.intersection(name)
    return is_plain and why_refused(name) is None and name.isprintable()
