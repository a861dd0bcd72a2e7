"""Load once for all ranks of a node or of the job: each rank reads a part, and sends it to the others.

Every rank opens the files, and all of them compare versions and what they want before a byte is read. Tensors that all
ranks want alike are read in parts, one by each rank, and broadcast. Of tensors of which ranks want different columns,
each rank reads rows and sends every rank its columns of them. Parts of tensors that are one range of bytes, such as
rows, are read by the rank that wants them, alone.

Reading and sending alternate in rounds of limited size, and the next round is read while one is sent. Before a round is
sent, all ranks report whether they have read their parts. So the failure of one is the failure of all, and no rank
waits for a part that never comes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.job import Job
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._tensors.broadcast import (
    PACKED,
    PARCEL,
    broadcast,
    device_of,
    scatter,
    subgroup,
    this_node,
)
from azstoragetorch._tensors.host import bytes_alike, select
from azstoragetorch._tensors.planning import Box, boxes
from azstoragetorch._tensors.progress import ProgressCallback, ProgressCounter
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._model import Model, Read, Stored, reads_of
from azstoragetorch.safetensors._parts import converted, wanted_of
from azstoragetorch.safetensors._slices import Shard

SHARING = ("rank", "node", "world")
_ROUND = 32 * MiB  # bytes that a rank reads in one round, in addition to one parcel

Wanted = dict[str, tuple[Stored, Box]]


class _Report(NamedTuple):
    """What a rank reports before it reads: its failure, its node, its versions, and the boxes that it wants."""

    failure: str | None
    node: str
    digest: str
    boxes: list[Box] | None  # None: all of every tensor


class Parcel(NamedTuple):
    """A box of a tensor that one rank, *owner*, reads for all of the group."""

    name: str
    box: Box
    owner: int


@dataclass
class Plan:
    """What each rank of a group reads: *alone* are the tensors that it reads for itself."""

    alone: list[str] = field(default_factory=list)
    parcels: list[Parcel] = field(default_factory=list)
    nbytes: dict[int, int] = field(default_factory=dict)  # of the parcels of each rank

    def own(self, name: str, box: Box, nbytes: int, ranks: int) -> None:
        """Give *box* to the rank that has the least to read."""
        owner = min(range(ranks), key=lambda rank: (self.nbytes.get(rank, 0), rank))
        self.nbytes[owner] = self.nbytes.get(owner, 0) + nbytes
        self.parcels.append(Parcel(name, box, owner))


def plan_parcels(tensors: Sequence[tuple[str, tuple[int, ...], int]], wanted: Sequence[Sequence[Box]]) -> Plan:
    """Who reads what: of *tensors*, given as name, shape and bytes of an element, every rank has the boxes *wanted*."""
    plan, ranks = Plan(), len(wanted)
    for number, (name, shape, itemsize) in enumerate(tensors):
        theirs = [boxes_of_rank[number] for boxes_of_rank in wanted]
        union = _union(theirs)
        size = math.prod(union.lengths) * itemsize
        is_alike = all(box == union for box in theirs)
        if not size:
            continue
        if not is_alike and all(_is_range(box, shape) for box in theirs):
            plan.alone.append(name)
        elif is_alike and size < PACKED:
            plan.own(name, union, size, ranks)
        else:
            # Each rank reads about as much of every tensor, in parcels that are not too large to be sent at once.
            limit = min(PARCEL, max(1, -(-size // ranks)))
            for part in boxes(union.lengths, itemsize, limit):
                at = tuple(a + b for a, b in zip(union.offsets, part.offsets, strict=True))
                whole_rows = Box(at, part.lengths)
                plan.own(name, whole_rows, math.prod(part.lengths) * itemsize, ranks)
    return plan


def _union(theirs: Sequence[Box]) -> Box:
    """The smallest box that has all of *theirs* that are not empty."""
    full = [box for box in theirs if all(box.lengths)] or [theirs[0]]
    lows = tuple(map(min, zip(*(box.offsets for box in full), strict=True)))
    highs = tuple(max(box.offsets[dim] + box.lengths[dim] for box in full) for dim in range(len(full[0].lengths)))
    return Box(lows, tuple(high - low for high, low in zip(highs, lows, strict=True)))


def _is_range(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether the elements of *box* lie one after the other in a tensor of *shape*."""
    is_cut = False
    for length, size in zip(reversed(box.lengths), reversed(shape), strict=True):
        if is_cut and length != 1:
            return False
        is_cut = is_cut or length != size
    return True


def intersection(one: Box, other: Box) -> Box | None:
    """What is in both boxes; None if that is nothing."""
    lows = tuple(map(max, one.offsets, other.offsets))
    lengths = tuple(
        min(a + n, b + m) - low
        for a, n, b, m, low in zip(one.offsets, one.lengths, other.offsets, other.lengths, lows, strict=True)
    )
    return Box(lows, lengths) if all(length > 0 for length in lengths) else None


