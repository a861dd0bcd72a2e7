"""Find, look into, convert and remove checkpoints, in one process."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_saver import save

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.engine import Scope, engine_for
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._format import METADATA, is_rank_metadata, read_item, saved_at
from azstoragetorch.checkpoint._progress import Progress
from azstoragetorch.checkpoint._reader import BlobStorageReader
from azstoragetorch.checkpoint._writer import BlobStorageWriter
from azstoragetorch.exceptions import CheckpointError
from azstoragetorch.io import BlobIO

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


# -- looking into -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a checkpoint. Tensors have a type, a shape and a number of saved shards; others have neither."""

    key: str
    nbytes: int
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    shards: int = 1


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What a checkpoint holds. ``str()`` is a table of it; ``nbytes`` counts the bare data of tensors."""

    url: str
    entries: tuple[Entry, ...]
    blobs: int = field(default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.entries)

    def __str__(self) -> str:
        rows = [
            (
                entry.key,
                str(entry.dtype).removeprefix("torch.") if entry.dtype is not None else "object",
                "x".join(map(str, entry.shape)) if entry.shape else "" if entry.shape is None else "scalar",
                str(entry.shards),
                f"{entry.nbytes:,}",
            )
            for entry in self.entries
        ]
        rows.insert(0, ("key", "type", "shape", "shards", "bytes"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        form = "{:<%d}  {:<%d}  {:<%d}  {:>%d}  {:>%d}" % tuple(widths)  # noqa: UP031 - a format of a format
        lines = [form.format(*row) for row in rows]
        total = f"{len(self.entries)} entries, {self.nbytes:,} bytes, {self.blobs} data blobs"
        return "\n".join([self.url, *(line.rstrip() for line in lines), total])


def inspect_checkpoint(
    url: str, *, credential: Credential = None, transfer: TransferConfig | None = None
) -> CheckpointSummary:
    """What the checkpoint in the folder *url* holds, from its metadata alone. ``print`` shows it as a table.

    Raises:
        CheckpointNotFoundError: there is no checkpoint, or only an interrupted save.
        CheckpointError: the metadata is broken, or may run foreign code.
        AzureError: the service refused, or could not be reached.
    """
    folder = Folder(url, credential, transfer)
    metadata = folder.metadata()
    lengths = {index.fqn: info.length for index, info in metadata.storage_data.items()}
    entries = []
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if isinstance(entry, TensorStorageMetadata):
            dtype, shape = entry.properties.dtype, tuple(entry.size)
            entries.append(Entry(key, math.prod(shape) * dtype.itemsize, dtype, shape, len(entry.chunks)))
        else:
            entries.append(Entry(key, lengths.get(key, 0)))
    paths = {read_item(info).path for info in metadata.storage_data.values()}
    return CheckpointSummary(folder.url, tuple(entries), len(paths))


def load_keys(
    url: str,
    keys: str | Iterable[str] | None = None,
    *,
    weights_only: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Load entries of the checkpoint in the folder *url* as whole CPU tensors, without a model to load them into.

    Args:
        url: URL of the folder.
        keys: Which entries: flat keys such as ``"model.layer.weight"``, or the beginning of a path in the nested state
            dict such as ``"model"`` or ``"model.layer"``. None for all.
        weights_only: Read entries that are no tensors as `torch.load` does with ``weights_only=True``, which runs no
            foreign code. Pass False for a checkpoint that you trust.
        credential: As for :class:`BlobStorageReader`.
        transfer: As for :class:`BlobStorageReader`.
        progress: As for :class:`BlobStorageReader`.

    Returns:
        The state dict, nested as it was saved.

    Raises:
        KeyError: one of *keys* matches nothing.
        CheckpointError, AzureError: as for :class:`BlobStorageReader`.
    """
    reader = BlobStorageReader(url, credential=credential, transfer=transfer, progress=progress)
    wanted = None if keys is None else {keys} if isinstance(keys, str) else set(keys)
    metadata = reader.read_metadata()
    planner = _WholePlanner(metadata, wanted, weights_only)
    if wanted is not None and (unknown := sorted(wanted - planner.matched)):
        raise KeyError(f"{reader.checkpoint_id}: no entry is called {unknown[0]!r}, nor begins with it")
    planner.set_up_planner({}, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return planner.result


class _WholePlanner(DefaultLoadPlanner):
    """Makes the state dict that it loads from what the metadata says."""

    def __init__(self, metadata: Metadata, wanted: set[str] | None, weights_only: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights_only = weights_only
        self._paths = _paths_of(metadata)
        self.matched: set[str] = set()
        self._flat: dict[str, Any] = {}
        for key, entry in metadata.state_dict_metadata.items():
            names = {key, *_beginnings(self._paths.get(key, ()))}
            if wanted is not None and not names & wanted:
                continue
            self.matched |= names
            self._flat[key] = _empty(key, entry) if isinstance(entry, TensorStorageMetadata) else None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # noqa: ARG002 - torch's
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        super().set_up_planner(self._flat, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        self._flat[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=self._weights_only)

    @property
    def result(self) -> dict[str, Any]:
        """The state dict, nested again."""
        nested: dict[str, Any] = {}
        for key, value in self._flat.items():
            _put(nested, self._paths.get(key) or (key,), value)
        return nested


def _empty(key: str, entry: TensorStorageMetadata) -> torch.Tensor:
    try:
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    except RuntimeError as error:  # torch has no other for too little memory
        raise CheckpointError(f"no memory for {key!r} of the shape {tuple(entry.size)}: {error}", key=key) from None


def _paths_of(metadata: Metadata) -> dict[str, tuple[str | int, ...]]:
    """Where in the nested state dict each flat key belongs, as far as the planner that saved it noted that."""
    noted = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    limit = len(metadata.state_dict_metadata)  # no list has more entries than there are
    paths = {}
    for key, path in noted.items():
        is_path = isinstance(path, (tuple, list)) and all(
            isinstance(step, str) or (isinstance(step, int) and 0 <= step < limit) for step in path
        )
        if not is_path:
            raise CheckpointError(f"the metadata places {key!r} at {path!r:.100}, which is no path", key=str(key))
        paths[key] = tuple(path)
    return paths


def _beginnings(path: Sequence[str | int]) -> list[str]:
    return [".".join(map(str, path[:length])) for length in range(1, len(path) + 1)]


def _put(container: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Put *value* at *path*; a number makes a list, which is filled up with None as far as needed."""
    for step, following in zip(path, (*path[1:], None), strict=True):
        below: Any = None
        if isinstance(container, list):
            container += [None] * (int(step) + 1 - len(container))
            below = container[int(step)]
        elif step in container:
            below = container[step]
        if following is None:
            container[step] = value
            return
        if below is None:
            below = container[step] = [] if isinstance(following, int) else {}
        container = below


# -- converting -------------------------------------------------------------------------------------------------------


def checkpoint_to_torch_save(
    url: str,
    blob_url: str,
    *,
    weights_only: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> None:
    """Write the checkpoint in the folder *url* as one blob that `torch.load` reads; the state dict fits into memory.

    Args:
        url: URL of the checkpoint's folder.
        blob_url: URL of the blob to write or overwrite.
        weights_only: As for :func:`load_keys`.
        credential: For both.
        transfer: For both.

    Raises:
        CheckpointError, AzureError: the checkpoint cannot be read.
        FatalBlobIOWriteError: the blob cannot be written; it is as it was.
    """
    state = load_keys(url, weights_only=weights_only, credential=credential, transfer=transfer)
    with BlobIO(blob_url, "wb", credential=credential, transfer=transfer) as blob:
        torch.save(state, blob)  # type: ignore[arg-type]  # a file in all but its declaration


def torch_save_to_checkpoint(
    blob_url: str,
    url: str,
    *,
    weights_only: bool = True,
    overwrite: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> None:
    """Write the blob *blob_url*, which `torch.save` wrote, as a checkpoint that any number of ranks can load.

    Args:
        blob_url: URL of the blob.
        url: URL of the checkpoint's folder.
        weights_only: Load the blob as `torch.load` does with ``weights_only=True``, which runs no foreign code.
        overwrite: As for :class:`BlobStorageWriter`.
        credential: For both.
        transfer: For both.

    Raises:
        TypeError: the blob does not hold a dict.
        AzureError: the blob cannot be read.
        CheckpointException: the checkpoint cannot be written (torch's, with the reason inside).
    """
    with BlobIO(blob_url, "rb", credential=credential, transfer=transfer) as blob:
        state = torch.load(blob, map_location="cpu", weights_only=weights_only)  # type: ignore[arg-type]
    if not isinstance(state, dict):
        raise TypeError(f"{blob_url!r} holds a {type(state).__name__}; a checkpoint is made from a dict")
    writer = BlobStorageWriter(url, credential=credential, transfer=transfer, overwrite=overwrite)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # that is the intent
        save(state, storage_writer=writer, no_dist=True)


def _for_each(items: Iterable[Any], action: Callable[[Any], object], folder: Folder) -> None:
    """Run *action* on all *items*, many at once."""

    def task(item: Any) -> Callable[[Scope], None]:
        return lambda _scope: (action(item), None)[1]

    tasks = [task(item) for item in items]
    engine_for(folder.transfer).run_all(tasks, folder.transfer.max_connections)
