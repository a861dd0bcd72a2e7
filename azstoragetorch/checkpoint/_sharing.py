"""Fetch once, broadcast to the others: what all ranks of a node or of the job need alike, such as replicated weights.

The coordinator decides from the plans of all ranks which of them fetches what; every rank then takes part in the same
broadcasts in the same order. Before the first one, all ranks gather a `_Report` of each, so that the failure of one is
the failure of all. A rank that cannot use what it receives after that raises when everything is sent: no rank waits
for a broadcast that never comes.

A rank may fail before it gets here: in the planner's ``finish_plan``, or by an interrupt. Then it is already in torch's
next step, which gathers the errors of all ranks over the same group. So its call meets that of the others here: they
receive its error in the place of a report, and it receives reports. The others raise that error and go to torch's
step, for which the failed rank would be missing, since it has left. Therefore a report, when it is unpickled by a rank
that has not reached `Sharing.exchange`, makes that rank take part in one more gathering: that of torch on the others.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from azstoragetorch._tensors.broadcast import PACKED, PARCEL, broadcast, device_of, subgroup
from azstoragetorch._tensors.host import select
from azstoragetorch._tensors.planning import boxes
from azstoragetorch.exceptions import CheckpointError

log = logging.getLogger("azstoragetorch")

SHARING = ("rank", "node", "world")

ReadKey = tuple[bool, str, tuple[int, ...] | None, tuple[int, ...], tuple[int, ...]]
"""What a read is of: whether a tensor, which entry and chunk, which box of it."""

TensorForm = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of what travels as the bare elements of a dense tensor."""


class LoadInProgress(Protocol):
    """What the exchange needs of a load in progress."""

    kept: dict[ReadKey, torch.Tensor | bytes]

    def target(self, wanted: ReadItem) -> torch.Tensor:
        """The tensor that *wanted* is for."""
        ...

    def touch(self, wanted: ReadItem) -> None:
        """The target of *wanted* is about to be written to."""
        ...

    def accept(self, wanted: ReadItem, value: torch.Tensor | bytes) -> None:
        """*wanted* is loaded: its target has the content *value*, or these are its bytes."""
        ...


class _Pending(threading.local):
    """Whether the load in progress on this thread, over *group*, has not reached its exchange."""

    is_expected = False
    group: Any = None


_pending = _Pending()


def expect_exchange(group: Any) -> None:
    """Note that a load over *group* begins on this thread, and may fail before its exchange."""
    _pending.is_expected, _pending.group = True, group


def members_of(group: Any) -> list[int]:
    """The global ranks in *group*, in order; none if this rank is not in it."""
    try:
        return list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)
    except (KeyError, TypeError, ValueError, RuntimeError):  # torch checks it in no version
        return []


def fingerprint(ranks: list[int]) -> str:
    """A short string that is equal for equal *ranks*, which may be thousands."""
    return hashlib.sha256(repr(ranks).encode()).hexdigest()


@dataclass(frozen=True)
class _Report:
    """What a rank reports before the broadcasts: its failure, the ranks that it shares with, the forms of the owned."""

    failure: str | None
    ranks: tuple[int, ...]
    forms: list[TensorForm | None]

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.failure, self.ranks, self.forms)


def _received(failure: str | None, ranks: tuple[int, ...], forms: list[TensorForm | None]) -> _Report:
    """Unpickle a report. In a rank that has failed before its exchange, join the gathering that follows there."""
    if _pending.is_expected:
        _pending.is_expected = False
        try:
            dist.all_gather_object([None] * dist.get_world_size(_pending.group), None, group=_pending.group)
        except Exception as error:  # noqa: BLE001 - this rank raises what made it fail
            log.debug("the ranks that share with this one, which has failed, are not there any more: %s", error)
    return _Report(failure, ranks, forms)


