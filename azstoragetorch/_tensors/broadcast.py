"""Send the elements of tensors from one rank to the others of a process group."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from azstoragetorch._engine.config import MiB
from azstoragetorch._tensors.host import bytes_alike

PACKED = 1 * MiB  # smaller tensors travel together
PARCEL = 32 * MiB  # bytes of small tensors that travel together, and the most of a large one at once
_ALIGNMENT = 16  # bytes; elements of any type may lie there


def device_of(group: Any) -> torch.device:
    """Where tensors have to be to be broadcast in *group*."""
    backend = str(dist.get_backend(group))
    return torch.device("cuda" if backend == "nccl" else "cpu")


def broadcast(values: Sequence[torch.Tensor], *, src: int, is_source: bool, group: Any, device: torch.device) -> None:
    """Broadcast the elements of *values* in one go: in their own memory if that will do, else in a copy.

    *src* is the rank in *group*. On it, *is_source* is true and *values* are sent; on the others they are filled.
    """
    if len(values) == 1 and _is_plain(values[0], device):
        flat = values[0].detach().reshape(-1).view(torch.uint8)
        dist.broadcast(flat, group=group, group_src=src)
        return
    places, end = [], 0
    for value in values:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + value.nbytes
        places.append(slice(start, end))
    flat = torch.empty(end, dtype=torch.uint8, device=device)
    copies = [flat[place].view(v.dtype).view(v.shape) for place, v in zip(places, values, strict=True)]
    with torch.no_grad():
        if is_source:
            for value, copy in zip(values, copies, strict=True):
                bytes_alike(copy).copy_(bytes_alike(value))
        dist.broadcast(flat, group=group, group_src=src)
        if not is_source:
            for value, copy in zip(values, copies, strict=True):
                bytes_alike(value).copy_(bytes_alike(copy))


def _is_plain(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether the elements of *tensor* lie on *device* as they are, one after the other."""
    return tensor.device.type == device.type and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def scatter(
    parts: Sequence[torch.Tensor] | None,
    target: torch.Tensor,
    *,
    longest: int,
    src: int,
    group: Any,
    device: torch.device,
) -> None:
    """Send part *r* of *parts* from the rank *src* of *group* to rank *r*, which gets it into its *target*.

    Only *src* has *parts*. They may differ in length: *longest* is that of the longest one in bytes, on all ranks.
    *target* has the shape and the type of the part of this rank.
    """
    received = torch.empty(longest, dtype=torch.uint8, device=device)
    sent = None
    with torch.no_grad():
        if parts is not None:
            sent = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in parts]
            for buffer, part in zip(sent, parts, strict=True):
                _elements(buffer, part).copy_(bytes_alike(part))
        dist.scatter(received, sent, group=group, group_src=src)
        bytes_alike(target).copy_(_elements(received, target))


def _elements(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first bytes of *buffer* as a tensor of the shape and the type of *like*, or as bytes."""
    return bytes_alike(buffer[: like.nbytes].view(like.dtype).view(like.shape))


def this_node() -> str:
    """The node of this process: the host, and the agent of torchrun that started it."""
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"


@contextmanager
def subgroup(ranks: Sequence[int], group: Any) -> Iterator[Any]:
    """The process group of *ranks* of *group*, which all of them enter: *group* itself if these are all."""
    if len(ranks) == dist.get_world_size(group):
        yield group
        return
    members = [rank if group is None else dist.get_global_rank(group, rank) for rank in ranks]
    made = dist.new_group(members, use_local_synchronization=True)
    try:
        yield made
    finally:
        dist.destroy_process_group(made)
