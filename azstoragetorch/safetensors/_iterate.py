"""Tensors one by one, as they arrive: what loads a model into an engine that has its own memory for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.budget import Budget, Loan
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.job import Bell, Job
from azstoragetorch._engine.memory import new_buffer
from azstoragetorch._engine.process import here
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._tensors.planning import Box
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._folder import open_model
from azstoragetorch.safetensors._model import Stored, reads_of
from azstoragetorch.safetensors._parts import Sharding, converted, sharding, wanted_of

_MAPPED = 2 * MiB  # bytes; larger tensors get memory of the system itself

_Batch = dict[str, tuple[Stored, Box]]


class _Fetching(NamedTuple):
    """A batch that is in flight, and the bytes that it holds."""

    batch: _Batch
    job: Job[dict[str, torch.Tensor]]
    loan: Loan | None


def iter_tensors(
    url: str,
    names: Iterable[str] | None = None,
    *,
    device: str | int | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    shard: Sharding = None,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the tensors of a safetensors file or of a folder of them, in the order in which they arrive.

    Tensors are requested in the order of their bytes, several at once, and the one that arrives first is next. Those
    that have arrived or are in flight hold at most ``memory_limit`` bytes, and no more than the requests in flight
    need; a tensor that is larger is fetched alone.

    Args:
        url: URL of a file, which ends in ``.safetensors``, of a folder, or of an index in it.
        names: Only these; None is all.
        device: Where the tensors are created, as for `torch.device`.
        dtype: Same as for `load_file`.
        shard: Same as for `load_file`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Returns:
        An iterator over pairs of a name and a tensor. The headers are read, and *names* are checked, before this
        function returns.

    Raises:
        SafetensorsError: same as for `load_model_folder`.
        BlobChangedError: a file was overwritten meanwhile; raised by the iterator.
    """
    parts = sharding(shard)
    model = open_model(url, credential, transfer)
    batches = _batches(wanted_of(model, names, parts), model.transfer.effective_part_size)
    return _arrivals(deque(batches), torch.device(device), dtype, model.transfer)


def _batches(wanted: _Batch, size: int) -> list[_Batch]:
    """*wanted* in batches of about *size* bytes, which one request fetches; larger tensors are alone."""
    batches: list[_Batch] = []
    held = size
    for name, (stored, box) in wanted.items():
        cost = _cost(stored, box)
        if held + cost > size:
            batches.append({})
            held = 0
        batches[-1][name] = stored, box
        held += cost
    return batches


def _cost(stored: Stored, box: Box) -> int:
    return torch.Size(box.lengths).numel() * stored.dtype.itemsize


def _arrivals(
    waiting: deque[_Batch], device: torch.device, dtype: torch.dtype | None, transfer: TransferConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    limit = min(transfer.memory_limit, transfer.initial_concurrency * transfer.effective_part_size)
    budget, bell, scope, process = Budget(limit), Bell(), Scope(), here()
    flying: list[_Fetching] = []
    try:
        while waiting or flying:
            if process is not here():  # forked: the threads that fetch exist only in the parent
                waiting.extendleft(fetching.batch for fetching in reversed(flying))
                budget, bell, scope, process = Budget(limit), Bell(), Scope(), here()
                flying = []
            while waiting and len(flying) < transfer.initial_concurrency:
                loan = budget.take(sum(_cost(*wanted) for wanted in waiting[0].values()))
                if loan is None and flying:
                    break
                batch = waiting.popleft()
                made = {name: _new(stored, box, dtype, device) for name, (stored, box) in batch.items()}
                job = Job(partial(_fetch_batch, batch, made, transfer, scope), bell)
                del made
                flying.append(_Fetching(batch, job, loan))
                engine_for(transfer).submit(job.run)
            arrived = _first(flying, bell)
            flying.remove(arrived)
            with on_error(arrived.job.give_up):  # the error's traceback refers to this frame
                tensors = arrived.job.result()
            while tensors:
                yield tensors.popitem()
            del arrived, tensors  # and with it the loan
    finally:
        scope.cancel()
        for fetching in flying:
            fetching.job.give_up()


def _first(flying: list[_Fetching], bell: Bell) -> _Fetching:
    """The one of *flying* that is over first.

    This thread fetches only what no other has begun with after a while: it would wait for one request while others
    arrive.
    """
    while True:
        looks = 0

        def is_due() -> bool:
            nonlocal looks
            looks += 1  # `wait_until` sleeps after the second
            return any(fetching.job.is_over for fetching in flying) or (
                looks > 2 and any(fetching.job.is_open for fetching in flying)
            )

        bell.wait_until(is_due)
        for fetching in flying:
            if fetching.job.is_over:
                return fetching
        latest = next((fetching for fetching in reversed(flying) if fetching.job.is_open), None)
        if latest is not None:
            latest.job.run()  # the one that a thread would begin with last


def _new(stored: Stored, box: Box, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """Memory for one tensor; that of a large one goes back to the system at once when it is dropped.

    What malloc gets back it may keep, which for tensors of many sizes adds up to more than is in use.
    """
    kind = converted(stored.dtype, dtype)
    count = torch.Size(box.lengths).numel()
    if device.type != "cpu" or count * kind.itemsize < _MAPPED:
        return stored.new(box, kind, device)
    try:
        area = new_buffer(count * kind.itemsize)
    except (OSError, MemoryError, OverflowError):
        return stored.new(box, kind, device)  # or its error
    return torch.frombuffer(area, dtype=torch.uint8).view(kind).view(box.lengths)


def _fetch_batch(
    batch: _Batch, tensors: dict[str, torch.Tensor], transfer: TransferConfig, scope: Scope
) -> dict[str, torch.Tensor]:
    reads = [read for name, (stored, box) in batch.items() for read in reads_of(stored, box, tensors[name])]
    with scope.child() as inner:
        fetch(reads, transfer, scope=inner)
    return dict(reversed(tensors.items()))