def read_key(wanted: ReadItem) -> ReadKey:
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
    owners: tuple[tuple[ReadKey, int], ...]

    def mine(self, items: Sequence[ReadItem]) -> list[ReadItem]:
        """What this rank fetches itself."""
        others = {source for source, owner in self.owners if owner != self.rank}
        return [item for item in items if read_key(item) not in others]

    def kept(self) -> set[ReadKey]:
        """What this rank fetches for others too."""
        return {source for source, owner in self.owners if owner == self.rank}

    def exchange(self, items: Sequence[ReadItem], load: LoadInProgress, failure: Exception | None, group: Any) -> None:
        """Take part in the broadcasts. *failure* is that of this rank's own part; *group* is that of the load.

        Raises:
            CheckpointError: another rank failed, or wants the same in another type.
            Exception: *failure*, or what the planner raised.
        """
        wanted = {read_key(item): item for item in items}
        forms: list[TensorForm | None] = []
        if failure is None:
            try:
                forms = [_tensor_form(wanted[source], load) for source, _ in self.owners]
            except Exception as error:  # noqa: BLE001 - raised when the others know
                failure = error
        told: list[Any] = [None] * dist.get_world_size(group)
        _pending.is_expected = False
        report = _Report(None if failure is None else str(failure), self.group, forms)
        dist.all_gather_object(told, report, group=group)
        if failure is not None:
            raise failure
        for rank, theirs in enumerate(told):
            if not isinstance(theirs, _Report):
                raise _absent(rank, theirs)
            if theirs.failure is not None:
                raise CheckpointError(f"rank {rank}, which shares what it fetches, failed: {theirs.failure}")
        for rank, theirs in enumerate(told):
            if theirs.ranks == self.group and theirs.forms != forms:
                raise CheckpointError(
                    f"load_once_per: ranks {self.rank} and {rank} want the same entries in different types or shapes; "
                    "load them with load_once_per='rank'"
                )
        if len(self.group) > 1 and self.owners:
            with subgroup(self.group, group) as carriers:
                _Broadcasts(self, wanted, load, carriers).run(forms)


