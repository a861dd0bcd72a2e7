"""Write `docs/reliability.md` from a run of the fault matrix, and from the same faults against the published connector.

    python -m tests.faults.reliability build/matrix.xml build/soak.md build/peer/bin/python

The arguments are pytest's ``--junitxml`` of `test_matrix`, the figures of a soak, and an interpreter with the published
connector.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import ssl
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import trustme

from .matrix import RIGHT, ROWS, TARGETS, Cell, cells, is_save, right_results, serving, stored
from .operations import CONTAINER

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "reliability.md"
PEER_OPERATIONS = ("read all", "small reads", "torch.load", "torch.save", "epoch", "epoch, 2 workers")
PATIENCE = 240.0  # seconds for one cell; the published connector retries for more than a minute
AT_ONCE = 24  # most of a cell is waiting

Outcome = tuple[str, float]  # the outcome and the seconds that it took
_MARKS = {RIGHT: "\N{CHECK MARK}"}
_ERROR, _WRONG = "E", "\N{BALLOT X}"  # short, so that a phone shows thirteen columns
Found = dict[tuple[str, str, bool], list[Outcome]]  # by row, operation, and whether the fault is permanent


class Peer:
    """Another interpreter with another implementation, which serves one operation at a time."""

    def __init__(self, python: str, ca_path: Path) -> None:
        self._command = [python, "-P", str(Path(__file__).with_name("operations.py"))]
        self._environment = {**os.environ, "REQUESTS_CA_BUNDLE": str(ca_path)}
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The response; None if it does not come in time, and then the interpreter is ended."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self._environment,
            )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(request), file=process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(PATIENCE) else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        return None

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


@contextmanager
def peers(python: str) -> Iterator[tuple[SimpleQueue[Peer], ssl.SSLContext]]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    with TemporaryDirectory() as folder:
        ca_path = Path(folder) / "ca.pem"
        authority.cert_pem.write_to_path(str(ca_path))
        pool: SimpleQueue[Peer] = SimpleQueue()
        for _ in range(AT_ONCE):
            pool.put(Peer(python, ca_path))
        try:
            yield pool, context
        finally:
            for _ in range(AT_ONCE):
                pool.get().close()


def measure(cell: Cell, pool: SimpleQueue[Peer], context: ssl.SSLContext) -> Outcome:
    """The outcome of *cell* with the published connector."""
    peer = pool.get()
    begin = time.monotonic()
    try:
        with serving(cell, lambda: context) as (service, rule):
            tokens = ["good", "fresh"] if cell.row.needs_token else []
            request = {"operation": cell.operation, "url": service.container_url(CONTAINER), "tokens": tokens}
            answer = peer.ask(request)
            seconds = time.monotonic() - begin if answer is None else answer["seconds"]
            service.clear_script()
            if answer is None:
                outcome = "no end"
            elif "error" in answer:
                outcome = answer["error"][0]
                if outcome == "AssertionError":
                    outcome = "SAMPLES TWICE"
            else:
                digests = [hashlib.sha256(data).hexdigest() for data in right_results(cell.operation)]
                outcome = RIGHT if answer["digest"] in digests else "WRONG BYTES"
            if is_save(cell.operation):
                found = stored(service, cell.operation)
                if outcome == RIGHT and found != "new":
                    outcome = f"LOST ({found})"
                elif outcome != RIGHT and found not in ("old", "new"):
                    outcome += " (DAMAGED BLOB)"
                elif outcome != RIGHT and found == "new":
                    outcome += " (but written)"
            return (outcome if rule.fired else "-"), seconds
    finally:
        pool.put(peer)


def measure_all(python: str) -> Found:
    """The outcomes of all cells with the published connector, for operations that it has."""
    todo = [
        cell for row in ROWS if not row.is_ours_alone for operation in PEER_OPERATIONS for cell in cells(row, operation)
    ]
    found: Found = defaultdict(list)
    with peers(python) as (pool, context), ThreadPoolExecutor(AT_ONCE) as executor:
        for cell, outcome in zip(todo, executor.map(lambda cell: measure(cell, pool, context), todo), strict=True):
            found[cell.row.name, cell.operation, cell.is_always].append(outcome)
            line = f"{cell.name:50} {cell.operation:14} {outcome[0]} {outcome[1]:.1f} s\n"
            sys.stderr.write(line)
    return found


def read_report(path: Path) -> Found:
    """The outcomes in the report of pytest; raises if a cell failed."""
    found: Found = defaultdict(list)
    known = {f"test_cell[{row.name}-{operation}]": (row, operation) for row in ROWS for operation in TARGETS}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            raise SystemExit(f"{case.get('name')} failed: there is nothing to publish")
        row, operation = known[str(case.get("name"))]
        for entry in case.iter("property"):
            is_always = str(entry.get("name")).startswith("always")
            outcome, _, seconds = str(entry.get("value")).partition(" in ")
            found[row.name, operation, is_always].append((outcome, float(seconds.removesuffix(" s"))))
    return found


def summary(outcomes: list[Outcome]) -> str:
    """The distinct outcomes, with the longest time if it is notable."""
    distinct = dict.fromkeys(outcome for outcome, _ in outcomes if outcome != "-")
    names = [_MARKS.get(outcome, outcome) for outcome in sorted(distinct, key=_is_bad, reverse=True)]
    longest = max((seconds for _, seconds in outcomes), default=0.0)
    return ", ".join(names) + (f" {longest:.0f}\N{NO-BREAK SPACE}s" if longest >= 5 else "") if names else "-"


def _is_bad(outcome: str) -> bool:
    return outcome in ("no end", _WRONG) or any(word.isupper() for word in outcome.split())


def table(found: Found, operations: list[str], is_always: bool) -> Iterator[str]:
    """The outcome of each fault in each operation; the last column names the errors."""
    yield "| fault | " + " | ".join(operations) + " | error |"
    yield "|---" * (len(operations) + 2) + "|"
    for row in ROWS:
        cells = [found.get((row.name, operation, is_always), []) for operation in operations]
        texts = [summary([(_shortened(name), seconds) for name, seconds in cell]) if cell else "" for cell in cells]
        errors = dict.fromkeys(name.partition(" (")[0] for cell in cells for name, _ in cell if _is_error(name))
        if any(texts):
            yield f"| {row.name} | " + " | ".join([*texts, ", ".join(errors)]) + " |"


def _is_error(outcome: str) -> bool:
    return outcome not in (RIGHT, "-") and not _is_bad(outcome)


def _shortened(outcome: str) -> str:
    if outcome.isupper():
        return _WRONG
    return outcome.replace(outcome.partition(" (")[0], _ERROR) if _is_error(outcome) else outcome


def side_by_side(ours: Found, theirs: Found) -> Iterator[str]:
    """All outcomes of a fault in the operations that both implementations have."""
    yield "| fault | now and then | published | always | published |"
    yield "|---|---|---|---|---|"
    for row in ROWS:
        cells = [
            summary([each for operation in PEER_OPERATIONS for each in found.get((row.name, operation, is_always), ())])
            for is_always in (False, True)
            for found in (ours, theirs)
        ]
        if not row.is_ours_alone and set(cells) != {"-"}:
            yield f"| {row.name} | " + " | ".join(cells) + " |"


def count(found: Found, operations: list[str]) -> dict[str, int]:
    """The number of outcomes of the shared operations, by kind."""
    sorts: dict[str, int] = defaultdict(int)
    for (row, operation, is_always), outcomes in found.items():
        if operation not in operations or any(r.is_ours_alone for r in ROWS if r.name == row):
            continue
        for outcome, seconds in outcomes:
            if outcome == "-":
                continue
            sort = "wrong" if _is_bad(outcome) else "right" if outcome == RIGHT else "error"
            sorts[f"{sort}, {'always' if is_always else 'now and then'}"] += 1
            sorts["longer than 5 s"] += seconds > 5
    return sorts


_INTRODUCTION = """\
# Reliability

