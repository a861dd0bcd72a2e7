"""Find and remove checkpoints, in one process."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.engine import Scope, engine_for
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._format import METADATA, is_rank_metadata, saved_at
from azstoragetorch.exceptions import CheckpointError

_NUMBER = re.compile(r"(\d+)")


# -- which there are --------------------------------------------------------------------------------------------------


def list_checkpoints(
    base_url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> list[str]:
    """The URLs of the complete checkpoints in the folders of *base_url*, oldest first.

    Oldest is by the numbers in the folders' names: ``step-900`` comes before ``step-1000``. A checkpoint is complete
    when its ``.metadata`` is there; those of ranks that did not coordinate (``use_collectives=False``) cannot be told
    from incomplete ones and are left out. The URLs have no SAS.

    Raises:
        AzureError: the service refused, or could not be reached.
    """
    return [folder.url for folder in _complete(Folder(base_url, credential, transfer))]


def latest_checkpoint(
    base_url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> str | None:
    """The last of :func:`list_checkpoints`, or None if there is none: a job resumes from it or starts afresh."""
    for folder in reversed(_folders(Folder(base_url, credential, transfer))):
        if _is_complete(folder):
            return folder.url
    return None


def _folders(base: Folder) -> list[Folder]:
    """The folders in *base*, oldest first."""
    names = [
        prefix.removeprefix(base.prefix).rstrip("/") for page in base.listing(delimiter="/") for prefix in page.prefixes
    ]
    return [base.child(name) for name in sorted(filter(None, names), key=_by_number)]


def _is_complete(folder: Folder) -> bool:
    return folder.blob(METADATA).version() is not None


def _complete(base: Folder) -> list[Folder]:
    folders = _folders(base)
    is_complete = [False] * len(folders)

    def look(number: int) -> None:
        is_complete[number] = _is_complete(folders[number])

    _for_each(range(len(folders)), look, base)
    return [folder for folder, complete in zip(folders, is_complete, strict=True) if complete]


def _by_number(name: str) -> list[tuple[int, int, str]]:
    # Numbers come before text where names differ in kind.
    parts = _NUMBER.split(name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


# -- removing ---------------------------------------------------------------------------------------------------------


def delete_checkpoint(url: str, *, credential: Credential = None, transfer: TransferConfig | None = None) -> int:
    """Delete the checkpoint in the folder *url*, complete or not; returns how many blobs that were.

    ``.metadata`` goes first, so that an interrupted deletion leaves no checkpoint that looks complete. Blobs that
    belong to no checkpoint, and folders in the folder, stay.

    Raises:
        AzureError: the service refused, or could not be reached.
    """
    return _delete(Folder(url, credential, transfer))


def _delete(folder: Folder) -> int:
    present = {name.removeprefix(folder.prefix) for page in folder.listing() for name in page.names}
    metadata = sorted(name for name in present if name == METADATA or is_rank_metadata(name))
    doomed = {name for name in present if "/" not in name and saved_at(name) is not None}
    for name in metadata:
        doomed |= _referenced(folder, name) & present
    for name in metadata:
        folder.blob(name).delete()
    _for_each(sorted(doomed - set(metadata)), lambda name: folder.blob(name).delete(), folder)
    return len(doomed | set(metadata))


def _referenced(folder: Folder, metadata: str) -> frozenset[str]:
    """The data blobs that *metadata* refers to; none if it cannot be read."""
    rank = None if metadata == METADATA else int(metadata.removeprefix("__").removesuffix(METADATA))
    try:
        return folder.data_paths(rank)
    except CheckpointError:
        return frozenset()


def keep_last(
    base_url: str, count: int, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> list[str]:
    """Delete all complete checkpoints in the folders of *base_url* but the last *count*; returns their URLs.

    Incomplete ones stay, since one of them may be being saved; see :func:`clean`.

    Raises:
        ValueError: *count* is less than 1.
        AzureError: the service refused, or could not be reached.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}: delete_checkpoint removes a checkpoint for good")
    doomed = _complete(Folder(base_url, credential, transfer))[:-count]
    for folder in doomed:
        _delete(folder)
    return [folder.url for folder in doomed]


def clean(
    url: str, *, min_age: float = 0.0, credential: Credential = None, transfer: TransferConfig | None = None
) -> list[str]:
    """Delete what interrupted saves left in the folder *url* and in all folders below; returns the blobs' URLs.

    These are data blobs of :class:`BlobStorageWriter` that no metadata in their folder refers to, staged blocks
    included. Everything else stays. A save that is under way is not told apart from an interrupted one: if its blobs
    are deleted it fails, with the previous checkpoint in place. Pass *min_age*, in seconds since the save began, to
    leave young ones alone.

    Raises:
        CheckpointError: a ``.metadata`` cannot be read, so what it refers to is unknown; nothing was deleted.
        AzureError: the service refused, or could not be reached.
    """
    base = Folder(url, credential, transfer)
    folders: dict[str, set[str]] = {}
    for page in base.listing(uncommitted=True):
        for full in page.names:
            path, _, name = full.removeprefix(base.prefix).rpartition("/")
            folders.setdefault(path, set()).add(name)
    latest = time.time() - min_age
    doomed: list[tuple[Folder, str]] = []
    for path, names in sorted(folders.items()):
        folder = base.child(path) if path else base
        ours = {name for name in names if (begun := saved_at(name)) is not None and begun <= latest}
        if not ours:
            continue
        if METADATA in names:
            ours -= folder.data_paths()
        else:
            for name in filter(is_rank_metadata, names):
                rank = int(name.removeprefix("__").removesuffix(METADATA))
                ours -= folder.data_paths(rank)
        doomed += [(folder, name) for name in sorted(ours)]

    def remove(target: tuple[Folder, str]) -> None:
        blob = target[0].blob(target[1])
        if not blob.delete():
            blob.put(b"")  # nothing but staged blocks: they go when there is a blob
            blob.delete()

    _for_each(doomed, remove, base)
    return [str(folder.blob(name).url) for folder, name in doomed]


def _for_each(items: Iterable[Any], action: Callable[[Any], object], folder: Folder) -> None:
    """Run *action* on all *items*, many at once."""

    def task(item: Any) -> Callable[[Scope], None]:
        return lambda _scope: (action(item), None)[1]

    tasks = [task(item) for item in items]
    engine_for(folder.transfer).run_all(tasks, folder.transfer.max_connections)