class _Broadcasts:
    """The broadcasts of one rank. They are the same on all ranks, whatever happens to what is sent."""

    def __init__(self, sharing: Sharing, wanted: dict[ReadKey, ReadItem], load: LoadInProgress, group: Any) -> None:
        self._sharing = sharing
        self._wanted = wanted
        self._load = load
        self._group = group
        self._device = device_of(group)
        self._failure: Exception | None = None

    def run(self, forms: Sequence[TensorForm | None]) -> None:
        """Send and receive everything; *forms* are those of the owned, in order."""
        for owner, parcel in _parcels(self._sharing.owners, forms):
            src = self._sharing.group.index(owner)
            is_owner = owner == self._sharing.rank
            if parcel[0][1] is None:
                self._send_objects([source for source, _ in parcel], src, is_owner)
            else:
                self._send_tensors(parcel, src, is_owner)
        if self._failure is not None:
            raise self._failure

    def _send_objects(self, sources: list[ReadKey], src: int, is_owner: bool) -> None:
        values: list[Any] = [self._load.kept[source] if is_owner else None for source in sources]
        dist.broadcast_object_list(values, group=self._group, group_src=src)
        for source, value in zip(sources, values, strict=True):
            with self._deferring_errors():
                content = value
                if isinstance(value, torch.Tensor) and not is_owner:
                    content = self._load.target(self._wanted[source])
                    self._load.touch(self._wanted[source])
                    with torch.no_grad():
                        content.copy_(value)
                self._load.accept(self._wanted[source], content)

    def _send_tensors(self, parcel: list[tuple[ReadKey, TensorForm | None]], src: int, is_owner: bool) -> None:
        values: list[torch.Tensor] = []
        for source, form in parcel:
            assert form is not None
            dtype, shape = form
            value: Any = self._load.kept[source] if is_owner else None
            if value is None:
                with self._deferring_errors():
                    value = self._load.target(self._wanted[source])
                    self._load.touch(self._wanted[source])
            values.append(value if value is not None else torch.empty(shape, dtype=dtype, device="cpu"))
        if len(values) > 1:
            self._send(values, src, is_owner)
        else:
            (value,) = values
            for box in boxes(tuple(value.shape), value.itemsize, PARCEL):
                self._send([select(value, box)], src, is_owner)
        for (source, _), value in zip(parcel, values, strict=True):
            with self._deferring_errors():
                self._load.accept(self._wanted[source], value)

    def _send(self, values: list[torch.Tensor], src: int, is_owner: bool) -> None:
        broadcast(values, src=src, is_source=is_owner, group=self._group, device=self._device)

    @contextmanager
    def _deferring_errors(self) -> Iterator[None]:
        """Keep the first error of the planner for when all is sent."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised at the end of `run`
            self._failure = self._failure or error


def plan_sharing(plans: Sequence[LoadPlan], *, by_node: bool, size_of: Callable[[MetadataIndex], int]) -> list[Sharing]:
    """Who fetches what, from the *plans* of all ranks, whose ``storage_data`` says where each runs."""
    groups: dict[Any, list[int]] = {}
    for rank, plan in enumerate(plans):
        groups.setdefault(plan.storage_data if by_node else None, []).append(rank)
    shared: list[Sharing | None] = [None] * len(plans)
    for ranks in groups.values():
        counts = [Counter(map(read_key, plans[rank].items)) for rank in ranks]
        alike = [
            item
            for item in plans[ranks[0]].items
            if len(ranks) > 1 and all(count[read_key(item)] == 1 for count in counts)
        ]
        loads = dict.fromkeys(ranks, 0)
        owners = []
        for item in sorted(alike, key=lambda item: -size_of(item.storage_index)):
            owner = min(ranks, key=lambda rank: (loads[rank], rank))
            loads[owner] += size_of(item.storage_index)
            owners.append((read_key(item), owner))
        for rank in ranks:
            shared[rank] = Sharing(rank, tuple(ranks), tuple(owners))
    return [sharing for sharing in shared if sharing is not None]


def _absent(rank: int, sent: Any) -> CheckpointError:
    """The error for *rank*, which sent something else than a report: torch's pair of an error and its traceback."""
    if isinstance(sent, tuple) and sent and isinstance(sent[0], BaseException):
        return CheckpointError(
            f"rank {rank} failed before it loaded what it shares: {type(sent[0]).__name__}: {sent[0]}", rank=rank
        )
    return CheckpointError(
        f"rank {rank} does not share what it loads, though load_once_per plans it: a finish_plan of the planner has to "
        "keep storage_data of the plan",
        rank=rank,
    )


def _tensor_form(item: ReadItem, load: LoadInProgress) -> TensorForm | None:
    """The form in which *item* travels; None for what is pickled: no tensors, and tensors that are not dense."""
    if item.type == LoadItemType.BYTE_IO:
        return None
    target = load.target(item)
    if target.layout != torch.strided or target.is_quantized:
        return None
    return target.dtype, tuple(target.shape)


def _parcels(
    owners: Sequence[tuple[ReadKey, int]], forms: Sequence[TensorForm | None]
) -> Iterator[tuple[int, list[tuple[ReadKey, TensorForm | None]]]]:
    """What travels together: entries of one owner and of one kind, as long as they are small."""
    parcels: dict[tuple[int, bool], list[tuple[ReadKey, TensorForm | None]]] = {}
    totals: Counter[tuple[int, bool]] = Counter()
    for (source, owner), form in zip(owners, forms, strict=True):
        size = math.prod(form[1]) * form[0].itemsize if form is not None else 0
        if size >= PACKED:
            yield owner, [(source, form)]
            continue
        key = owner, form is not None
        if totals[key] + size > PARCEL:
            yield owner, parcels.pop(key)
            totals[key] = 0
        parcels.setdefault(key, []).append((source, form))
        totals[key] += size
    for (owner, _), parcel in parcels.items():
        yield owner, parcel
