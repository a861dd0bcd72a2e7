"""Explore everything, and write the table in ``docs/reliability.md``.

python -m tests.interleavings [NUMBER OF RANDOM ORDERS OF THREE]
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .explorer import Tally
from .table import DELTAS, Combination, combinations, explore_pair, rows, wander_often

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_CHUNK = 10_000
HEADING, NEXT = "## Several jobs at once\n", "## Soak\n"

_SECTION = """\
## Several jobs at once

Saves, loads, cleaning, and deleting run in one folder, with the package's code and an in-memory service where each
request is one step. Two actors run in every order, without a fault, and with each of these faults at each request of
each actor: the response is lost before or after the request is carried out, or the process is killed after it. Orders
that lead to the same state of the service and of all actors continue alike, so they are continued once. The table
counts the orders, the different states, and the requests that were carried out. After every request, each checkpoint
that was committed and not deleted on purpose must be complete. At the end, no reported success may be false. A first
save into a folder that is cleaned at the same time with a cutoff that includes the save is checked at the end only,
and not if a process was killed: `checkpoint/_commit.py` explains why.

```sh
make interleavings
```

| actor | actor | orders | states | requests | violations |
|---|---|--:|--:|--:|--:|
{rows}

Three actors of any of these kinds at once, in random orders, half of them with a random fault: {random:,} orders,
{random_steps:,} requests, 0 violations. Three actors of which at least one saves with a base, in the same way:
{deltas:,} orders, {delta_steps:,} requests, 0 violations.

"""


def main(count: int, seed: int) -> int:
    """Run everything, on all processors; return the number of violations."""
    began = time.monotonic()
    pairs = [*combinations(2), *DELTAS]
    chunks = [min(_CHUNK, count - at) for at in range(0, count, _CHUNK)]
    found: dict[Combination, Tally] = {}
    random_ones, random_deltas = Tally(), Tally()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, logging.disable, (logging.CRITICAL,)) as pool:
        exploring = [pool.submit(explore_pair, number) for number in range(len(pairs))]
        wandering = [pool.submit(wander_often, seed + number, size) for number, size in enumerate(chunks)]
        following = [pool.submit(wander_often, seed + at, size, deltas=True) for at, size in enumerate(chunks)]
        for pair, future in zip(pairs, exploring, strict=True):
            found[pair] = future.result()
            took, tally = time.monotonic() - began, found[pair]
            sys.stderr.write(f"{took:6.0f} s  {pair}: {tally.runs:,} orders, {tally.states:,} states\n")
        for future in wandering:
            random_ones.add(future.result())
            sys.stderr.write(f"{time.monotonic() - began:6.0f} s  {random_ones.runs:,} random orders of three\n")
        for future in following:
            random_deltas.add(future.result())
            sys.stderr.write(f"{time.monotonic() - began:6.0f} s  {random_deltas.runs:,} of them with a base\n")
    everything = (*found.values(), random_ones, random_deltas)
    violations = [violation for tally in everything for violation in tally.violations]
    for violation in violations[:20]:
        sys.stderr.write(violation + "\n")
    if not violations:
        write(rows(found), random_ones, random_deltas)
    return len(violations)


def write(lines: list[str], random_ones: Tally, random_deltas: Tally) -> None:
    """Replace the section in the page."""
    section = _SECTION.format(
        rows="\n".join(lines),
        random=random_ones.runs,
        random_steps=random_ones.steps,
        deltas=random_deltas.runs,
        delta_steps=random_deltas.steps,
    )
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(HEADING if HEADING in page else NEXT)
    after = rest.partition(NEXT)[2] if HEADING in page else rest
    PAGE.write_text(before + section + NEXT + after, encoding="utf-8")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(bool(main(*arguments, *(100_000, 1)[len(arguments) :])))
