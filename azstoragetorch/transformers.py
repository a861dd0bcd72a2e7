"""Checkpoints of a Hugging Face ``Trainer`` in blobs; needs transformers (the extra ``transformers``).

::

    container = "https://<account>.blob.core.windows.net/<container>"
    saver = BlobCheckpointCallback(f"{container}/run", keep=3)
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[saver])
    trainer.train(resume_from_checkpoint=saver.download_latest(args))
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from azure.core.exceptions import AzureError

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._files.folders import Folders, files_of, new_save_id
from azstoragetorch.exceptions import AZStorageTorchError, CheckpointError

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(f"azstoragetorch.transformers needs transformers ({error}): pip install transformers") from error

__all__ = ["BlobCheckpointCallback"]

T = TypeVar("T")

_log = logging.getLogger("azstoragetorch")
_STEP = re.compile(r"checkpoint-(\d+)")  # the folders that the Trainer saves to


class BlobCheckpointCallback(TrainerCallback):  # type: ignore[misc]  # transformers need not be installed everywhere
    """A callback for transformers' ``Trainer`` that copies each checkpoint to blobs, and brings back the last one.

    After the ``Trainer`` has saved ``checkpoint-N`` in its ``output_dir``, all files are copied to blobs below *url*,
    before training continues. A copy is all or nothing: a job that is killed during it resumes from the previous
    checkpoint. If several nodes train, the files of all nodes are copied: those that only one node has, such as the
    states of its random number generators, and one copy of the others.

    The files of a checkpoint are in ``checkpoint-N/<id>/``. They count once ``checkpoint-N/.complete.json``, which
    lists them, is written. ``save_total_limit`` of the ``Trainer`` limits the local checkpoints, and *keep* the copies.

    Args:
        url: URL of a folder, in any of the forms that :doc:`the guide </guide/urls>` lists. Jobs that run at the same
            time need separate folders.
        keep: How many checkpoints to keep in blobs: the last ones, and the best one that the ``Trainer`` knows. Older
            ones are deleted after a new one is complete, as is what interrupted saves left behind. By default, all.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: *url* is not a valid URL, or *keep* is less than 1.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: int | None = None,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int)):
            raise TypeError(f"keep must be an integer or None, not {type(keep).__name__}")
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self._folders = Folders(url, credential, transfer)
        self._keep = keep

    def checkpoints(self) -> list[str]:
        """The names of the complete checkpoints in blobs, such as ``checkpoint-500``, by step.

        Raises:
            AzureError: the service refused the request, or could not be reached.
        """
        names = [name for name, is_complete in self._folders.names().items() if is_complete and _step_of(name) >= 0]
        return sorted(names, key=_step_of)

    def download_latest(self, args: TrainingArguments) -> str | None:
        """Download the last complete checkpoint to ``args.output_dir``, on each node; returns the path of its folder.

        Pass the result as ``resume_from_checkpoint`` of ``Trainer.train``. Returns None if no checkpoint exists. Call
        it on all ranks. A local folder of the same name is replaced; files with the same content are not downloaded
        again.

        Raises:
            AzureError: the service refused a request, or could not be reached.
            AZStorageTorchError: the checkpoint is damaged, or was deleted in the meantime.
            OSError: a file cannot be written.
        """
        names = _on_all_ranks(lambda: self.checkpoints() if _rank() == 0 else [])[0]
        if not names:
            return None
        name = names[-1]
        target = Path(args.output_dir) / name
        _on_all_ranks(lambda: self._folders.download(name, target) if args.local_process_index == 0 else None)
        return str(target)

    def on_save(self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Copy the checkpoint that was just saved; called by the ``Trainer`` on all ranks.

        Raises:
            AZStorageTorchError: the copy failed; it has no effect.
            AzureError: the service refused a request, or could not be reached; the copy has no effect.
            OSError: a file cannot be read; the copy has no effect.
        """
        name = f"checkpoint-{state.global_step}"
        folder = Path(args.output_dir) / name
        is_first = _rank() == 0
        seen = _on_all_ranks(lambda: self._folders.find(name) if is_first else None)[0]
        # All ranks have written their files when all of them have come here.
        present = _on_all_ranks(lambda: self._present(folder) if args.local_process_index == 0 else [])
        save_id = _on_all_ranks(new_save_id)[0]
        owners = {file: rank for rank, files in reversed(list(enumerate(present))) for file in files}
        mine = [file for file, rank in owners.items() if rank == _rank()]
        uploaded = _on_all_ranks(lambda: self._folders.upload(name, save_id, folder, mine))
        files = {file: size for of_rank in uploaded for file, size in of_rank.items()}
        _on_all_ranks(lambda: self._folders.commit(name, save_id, files, seen) if is_first else None)
        if is_first and self._keep is not None:
            self._prune(self._keep, {name, Path(state.best_model_checkpoint or "").name})

    @staticmethod
    def _present(folder: Path) -> list[str]:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: the Trainer did not save its checkpoint here. BlobCheckpointCallback copies checkpoints in "
                "args.output_dir, and a hyperparameter search saves to other folders"
            )
        return files_of(folder)

    def _prune(self, keep: int, others: set[str]) -> None:
        """Delete all checkpoints but the last *keep* and *others*, and what interrupted saves left before the last.

        The new checkpoint is complete, whatever comes of this.
        """
        try:
            found = {name: complete for name, complete in self._folders.names().items() if _step_of(name) >= 0}
            complete = sorted((name for name in found if found[name]), key=_step_of)
            kept = {*complete[-keep:], *others}
            for name in sorted(found, key=_step_of):
                if name not in kept and (found[name] or _step_of(name) < _step_of(complete[-1])):
                    self._folders.delete(name)
        except (AzureError, AZStorageTorchError, IndexError) as error:
            _log.warning(
                "%s: older checkpoints were not deleted; the next save tries again: %s", self._folders.url, error
            )


def _step_of(name: str) -> int:
    """The step of the checkpoint *name*; -1 if it is not the name of one."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found is not None else -1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Call *action* on this rank, and return what it returned on each rank. If it fails on one, all ranks raise."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [action()]
    value: T | None = None
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:  # noqa: BLE001 - raised below, when the other ranks know of it
        failure = error
    reason = f"{type(failure).__name__}: {failure}" if failure is not None else None
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (value, reason))
    if failure is not None:
        raise failure
    for rank, (_, other) in enumerate(found):
        if other is not None:
            raise CheckpointError(f"rank {rank} could not copy a checkpoint: {other}", rank=rank)
    return [value for value, _ in found]
