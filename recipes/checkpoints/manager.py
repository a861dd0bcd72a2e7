"""What a training loop needs from checkpoints, as in torchtitan: load the latest, save at intervals, keep some.

    checkpoints = CheckpointManager(url, {"app": state}, every=500, keep=3)
    step = checkpoints.load()
    while step < steps:
        step += 1
        train(step)
        checkpoints.save(step, last=step == steps)
    checkpoints.close()

All ranks create one and make the same calls. Saving copies the state and continues in the background; the next save
waits for it. If a save is interrupted, the previous checkpoint remains.
"""

from __future__ import annotations

import re
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from azstoragetorch import join_url
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, keep_last, latest_checkpoint
from recipes.access import split_sas


class CheckpointManager:
    """Checkpoints of *states*, which are Stateful or tensors, as folders ``step-N`` of *url*, in which a SAS may be."""

    def __init__(
        self, url: str, states: dict[str, Any], *, every: int, keep: int | None = None, credential: Any = None
    ) -> None:
        place, self._credential = split_sas(url, credential)
        self._url = place.rstrip("/")
        self._states = states
        self._every = every
        self._keep = keep
        # A background save communicates with the other ranks while training does, so it needs a separate group.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=10))
        self._writer = BlobStorageWriter(self._url, credential=self._credential)
        self._saving: Future[Any] | None = None

    def load(self) -> int:
        """Load the latest complete checkpoint; returns its step, or 0 without a checkpoint."""
        latest: list[str | None] = [None]
        if dist.get_rank() == 0:  # all ranks must load the same checkpoint
            latest = [latest_checkpoint(self._url, credential=self._credential)]
        dist.broadcast_object_list(latest, group=self._group)
        (url,) = latest
        if url is None:
            return 0
        reader = BlobStorageReader(url, credential=self._credential)
        dcp.load(self._states, storage_reader=reader, process_group=self._group)
        found = re.search(r"step-(\d+)$", url)
        return int(found.group(1)) if found else 0

    def save(self, step: int, *, last: bool = False) -> None:
        """Save if *step* is one to save at, or the *last*: that one is waited for."""
        if step % self._every and not last:
            return
        self.wait()
        self._saving = dcp.async_save(
            self._states,
            checkpoint_id=join_url(self._url, f"step-{step}"),
            storage_writer=self._writer,
            process_group=self._group,
        )
        if last:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress; raises what it raised."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()
            if self._keep is not None and dist.get_rank() == 0:
                keep_last(self._url, self._keep, credential=self._credential)

    def close(self) -> None:
        """Wait for the save in progress."""
        self.wait()
