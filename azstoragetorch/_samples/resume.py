"""The position in an epoch: small states of shards, which can be stored as JSON, and their merging. No I/O.

A state contains the order (seed, epoch, fingerprint of the listing), the number of shards, and the number of samples
that a shard has consumed. Samples in flight are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from azstoragetorch._samples.sharding import Order

_VERSION = 1
_MARKS = {"version", "fingerprint", "shards"}  # by these a state is known among what a loader wraps around it


@dataclass(frozen=True, slots=True)
class ResumeState:
    """What of one epoch was consumed, by the shards that are known.

    ``positions[s]`` is the number of samples that shard s of ``shards`` has consumed of its stripe, None if this
    state does not know. The stripes are of what ``consumed`` left, see `Order`.
    """

    fingerprint: str
    seed: int | None
    epoch: int
    shards: int
    positions: tuple[int | None, ...]
    consumed: tuple[tuple[int, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a fresh dict of plain values."""
        known = [shard for shard, position in enumerate(self.positions) if position is not None]
        if len(known) == 1:
            return self.of_shard(known[0], self.positions[known[0]])
        return {**self._common(), "positions": list(self.positions)}

    def of_shard(self, shard: int, position: int | None) -> dict[str, Any]:
        """As a new dict that describes one shard only."""
        return {**self._common(), "shard": shard, "position": position}

    def _common(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": [list(layer) for layer in self.consumed],
            "shards": self.shards,
        }

    @classmethod
    def from_dict(cls, state: Any) -> ResumeState:
        """The state in a dict that `to_dict` made.

        Raises:
            ValueError: *state* is not a state, or a newer version saved it.
        """
        if not isinstance(state, Mapping) or not state.keys() >= _MARKS:
            raise ValueError("state: not the state of a dataset; pass what state_dict() or merge_states() returned")
        if state["version"] != _VERSION:
            raise ValueError(f"state: version {state['version']!r} is not supported; this release reads {_VERSION}")
        try:
            shards, epoch, seed = int(state["shards"]), int(state["epoch"]), state["seed"]
            if "positions" in state:
                positions = tuple(None if p is None else int(p) for p in state["positions"])
            else:
                single, position = int(state["shard"]), int(state["position"])
                positions = tuple(position if shard == single else None for shard in range(shards))
            consumed = tuple(tuple(map(int, layer)) for layer in state["consumed"])
            fingerprint = str(state["fingerprint"])
            seed = None if seed is None else int(seed)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state: damaged ({type(error).__name__}: {error})") from error
        numbers = [p for p in positions if p is not None] + [p for layer in consumed for p in layer]
        if shards < 1 or not numbers or len(positions) != shards or any(p < 0 for p in numbers) or not all(consumed):
            raise ValueError("state: damaged (positions do not match the number of shards)")
        return cls(fingerprint, seed, epoch, shards, positions, consumed)

    def for_shard(self, shard: int, shards: int) -> tuple[tuple[tuple[int, ...], ...], int]:
        """Where *shard* of *shards* continues: what was consumed before striping (for `Order`), and its position.

        With the number of shards unchanged each continues exactly where it was; otherwise the rest is striped again.

        Raises:
            ValueError: this state does not know enough.
        """
        if shards == self.shards:
            position = self.positions[shard]
            if position is None:
                known = [s for s, p in enumerate(self.positions) if p is not None]
                raise ValueError(f"state: it is of shard {known} of {shards}, but this process reads shard {shard}")
            return self.consumed, position
        missing = [s for s, p in enumerate(self.positions) if p is None]
        if missing:
            raise ValueError(
                f"state: saved with {self.shards} shards (workers x ranks), resumed with {shards}, which needs the "
                f"positions of all; those of {missing} are missing: gather the states of all ranks and workers and "
                "load merge_states(states)"
            )
        return (*self.consumed, tuple(p for p in self.positions if p is not None)), 0

    def order(self, length: int) -> Order:
        """The sequence that the stripes are of, in a listing of *length*."""
        return Order(length, self.seed, self.epoch, self.consumed)


def merge(states: object) -> ResumeState:
    """One state of all the states in *states*: of datasets or of loaders, in any nesting of lists and dicts.

    Raises:
        ValueError: *states* is empty, they are not of the same epoch, order and striping, or two of them give
            different positions of one shard.
    """
    merged: ResumeState | None = None
    for found in _find(states):
        state = ResumeState.from_dict(found)
        if merged is None:
            merged = state
            continue
        for name in ("fingerprint", "seed", "epoch", "shards", "consumed"):
            ours, theirs = getattr(merged, name), getattr(state, name)
            if ours != theirs:
                hint = ": the ranks listed the container at different times" if name == "fingerprint" else ""
                raise ValueError(f"states: they differ in {name} ({ours!r} and {theirs!r}){hint}")
        for shard, (ours, theirs) in enumerate(zip(merged.positions, state.positions, strict=True)):
            if None not in (ours, theirs) and ours != theirs:
                raise ValueError(f"states: shard {shard} is there twice, at {ours} and at {theirs}")
        pairs = zip(merged.positions, state.positions, strict=True)
        merged = replace(merged, positions=tuple(theirs if ours is None else ours for ours, theirs in pairs))
    if merged is None:
        raise ValueError(
            "states: no state of a dataset was found in it; pass what state_dict of datasets or loaders returned"
        )
    return merged


def positions_after(
    batches: int, batch_size: int, lengths: Sequence[int], starts: Sequence[int], *, drop_last: bool = False
) -> list[int]:
    """Positions of the workers of one DataLoader after it has yielded *batches*.

    Worker w has a shard of ``lengths[w]`` and began at ``starts[w]``. A loader that keeps order takes a batch of each
    worker in turn and passes over those that have no more.

    Raises:
        ValueError: the workers do not make so many batches.
    """
    rest = [max(0, length - start) for length, start in zip(lengths, starts, strict=True)]
    full = [left // batch_size if drop_last else -(-left // batch_size) for left in rest]
    if batches > sum(full):
        raise ValueError(f"batches={batches}: the loader yields no more than {sum(full)}")
    taken = [0] * len(rest)
    rounds, left = 0, batches
    # Whole rounds at a time: as many as the next worker to run out can take.
    while left:
        active = [worker for worker, count in enumerate(full) if count > rounds]
        step = min(min(full[worker] for worker in active) - rounds, left // len(active))
        if not step:
            for worker in active[:left]:
                taken[worker] += 1
            break
        for worker in active:
            taken[worker] += step
        rounds += step
        left -= step * len(active)
    return [start + min(count * batch_size, rest_) for start, count, rest_ in zip(starts, taken, rest, strict=True)]


def _find(states: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(states, Mapping):
        if states.keys() >= _MARKS:
            yield states
            return
        if states.get("_steps_since_snapshot"):
            raise ValueError(
                "states: a loader's state that is some steps old cannot be merged: "
                "make the loader with snapshot_every_n_steps=1"
            )
        for value in states.values():
            yield from _find(value)
    elif isinstance(states, Sequence) and not isinstance(states, (str, bytes)):
        for value in states:
            yield from _find(value)