def inside(box: Box, outer: Box) -> Box:
    """*box* counted from the corner of *outer*, which has it."""
    return Box(tuple(a - b for a, b in zip(box.offsets, outer.offsets, strict=True)), box.lengths)


def load_shared(
    open_it: Callable[[], Model],
    device: torch.device,
    names: Iterable[str] | None,
    dtype: torch.dtype | None,
    parts: Callable[[str], Shard | None],
    *,
    per: str,
    group: Any,
    progress: ProgressCallback | None,
) -> dict[str, torch.Tensor]:
    """Do as `load_model`, together with the other ranks of *group* on this node, or with all of them.

    Raises:
        SafetensorsError: another rank failed, or has opened other versions or wants other tensors.
        Exception: what this rank failed with.
    """
    model: Model | None = None
    wanted: Wanted = {}
    failure: Exception | None = None
    try:
        model = open_it()
        wanted = wanted_of(model, names, parts)
        digest = _digest(model, wanted, dtype)
    except Exception as error:  # noqa: BLE001 - raised below, when the others know
        failure, digest = error, ""
    own_boxes = [box for _, box in wanted.values()]
    is_whole = all(box == stored.whole for stored, box in wanted.values())
    said = None if failure is None else _said(failure)
    reports = _gather(_Report(said, this_node(), digest, None if is_whole else own_boxes), group)
    if failure is not None:
        raise failure
    assert model is not None
    _check_reports(reports, model)
    rank = dist.get_rank(group)
    ranks = [other for other, report in enumerate(reports) if per == "world" or report.node == reports[rank].node]
    whole = [stored.whole for stored, _ in wanted.values()]
    plan = plan_parcels(
        [(name, stored.shape, stored.dtype.itemsize) for name, (stored, _) in wanted.items()],
        [reports[other].boxes or whole for other in ranks],
    )
    theirs = {name: [(reports[other].boxes or whole)[number] for other in ranks] for number, name in enumerate(wanted)}
    exchange = _Exchange(model, wanted, theirs, plan, ranks.index(rank), device, dtype)
    with subgroup(ranks, group) as members:
        exchange.run(members, progress)
    return exchange.tensors