This page shows how reads and saves behave when the service or the network fails. It is generated from a test run:

```sh
make reliability
```

A blob service on loopback injects faults, and every operation is run with every fault. Each cell of the tables is
verified: the data is exact or the named error is raised; the operation ends within the time that its retries allow;
the container holds the old content or the new content, complete, as torch reads it; and all connections and memory
are released. {runs} runs, all with the expected result, with torch {torch} and azure-storage-blob {sdk}.

- *Now and then*: the fault hits a few requests, about every other one.
- *Always*: the fault hits every request of one kind.
- ✓: the operation succeeds, and the data is exact. E: the operation raises the error in the last column. A cell with
  both covers several kinds of requests, such as listing and reading. An empty cell: the operation makes no such
  request.
- For `torch.save`, the error is the cause of a `FatalBlobIOWriteError`. For `torch.distributed.checkpoint`, it is
  part of the `CheckpointException` that torch raises.

## Now and then

{ours_sometimes}

## Always

{ours_always}

## The published connector with the same faults

azstoragetorch 0.2.0 with the same server, in the operations that it has. Its retries cannot be configured, and it
waits 15 s before the first, so it takes longer by design. A time at the end of a cell is the longest, if that is 5 s
or more. `WRONG BYTES` means that it returned data that the blob never held, or only part of the data, without an
error, and `SAMPLES TWICE` that it returned samples again; ✗ stands for both. `no end` means that it was stopped after
{patience:.0f} s. `but written` means that the blob has the new content although the save raised an error. Where the
published connector succeeds (✓) and this package raises an error, the published connector does not check what is
wrong (Content-Range, ETag), or waits longer (a stall).

