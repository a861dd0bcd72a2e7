"""The combinations of actors, and the table of results."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .actors import (
    ASYNC,
    CLEAN,
    CLEAN_ALL,
    CLEAN_BASE,
    DELETE,
    DELETE_BASE,
    DELTA,
    DELTA_OF,
    KEEP,
    KEEP_ONE,
    KINDS,
    LOAD,
    OWN,
    SAVE,
    SAVE_BASE,
    Kind,
    Programs,
    predictable,
    started,
)
from .checks import Rules
from .explorer import FAULTS, Fault, Tally, explore, replaced_transport, wander
from .memory import Memory

STARTS = ("nothing", "a checkpoint", "leftovers", "a checkpoint and leftovers", "two checkpoints")


@dataclass(frozen=True)
class Combination:
    """Concurrent actors and an initial state."""

    kinds: tuple[Kind, ...]
    beginning: str
    folder: str = "step-1"

    @property
    def start(self) -> Memory:
        return _started(self.beginning)

    @property
    def rules(self) -> Rules:
        return Rules(self.kinds, self.folder, "checkpoint" in self.beginning)

    def __str__(self) -> str:
        return f"{' + '.join(kind.name for kind in self.kinds)} | {self.beginning}"


@functools.cache
def _started(name: str) -> Memory:
    return started(name)


DELTAS = [
    *(
        Combination((DELTA, other), "a checkpoint with digests")
        for other in (DELTA, SAVE, LOAD, CLEAN, CLEAN_ALL, DELETE)
    ),
    *(Combination((DELTA_OF, other), "a base", "step-2") for other in (SAVE_BASE, DELETE_BASE, CLEAN_BASE, KEEP_ONE)),
]
"""Two actors, of which one saves with a base, which the other may replace, clean, or delete."""

_IN_ONE_FOLDER = (DELTA, SAVE, LOAD, CLEAN, CLEAN_ALL, DELETE)
_AROUND_THE_BASE = (DELTA_OF, SAVE_BASE, DELETE_BASE, CLEAN_BASE, KEEP_ONE)
STAGED = Combination((DELTA_OF, CLEAN_ALL, CLEAN_ALL), "a base and leftovers", "step-2")
"""A first save that stages blocks, as of all actors only those with a base do, in a folder that is swept twice."""
DELTA_THREES = [
    STAGED,
    *(
        Combination((DELTA, *others), "a checkpoint with digests")
        for others in itertools.combinations_with_replacement(_IN_ONE_FOLDER, 2)
    ),
    *(
        Combination((DELTA_OF, *others), "a base", "step-2")
        for others in itertools.combinations_with_replacement(_AROUND_THE_BASE, 2)
        if SAVE_BASE not in others or not {DELETE_BASE, CLEAN_BASE, KEEP_ONE} & set(others)
    ),
]
"""Three actors, of which one at least saves with a base. A save over the base may fail where that is swept."""


def combinations(count: int) -> list[Combination]:
    """All combinations of *count* actors that can affect each other, with each relevant initial state."""
    return [
        Combination(kinds, beginning)
        for kinds in itertools.combinations_with_replacement(KINDS, count)
        for beginning in STARTS
        if _makes_sense(kinds, beginning)
    ]


def _makes_sense(kinds: tuple[Kind, ...], beginning: str) -> bool:
    if ASYNC in kinds and kinds.count(ASYNC) != 2:
        return False
    if OWN in kinds and beginning != "nothing":
        return False  # it refuses at once
    if (KEEP in kinds) != (beginning == "two checkpoints"):
        return False
    return "leftovers" not in beginning or bool({CLEAN, CLEAN_ALL, DELETE} & set(kinds))


def explore_all(
    pair: Combination,
    *,
    faults: bool,
    fault: Fault | None = None,
    programs: Programs | None = None,
    first: Sequence[tuple[int, str]] = (),
) -> Tally:
    """Every order of *pair* that begins with *first*; with *faults* also with each fault at each later request."""
    rules = pair.rules
    found = (programs or Programs()).of(pair.kinds, pair.folder)
    kinds = FAULTS if faults else ()
    return explore(found, pair.start, rules.after_step, rules.at_end, faults=kinds, fault=fault, first=first)


THREES = combinations(3)


def wander_once(randomness: random.Random, programs: Programs, threes: Sequence[Combination] = THREES) -> Tally:
    """Run one random order of three random actors of *threes*, with a random fault half of the time."""
    three = randomness.choice(threes)
    rules = three.rules
    return wander(programs.of(three.kinds, three.folder), three.start, rules.after_step, rules.at_end, randomness)


def explore_pair(number: int) -> Tally:
    """Everything about the pair *number*."""
    with replaced_transport(), predictable():
        return explore_all([*combinations(2), *DELTAS][number], faults=True)


def wander_often(seed: int, count: int, *, deltas: bool = False) -> Tally:
    """*count* random orders of three, with *deltas* of those that save with a base."""
    total, programs = Tally(), Programs()
    randomness = random.Random(seed)
    with replaced_transport(), predictable():
        for _ in range(count):
            total.add(wander_once(randomness, programs, DELTA_THREES if deltas else THREES))
    return total


def rows(found: Mapping[Combination, Tally]) -> list[str]:
    """The rows of the table: all initial states of two actors together."""
    totals: dict[tuple[str, ...], Tally] = {}
    for pair, tally in found.items():
        totals.setdefault(tuple(kind.name for kind in pair.kinds), Tally()).add(tally)
    return [
        f"| {first} | {second} | {total.runs:,} | {total.states:,} | {total.steps:,} | {len(total.violations)} |"
        for (first, second), total in totals.items()
    ]
