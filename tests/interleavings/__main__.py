"""Explore all of it, and write the table in ``docs/reliability.md``.

python -m tests.interleavings [NUMBER OF RANDOM ORDERS OF THREE]
"""

from __future__ import annotations

import logging
import random
import sys
import time
from pathlib import Path

from .actors import forgetting
from .explorer import replaced_transport
from .table import combinations, rows, wander_once

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEADING, NEXT = "## Several jobs at once\n", "## Soak\n"

_SECTION = """\
## Several jobs at once

Saves, loads, cleaning and deleting in one folder, by the package's own code over a service in memory where each request
is one step. Two actors run in every order that makes a difference: two orders that differ only in requests that do not
depend on each other have one effect, and one of them is run. Each is run without a fault, and again with each of these
at each request of each actor: the answer is lost before or after the request is carried out, or the process is killed
after it. After every request a checkpoint that was committed and not deleted on purpose has to be there, whole; at the
end no reported success may be false. A first save into a folder that is swept at the same time with a cutoff that
includes it is checked at the end only, and not if a process was killed: `checkpoint/_commit.py` says why.

```sh
python -m tests.interleavings 100000
```

| actor | actor | orders | requests | violations |
|---|---|---|---|---|
{rows}

Three actors at once, of all these kinds, in random orders, with a random fault half of the time: {random:,} orders,
{random_steps:,} requests, {random_violations} violations.

"""


def main(count: int, seed: int) -> int:
    """Run everything; the number of violations."""
    began = time.monotonic()
    logging.disable(logging.CRITICAL)

    def report(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.0f} s  {line}\n")

    with replaced_transport(), forgetting():
        lines, violations = rows(combinations(2), report)
        randomness = random.Random(seed)
        steps = 0
        for number in range(count):
            found = wander_once(randomness)
            steps += found.steps
            violations += found.violations
            if number % 1000 == 999:
                report(f"{number + 1} random orders of three, {len(violations)} violations in all")
    for violation in violations[:20]:
        sys.stderr.write(violation + "\n")
    if not violations:
        section = _SECTION.format(rows="\n".join(lines), random=count, random_steps=steps, random_violations=0)
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(HEADING if HEADING in page else NEXT)
        after = rest.partition(NEXT)[2] if HEADING in page else rest
        PAGE.write_text(before + section + NEXT + after, encoding="utf-8")
    return len(violations)


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(bool(main(*arguments, *(100_000, 1)[len(arguments) :])))