{counts}

{side_by_side}

### Now and then, published

{theirs_sometimes}

### Always, published

{theirs_always}

{several_jobs}## Soak

`make soak` uses everything at once, epoch after epoch, with a service that keeps failing: 10,000 blobs through one
dataset, workers, pipes, nodes, tars, a disk cache that is too small, files written and read, checkpoints saved,
loaded, and cleaned, and two ranks. Every byte is verified. Resources in use after an epoch must not grow: resident
memory and cache (MiB), threads, processes, sockets, open files, temporary files, shared memory segments, and bytes in
flight.

{soak}
"""


def several_jobs() -> str:
    """The unchanged section that `tests.interleavings` has written into the page."""
    _, heading, rest = PAGE.read_text(encoding="utf-8").partition("## Several jobs at once\n")
    return heading + rest.partition("## Soak\n")[0]


def page(ours: Found, soak: str, theirs: Found) -> str:
    shared = list(PEER_OPERATIONS)
    ours_count, theirs_count = count(ours, shared), count(theirs, shared)
    counts = ["| outcomes in the operations that both have | this package | published |", "|---|--:|--:|"]
    counts += [
        f"| {sort} | {ours_count[sort]} | {theirs_count[sort]} |" for sort in sorted({*ours_count, *theirs_count})
    ]
    return _INTRODUCTION.format(
        runs=sum(map(len, ours.values())),
        torch=version("torch"),
        sdk=version("azure-storage-blob"),
        patience=PATIENCE,
        ours_sometimes="\n".join(table(ours, list(TARGETS), False)),
        ours_always="\n".join(table(ours, list(TARGETS), True)),
        counts="\n".join(counts),
        side_by_side="\n".join(side_by_side(ours, theirs)),
        soak=soak.strip(),
        theirs_sometimes="\n".join(table(theirs, shared, False)),
        theirs_always="\n".join(table(theirs, shared, True)),
        several_jobs=several_jobs(),
    )


if __name__ == "__main__":
    matrix, figures, published = sys.argv[1:]
    PAGE.write_text(
        page(read_report(Path(matrix)), Path(figures).read_text(encoding="utf-8"), measure_all(published)),
        encoding="utf-8",
    )
