"""Load entries of a checkpoint without a model, and convert checkpoints to and from what `torch.save` writes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_saver import save

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.progress import ProgressCallback
from azstoragetorch.checkpoint._reader import BlobStorageReader
from azstoragetorch.checkpoint._writer import BlobStorageWriter
from azstoragetorch.exceptions import CheckpointError
from azstoragetorch.io import BlobIO


def load_keys(
    url: str,
    keys: str | Iterable[str] | None = None,
    *,
    weights_only: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    progress: ProgressCallback | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Load entries of the checkpoint in the folder *url* as whole CPU tensors, without a model to load them into.

    Args:
        url: URL of the folder.
        keys: The entries to load: flat keys such as ``"model.layer.weight"``, or prefixes of paths in the nested state
            dict such as ``"model"`` or ``"model.layer"``. None loads all entries.
        weights_only: Load entries other than tensors as `torch.load` does with ``weights_only=True``, which runs no
            code from the checkpoint. Pass False only for a checkpoint that you trust.
        credential: Same as for :class:`BlobStorageReader`.
        transfer: Same as for :class:`BlobStorageReader`.
        progress: Same as for :class:`BlobStorageReader`.
        verify: Same as for :class:`BlobStorageReader`.

    Returns:
        The state dict, nested as it was saved.

    Raises:
        KeyError: one of *keys* matches nothing.
        CheckpointError, AzureError: same as for :class:`BlobStorageReader`.
    """
    reader = BlobStorageReader(url, credential=credential, transfer=transfer, progress=progress, verify=verify)
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
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
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
            raise CheckpointError(f"the metadata places {key!r} at {path!r:.100}, which is not a path", key=str(key))
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


def checkpoint_to_torch_save(
    url: str,
    blob_url: str,
    *,
    weights_only: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    verify: bool = False,
) -> None:
    """Write the checkpoint in the folder *url* as one blob that `torch.load` reads.

    The state dict must fit into memory.

    Args:
        url: URL of the checkpoint's folder.
        blob_url: URL of the blob to write or overwrite.
        weights_only: Same as for :func:`load_keys`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`; used for both URLs.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.
        verify: Same as for :class:`BlobStorageReader`.

    Raises:
        CheckpointError, AzureError: the checkpoint cannot be read.
        FatalBlobIOWriteError: the blob cannot be written; it is unchanged.
    """
    state = load_keys(url, weights_only=weights_only, credential=credential, transfer=transfer, verify=verify)
    with BlobIO(blob_url, "wb", credential=credential, transfer=transfer) as blob:
        torch.save(state, blob)


def torch_save_to_checkpoint(
    blob_url: str,
    url: str,
    *,
    weights_only: bool = True,
    overwrite: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    base: str | None = None,
    digests: bool = False,
) -> None:
    """Write the blob *blob_url*, which `torch.save` wrote, as a checkpoint that any number of ranks can load.

    Args:
        blob_url: URL of the blob.
        url: URL of the checkpoint's folder.
        weights_only: Load the blob as `torch.load` does with ``weights_only=True``, which runs no code from the blob.
        overwrite: Same as for :class:`BlobStorageWriter`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`; used for both URLs.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.
        base: Same as for :class:`BlobStorageWriter`.
        digests: Same as for :class:`BlobStorageWriter`.

    Raises:
        TypeError: the blob does not contain a dict.
        AzureError: the blob cannot be read.
        CheckpointException: the checkpoint cannot be written; this is torch's exception, which contains the reason.
    """
    with BlobIO(blob_url, "rb", credential=credential, transfer=transfer) as blob:
        state = torch.load(blob, map_location="cpu", weights_only=weights_only)
    if not isinstance(state, dict):
        raise TypeError(
            f"{blob_url!r} contains a {type(state).__name__}, but a checkpoint can only be made from a dict"
        )
    writer = BlobStorageWriter(
        url, credential=credential, transfer=transfer, overwrite=overwrite, base=base, digests=digests
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # that is the intent
        save(state, storage_writer=writer, no_dist=True)