class _Exchange:
    """The rounds of one rank. Collective calls are the same on all ranks of the group, whatever happens to one."""

    def __init__(
        self,
        model: Model,
        wanted: Wanted,
        theirs: dict[str, list[Box]],
        plan: Plan,
        rank: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._theirs = theirs
        self._plan = plan
        self._rank = rank
        self._device = device
        self._dtype = dtype
        self.tensors: dict[str, torch.Tensor] = {}

    def run(self, group: Any, progress: ProgressCallback | None) -> None:
        """Read and send everything."""
        rounds = rounds_of(self._plan, {name: stored for name, (stored, _) in self._wanted.items()})
        counter = ProgressCounter(
            progress, sum(math.prod(box.lengths) * stored.dtype.itemsize for stored, box in self._wanted.values())
        )
        failure = self._attempt(self._allocate)
        scope = Scope()
        engine = engine_for(self._model.transfer)
        jobs = [Job(partial(self._read, number, parcels, scope)) for number, parcels in enumerate(rounds)]
        with on_error(scope.cancel):
            for number, parcels in enumerate(rounds):
                held: dict[int, torch.Tensor] = {}
                if failure is None:
                    for job in jobs[number : number + 2]:
                        engine.submit(job.run)
                    try:
                        held = jobs[number].result()
                    except Exception as error:  # noqa: BLE001 - raised when the others know
                        failure = error
                        jobs[number].give_up()
                self._agree(failure, group)
                self._send_round(parcels, held, group, counter)

    def _send_round(
        self, parcels: Sequence[Parcel], held: dict[int, torch.Tensor], group: Any, counter: ProgressCounter
    ) -> None:
        """Send and receive what was read in one round; small tensors of one owner travel together."""
        packs: dict[int, list[torch.Tensor]] = {}
        for at, parcel in enumerate(parcels):
            stored, box = self._wanted[parcel.name]
            size = math.prod(parcel.box.lengths) * stored.dtype.itemsize
            part = held.pop(at, None)
            if not self._is_alike(parcel.name):
                self._scatter(parcel, part, group)
            elif size < PACKED:
                packs.setdefault(parcel.owner, []).append(select(self.tensors[parcel.name], inside(parcel.box, box)))
            else:
                self._broadcast([select(self.tensors[parcel.name], inside(parcel.box, box))], parcel.owner, group)
            counter.add(size)
        for owner, values in sorted(packs.items()):
            self._broadcast(values, owner, group)

    def _broadcast(self, values: list[torch.Tensor], owner: int, group: Any) -> None:
        is_owner = owner == self._rank
        broadcast(values, src=owner, is_source=is_owner, group=group, device=device_of(group))

    def _allocate(self) -> None:
        for name, (stored, box) in self._wanted.items():
            self.tensors[name] = stored.new(box, converted(stored.dtype, self._dtype), self._device)

    def _attempt(self, action: Callable[[], None]) -> Exception | None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - raised when the others know
            return error
        return None

    def _agree(self, failure: Exception | None, group: Any) -> None:
        """Raise if a rank has failed."""
        for rank, said in enumerate(_gather(None if failure is None else _said(failure), group)):
            if failure is None and said is not None:
                raise SafetensorsError(
                    f"{self._model.url}: rank {rank} of those that load together failed: {said}", url=self._model.url
                )
        if failure is not None:
            raise failure

    def _read(self, number: int, parcels: Sequence[Parcel], scope: Scope) -> dict[int, torch.Tensor]:
        """Read what this rank has to read in one round; what has to be cut for others stays in separate memory."""
        reads: list[Read] = []
        if number == 0:
            for name in self._plan.alone:
                stored, box = self._wanted[name]
                reads += reads_of(stored, box, self.tensors[name])
        held: dict[int, torch.Tensor] = {}
        for at, parcel in enumerate(parcels):
            if parcel.owner != self._rank:
                continue
            stored, box = self._wanted[parcel.name]
            if self._is_alike(parcel.name):
                held[at] = select(self.tensors[parcel.name], inside(parcel.box, box))
            else:
                held[at] = stored.new(parcel.box, None, torch.device("cpu"))
            reads += reads_of(stored, parcel.box, held[at])
        with scope.child() as inner:
            fetch(reads, self._model.transfer, scope=inner)
        return held

    def _is_alike(self, name: str) -> bool:
        boxes_of_ranks = self._theirs[name]
        return all(box == boxes_of_ranks[0] for box in boxes_of_ranks)

    def _scatter(self, parcel: Parcel, held: torch.Tensor | None, group: Any) -> None:
        """Send each rank what it wants of *parcel*, or receive what this rank wants."""
        stored, box = self._wanted[parcel.name]
        cuts = [intersection(parcel.box, other) for other in self._theirs[parcel.name]]
        empty = Box((0,) * len(box.lengths), (0,) * len(box.lengths))
        mine = cuts[self._rank]
        target = select(self.tensors[parcel.name], inside(mine, box) if mine is not None else empty)
        received = torch.empty(target.shape, dtype=stored.dtype, device=target.device)
        sent = None
        if held is not None:
            sent = [select(held, inside(cut, parcel.box) if cut is not None else empty) for cut in cuts]
        longest = max(math.prod(cut.lengths) for cut in cuts if cut is not None) * stored.dtype.itemsize
        scatter(sent, received, longest=longest, src=parcel.owner, group=group, device=device_of(group))
        with torch.no_grad():
            if target.dtype == received.dtype:
                target, received = bytes_alike(target), bytes_alike(received)
            target.copy_(received)


def rounds_of(plan: Plan, tensors: dict[str, Stored]) -> list[list[Parcel]]:
    """The parcels of *plan* in rounds, in each of which no rank reads much; there is one at least."""
    rounds: list[list[Parcel]] = [[]]
    held: dict[int, int] = {}
    for parcel in plan.parcels:
        size = math.prod(parcel.box.lengths) * tensors[parcel.name].dtype.itemsize
        if held.get(parcel.owner, 0) + size > _ROUND and held.get(parcel.owner, 0):
            rounds.append([])
            held = {}
        held[parcel.owner] = held.get(parcel.owner, 0) + size
        rounds[-1].append(parcel)
    return rounds


def _digest(model: Model, wanted: Wanted, dtype: torch.dtype | None) -> str:
    """The same on ranks that load the same tensors of the same versions, whatever part of each."""
    what = [(file.url, file.version.etag) for file in model.files], list(wanted), str(dtype)
    return hashlib.sha256(repr(what).encode("utf-8", "surrogatepass")).hexdigest()


def _check_reports(reports: Sequence[_Report], model: Model) -> None:
    for rank, report in enumerate(reports):
        if report.failure is not None:
            raise SafetensorsError(
                f"{model.url}: rank {rank} of those that load together failed: {report.failure}", url=model.url
            )
    for rank, report in enumerate(reports):
        if report.digest != reports[0].digest:
            raise SafetensorsError(
                f"{model.url}: ranks 0 and {rank} load together, but see different versions of the files, or load "
                "other tensors or another dtype. Nothing was loaded; if the model was replaced meanwhile, load again",
                url=model.url,
            )


def _gather(value: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.1000}"
