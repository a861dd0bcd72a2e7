"""One listing for all ranks of a job: rank 0 lists, and the others receive what it found.

Rank 0 broadcasts messages until one of them ends the exchange: a listing, or an error. While it lists, it reports every
few seconds that it still does, so that no rank runs into the timeout of the process group. An error of rank 0 is raised
on every rank. What no rank can be told is that rank 0 has died: then the process group raises its own error, or its
timeout ends the waiting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from azure.core.exceptions import AzureError

from azstoragetorch._blob.errors import picklable
from azstoragetorch._engine.config import MiB
from azstoragetorch._samples.catalog import Catalog
from azstoragetorch._tensors.broadcast import device_of

_LISTING, _LISTED, _REFUSED, _FAILED = range(4)
_REPORT_EVERY = 5.0  # seconds; the shortest timeout that makes sense for a process group is some times that
_CHUNK = 64 * MiB


def check_group(group: Any) -> None:
    """Check that there is a process group.

    Raises:
        ValueError: there is none, or this process is not in *group*.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("share_listing=True: torch.distributed is not initialized: call init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("share_listing=True: this rank is not in the group")


def share_listing(
    listing: Callable[[Callable[[int], object]], Catalog], what: dict[str, Any], containers: list[Any], group: Any
) -> Catalog:
    """What *listing* returns on rank 0 of *group*. It is called there only, with a function that reports progress.

    *what* describes the listing: it must be the same on all ranks.

    Raises:
        AzureError: on the other ranks, if the service refused rank 0.
        ValueError: on the other ranks, if rank 0 failed otherwise, or lists something else.
    """
    exchange = _Exchange(group)
    if dist.get_rank(group) == 0:
        return _list_for_all(listing, what, exchange)
    while True:
        kind, data = exchange.receive()
        if kind == _LISTING:
            continue
        if kind == _LISTED:
            head = data.index(b"\0")
            theirs = json.loads(data[:head])
            if theirs != what:
                raise ValueError(f"share_listing=True: this rank lists {what}, and rank 0 lists {theirs}")
            return Catalog.from_bytes(containers, memoryview(data)[head + 1 :])
        message = f"rank 0 could not list {what['container']}: {data.decode()}"
        if kind == _REFUSED:
            raise picklable(AzureError(message))
        raise ValueError(message)


def _list_for_all(
    listing: Callable[[Callable[[int], object]], Catalog], what: dict[str, Any], exchange: _Exchange
) -> Catalog:
    reported = time.monotonic()

    def report(_count: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_EVERY:
            exchange.send(_LISTING, b"")
            reported = time.monotonic()

    try:
        catalog = listing(report)
    except Exception as error:
        kind = _REFUSED if isinstance(error, AzureError) else _FAILED
        with suppress(RuntimeError):  # a rank is gone, which is not the first failure
            exchange.send(kind, f"{type(error).__name__}: {error}".encode())
        raise
    exchange.send(_LISTED, json.dumps(what).encode() + b"\0" + catalog.to_bytes())
    return catalog


class _Exchange:
    """Messages from rank 0 of a process group to all others: a kind, and bytes."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._device = device_of(group)

    def send(self, kind: int, data: bytes) -> None:
        """Send a message; all other ranks are in `receive`, or come to it."""
        self._broadcast(torch.tensor([kind, len(data)], dtype=torch.int64))
        if data:
            self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def receive(self) -> tuple[int, bytes]:
        """The next message."""
        kind, length = self._broadcast(torch.zeros(2, dtype=torch.int64)).tolist()
        data = self._broadcast(torch.empty(length, dtype=torch.uint8)) if length else torch.empty(0)
        return kind, data.numpy().tobytes() if length else b""

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """*values* of rank 0, in their own memory; a part at a time, for a device with little memory to spare."""
        for part in torch.split(values, _CHUNK):
            sent = part.to(self._device)
            dist.broadcast(sent, group=self._group, group_src=0)
            if sent is not part:
                part.copy_(sent)
        return values
