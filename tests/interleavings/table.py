"""Which actors are run together, how often, and the table of it."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .actors import ASYNC, CLEAN, CLEAN_ALL, DELETE, KEEP, KINDS, OWN, Kind, make, started
from .checks import Rules
from .explorer import Fault, Tally, explore, wander
from .memory import Memory

FAULTS = ("lost before", "lost after", "killed")
STARTS = ("nothing", "a checkpoint", "leftovers", "a checkpoint and leftovers", "two checkpoints")
MOST = 20_000  # runs of one combination with one fault; none needs as many


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
            found = explore(run, rules.after_step, rules.at_end, Fault(number, nth, kind), most)
            total.runs += found.runs
            total.steps += found.steps
            total.violations += found.violations
    return total


THREES = combinations(3)


def wander_once(randomness: random.Random) -> Tally:
    """One random order of three random actors, with a random fault half of the time."""
    three = randomness.choice(THREES)
    rules = three.rules
    return wander(make(three.kinds, three.folder, three.start), rules.after_step, rules.at_end, randomness, FAULTS)


def rows(pairs: Iterable[Combination], report: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """The table's rows for *pairs*, and the violations."""
    totals: dict[tuple[str, ...], Tally] = {}
    for pair in pairs:
        began = time.monotonic()
        found = explore_all(pair, faults=True)
        total = totals.setdefault(tuple(kind.name for kind in pair.kinds), Tally())
        total.runs += found.runs
        total.steps += found.steps
        total.violations += found.violations
        report(f"{pair}: {found.runs} orders, {len(found.violations)} violations, {time.monotonic() - began:.0f} s")
    lines = [
        f"| {first} | {second} | {total.runs:,} | {total.steps:,} | {len(total.violations)} |"
        for (first, second), total in totals.items()
    ]
    return lines, [violation for total in totals.values() for violation in total.violations]
