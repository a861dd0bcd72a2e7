"""Fetch once, broadcast to the others: what all ranks of a node or of the job need alike, such as replicated weights.

The coordinator decides from the plans of all ranks who fetches what; every rank then takes part in the same
broadcasts in the same order. Before the first one, all ranks tell each other whether they succeeded, so that the
failure of one is the failure of all and nobody waits for a broadcast that never comes.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from azstoragetorch._blob.config import MiB
from azstoragetorch.exceptions import CheckpointError

SHARING = ("rank", "node", "world")

_PACKED = 1 * MiB  # smaller tensors travel together
_PARCEL = 32 * MiB  # bytes of small tensors that travel together, and the most of a large one at once

Source = tuple[bool, str, tuple[int, ...] | None, tuple[int, ...], tuple[int, ...]]
"""What a read is of: whether a tensor, which entry and chunk, which box of it."""


class Loaded(Protocol):
    """What the exchange needs of a load under way."""

    kept: dict[Source, torch.Tensor | bytes]

    def target(self, wanted: ReadItem) -> torch.Tensor:
        """The tensor that *wanted* is for."""
        ...

    def accept(self, wanted: ReadItem, value: torch.Tensor | bytes) -> None:
        """*wanted* is loaded: its target has the content *value*, or these are its bytes."""
        ...


def this_node() -> str:
    """What tells the node of this process apart: the host, and the agent of torchrun that started it."""
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"


def source_of(wanted: ReadItem) -> Source:
    """What *wanted* is a read of, whatever tensor it goes to."""
    index = wanted.storage_index
    offset = None if index.offset is None else tuple(index.offset)
    is_tensor = wanted.type == LoadItemType.TENSOR
    return is_tensor, index.fqn, offset, tuple(wanted.storage_offsets), tuple(wanted.lengths)


@dataclass(frozen=True)
class Sharing:
    """For one rank: who fetches what the ranks of its group (in this order) need alike."""

    rank: int
    group: tuple[int, ...]
    owners: tuple[tuple[Source, int], ...]

    def mine(self, items: Sequence[ReadItem]) -> list[ReadItem]:
        """What this rank fetches itself."""
        others = {source for source, owner in self.owners if owner != self.rank}
        return [item for item in items if source_of(item) not in others]

    def kept(self) -> set[Source]:
        """What this rank fetches for others too."""
        return {source for source, owner in self.owners if owner == self.rank}

    def exchange(self, items: Sequence[ReadItem], load: Loaded, failure: Exception | None, group: Any) -> None:
        """Take part in the broadcasts. *failure* is that of this rank's own part; *group* is that of the load.

        Raises:
            CheckpointError: another rank failed, or wants the same in another type.
        """
        wanted = {source_of(item): item for item in items}
        shapes: list[Any] = []
        if failure is None:
            shapes = [self._shape(wanted[source], load) for source, _ in self.owners]
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, (None if failure is None else str(failure), self.group, shapes), group=group)
        failed = {rank: error for rank, (error, _, _) in enumerate(told) if error is not None}
        if failed:
            if failure is not None:
                return  # raised by the caller
            first = min(failed)
            raise CheckpointError(f"rank {first}, which shares what it fetches, failed: {failed[first]}")
        for rank, (_, ranks, theirs) in enumerate(told):
            if ranks == self.group and theirs != shapes:
                raise CheckpointError(
                    f"load_once_per: ranks {self.rank} and {rank} want the same entries in different types or shapes; "
                    "load them with load_once_per='rank'"
                )
        if len(self.group) > 1 and self.owners:
            self._broadcast(wanted, load, group)

    def _shape(self, item: ReadItem, load: Loaded) -> Any:
        if item.type == LoadItemType.BYTE_IO:
            return None
        target = load.target(item)
        return str(target.dtype), tuple(target.shape)

    def _broadcast(self, wanted: dict[Source, ReadItem], load: Loaded, group: Any) -> None:
        carriers = group
        if len(self.group) < dist.get_world_size(group):
            ranks = [rank if group is None else dist.get_global_rank(group, rank) for rank in self.group]
            carriers = dist.new_group(ranks, use_local_synchronization=True)
        device = _device_of(carriers)
        try:
            for owner, sources in _parcels(self.owners, wanted, load):
                self._send(owner, sources, wanted, load, carriers, device)
        finally:
            if carriers is not group:
                dist.destroy_process_group(carriers)

    def _send(
        self,
        owner: int,
        sources: list[Source],
        wanted: dict[Source, ReadItem],
        load: Loaded,
        group: Any,
        device: torch.device,
    ) -> None:
        """Broadcast *sources* of *owner* in one go."""
        src = self.group.index(owner)
        is_owner = owner == self.rank
        if not sources[0][0]:
            values: list[Any] = [load.kept[source] if is_owner else None for source in sources]
            dist.broadcast_object_list(values, group=group, group_src=src)
        else:
            values = []
            for source in sources:
                kept = load.kept[source] if is_owner else load.target(wanted[source])
                assert isinstance(kept, torch.Tensor)
                values.append(kept)
            parts = [_bytes_of(value, device) for value in values]
            flat = torch.cat(parts) if len(parts) > 1 else parts[0]
            for at in range(0, flat.numel(), _PARCEL):
                dist.broadcast(flat[at : at + _PARCEL], group=group, group_src=src)
            if not is_owner:
                at = 0
                for value in values:
                    part = flat[at : at + value.nbytes].clone().view(value.dtype).view(value.shape)
                    at += value.nbytes
                    with torch.no_grad():
                        value.copy_(part)
        for source, value in zip(sources, values, strict=True):
            load.accept(wanted[source], value)


def plan_sharing(plans: Sequence[LoadPlan], *, by_node: bool, size_of: Callable[[MetadataIndex], int]) -> list[Sharing]:
    """Who fetches what, from the *plans* of all ranks, whose ``storage_data`` says where each runs."""
    groups: dict[Any, list[int]] = {}
    for rank, plan in enumerate(plans):
        groups.setdefault(plan.storage_data if by_node else None, []).append(rank)
    shared: list[Sharing | None] = [None] * len(plans)
    for ranks in groups.values():
        counts = [Counter(map(source_of, plans[rank].items)) for rank in ranks]
        alike = [
            item
            for item in plans[ranks[0]].items
            if len(ranks) > 1 and all(count[source_of(item)] == 1 for count in counts)
        ]
        loads = dict.fromkeys(ranks, 0)
        owners = []
        for item in sorted(alike, key=lambda item: -size_of(item.storage_index)):
            owner = min(ranks, key=lambda rank: (loads[rank], rank))
            loads[owner] += size_of(item.storage_index)
            owners.append((source_of(item), owner))
        for rank in ranks:
            shared[rank] = Sharing(rank, tuple(ranks), tuple(owners))
    return [sharing for sharing in shared if sharing is not None]


def _parcels(
    owners: Sequence[tuple[Source, int]], wanted: dict[Source, ReadItem], load: Loaded
) -> Iterator[tuple[int, list[Source]]]:
    """What travels together: entries of one owner, of one kind and on one device, as long as they are small."""
    open_parcels: dict[tuple[int, bool], tuple[list[Source], int]] = {}
    for source, owner in owners:
        size = load.target(wanted[source]).nbytes if source[0] else 0
        if size >= _PACKED:
            yield owner, [source]
            continue
        sources, total = open_parcels.pop((owner, source[0]), ([], 0))
        if total + size > _PARCEL:
            yield owner, sources
            sources, total = [], 0
        open_parcels[owner, source[0]] = [*sources, source], total + size
    for (owner, _), (sources, _) in open_parcels.items():
        yield owner, sources


def _bytes_of(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The elements of *tensor* as flat bytes on *device*; its own memory where that will do."""
    moved = tensor.detach() if tensor.device.type == device.type else tensor.detach().to(device)
    return moved.contiguous().reshape(-1).view(torch.uint8)


def _device_of(group: Any) -> torch.device:
    """Where tensors have to be to be broadcast in *group*."""
    backend = str(dist.get_backend(group))
    return torch.device("cuda" if backend == "nccl" else "cpu")
