"""Send the elements of tensors from one rank to the others of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from azstoragetorch._engine.config import MiB

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
                copy.copy_(value)
        dist.broadcast(flat, group=group, group_src=src)
        if not is_source:
            for value, copy in zip(values, copies, strict=True):
                value.copy_(copy)


def _is_plain(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether the elements of *tensor* lie on *device* as they are, one after the other."""
    return tensor.device.type == device.type and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
