"""Which actors are run together, how often, and the table of it."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass

from .actors import ASYNC, CLEAN, CLEAN_ALL, DELETE, KEEP, KINDS, OWN, Kind, forgetting, make, started
from .checks import Rules
from .explorer import Fault, Tally, explore, replaced_transport, wander
from .memory import Memory

FAULTS = ("lost before", "lost after", "killed")
STARTS = ("nothing", "a checkpoint", "leftovers", "a checkpoint and leftovers", "two checkpoints")
MOST = 3_000  # orders of one combination with one fault; those with a save or a load have fewer
FEWER = 150  # where all actors clean or delete, so that nothing loads but what they leave alone


@dataclass(frozen=True)
class Combination:
    """Actors that run at the same time, and what is there at the beginning."""

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


def combinations(count: int) -> list[Combination]:
    """All combinations of *count* actors that have to do with each other, with each beginning that matters to them."""
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


def explore_all(pair: Combination, *, faults: bool, most: int = MOST) -> Tally:
    """Every order of *pair*; with *faults* also with each fault at each request of each actor."""
    rules, run = pair.rules, make(pair.kinds, pair.folder, pair.start)
    total = explore(run, rules.after_step, rules.at_end, None, most)
    if not faults:
        return total
    for number in range(len(pair.kinds)):
        if pair.kinds[number] in pair.kinds[:number]:
            continue  # the same as for the first of them
        for nth, kind in itertools.product(range(total.longest.get(number, 0)), FAULTS):
            total.add(explore(run, rules.after_step, rules.at_end, Fault(number, nth, kind), most))
    return total


THREES = combinations(3)


def wander_once(randomness: random.Random) -> Tally:
    """One random order of three random actors, with a random fault half of the time."""
    three = randomness.choice(THREES)
    rules = three.rules
    return wander(make(three.kinds, three.folder, three.start), rules.after_step, rules.at_end, randomness, FAULTS)


def explore_pair(number: int) -> Tally:
    """Everything about the pair *number*."""
    pair = combinations(2)[number]
    with replaced_transport(), forgetting():
        has_user = any(kind.saves or kind.loads for kind in pair.kinds)
        return explore_all(pair, faults=True, most=MOST if has_user else FEWER)


def wander_often(seed: int, count: int) -> Tally:
    """*count* random orders of three."""
    total = Tally()
    randomness = random.Random(seed)
    with replaced_transport(), forgetting():
        for _ in range(count):
            total.add(wander_once(randomness))
    return total


def rows(found: Mapping[Combination, Tally]) -> list[str]:
    """The table's rows: all beginnings of two actors together."""
    totals: dict[tuple[str, ...], Tally] = {}
    for pair, tally in found.items():
        totals.setdefault(tuple(kind.name for kind in pair.kinds), Tally()).add(tally)
    return [
        f"| {first} | {second} | {total.runs:,} | {total.steps:,} | {len(total.violations)} |"
        for (first, second), total in totals.items()
    ]
