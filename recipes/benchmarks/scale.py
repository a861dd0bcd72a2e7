"""Simulate listing 1,000,000,000 names with 64 workers: ``python -m recipes.benchmarks.scale``.

The division of the listing is that of the package (`list_share`); the service and the clock are simulated. A request
takes the latency, and parsing takes what `make bench` measured on one core. The next page is fetched meanwhile.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import sys
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from azstoragetorch._blob.client import Page
from azstoragetorch._samples.splitting import LATER_PAGES, LATER_PARTS, list_share

PAGE = 5000  # names that one request brings
NAMES = 1_000_000_000
WORKERS = 64
LATENCIES = (0.02, 0.1)  # seconds until a page is here
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/performance/scale.json"


class Tree:
    """Folders with a number of blobs each, as if they were listed. Names are made when somebody looks at them."""

    def __init__(self, folders: Sequence[str], counts: Sequence[int]) -> None:
        pairs = sorted(zip(folders, counts, strict=True))
        self.folders = [folder for folder, _ in pairs]
        self.starts = [0, *itertools.accumulate(count for _, count in pairs)]
        self.total = self.starts[-1]

    def name(self, row: int) -> str:
        folder = bisect_right(self.starts, row) - 1
        return f"{self.folders[folder]}{row - self.starts[folder]:010d}"

    def find(self, prefix: str) -> tuple[int, int]:
        """The folders whose names begin with *prefix*."""
        return bisect_left(self.folders, prefix), bisect_left(self.folders, f"{prefix}\U0010ffff")

    def children(self, prefix: str) -> Iterator[str]:
        """The folders at the level of *prefix* that begin with it."""
        at, stop = self.find(prefix)
        while at < stop:
            name = self.folders[at]
            child = name[: name.find("/", len(prefix)) + 1]
            yield child
            at = self.find(child)[1]


@dataclass
class Rows(Sequence[str]):
    """Names from *start* to *stop*."""

    tree: Tree
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.tree.name(self.start + i) for i in range(*index.indices(len(self)))]
        return self.tree.name(self.start + range(len(self))[index])


class Lister:
    """The requests and the time of one worker."""

    def __init__(self, tree: Tree, latency: float, rate: float) -> None:
        self._tree = tree
        self._latency = latency
        self._rate = rate
        self.requests = 0
        self.busy = 0.0

    def pages(self, prefix: str, delimiter: str) -> Iterator[Page]:
        start, stop = self._tree.find(prefix)
        is_blobs = not delimiter or self._tree.folders[start : start + 1] == [prefix]
        entries: list[str] = [] if is_blobs else list(self._tree.children(prefix))
        low, high = (self._tree.starts[start], self._tree.starts[stop]) if is_blobs else (0, len(entries))
        for at in range(low, max(high, low + 1), PAGE):
            end = min(at + PAGE, high)
            parsing = (end - at) / self._rate
            self.requests += 1
            self.busy += max(parsing, self._latency) if at > low else parsing + self._latency
            marker = "more" if end < high else ""
            if is_blobs:
                nothing: Any = range(end - at)
                rows: Any = Rows(self._tree, at, end)
                yield Page(rows, nothing, nothing, [], marker)
            else:
                yield Page([], [], [], entries[at:end], marker)


def simulate(tree: Tree, latency: float, rate: float) -> dict[str, float]:
    """List *tree* with all workers."""
    workers = [Lister(tree, latency, rate) for _ in range(WORKERS)]
    working: list[Iterator[Page | str] | None] = [None] * WORKERS
    shares = deque([""])
    events = [(0.0, number) for number in range(WORKERS)]
    idle: list[int] = []
    listed = taken = 0
    now = 0.0
    while events:
        now, number = heapq.heappop(events)
        if working[number] is None:
            if not shares:
                idle.append(number)
                continue
            pages, into = (LATER_PAGES, LATER_PARTS) if taken else (2, 4 * WORKERS)
            working[number] = list_share(workers[number].pages, shares.popleft(), at_most=pages, into=into)
            taken += 1
        before = workers[number].busy
        iteration = working[number]
        assert iteration is not None
        item = next(iteration, None)
        if item is None:
            working[number] = None
        elif isinstance(item, str):
            shares.append(item)
            if idle:
                heapq.heappush(events, (now, idle.pop()))
        else:
            listed += len(item.names)
        heapq.heappush(events, (now + workers[number].busy - before, number))
    if listed != tree.total:
        raise AssertionError(f"listed {listed} of {tree.total} names")
    busy = sum(worker.busy for worker in workers)
    return {
        "seconds": now,
        "imbalance": now * WORKERS / busy,
        "requests": sum(worker.requests for worker in workers) / -(-tree.total // PAGE),
        "shares": taken,
    }


def even(*levels: int, count: int) -> Tree:
    """Folders in folders, with *count* blobs in each of the innermost ones."""
    names = [""]
    for level in levels:
        names = [f"{name}{number:06d}/" for name in names for number in range(level)]
    return Tree(names, [count] * len(names))


def skewed(folders: int, inner: int) -> Tree:
    """Folders whose sizes are as 1, 1/2, 1/3, ..., with subfolders of *inner* blobs."""
    scale = NAMES / sum(1 / (rank + 1) for rank in range(folders))
    names, counts = [], []
    for rank in range(folders):
        left, number = round(scale / (rank + 1)), 0
        while left > 0:
            names.append(f"{rank * 7919 % folders:06d}/{number:06d}/")
            counts.append(min(inner, left))
            left -= inner
            number += 1
    return Tree(names, counts)


SHAPES: dict[str, Callable[[], Tree]] = {
    "1,000 folders of 1,000,000": lambda: even(1000, count=1_000_000),
    "1,000 folders of 1,000 folders of 1,000": lambda: even(1000, 1000, count=1000),
    "100,000 folders of 10,000": lambda: even(100_000, count=10_000),
    "100 folders, the first 20% of all, of folders of 10,000": lambda: skewed(100, 10_000),
    "8 folders of 125,000,000": lambda: even(8, count=125_000_000),
}


def measured_rate() -> float:
    """Names that one core parses in a second, from the results of `make bench`."""
    lines = (ROOT / "docs/performance/results.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    rates = [
        run["rate"] for run in runs if run.get("case") == "names" and run.get("library") == "ours" and "rate" in run
    ]
    return float(max(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rate = measured_rate()
    rows: list[dict[str, Any]] = []
    setup = {"names": NAMES, "workers": WORKERS, "rate": rate, "latencies": LATENCIES}
    for shape, make in SHAPES.items():
        tree = make()
        rows.append({"shape": shape, "runs": {str(latency): simulate(tree, latency, rate) for latency in LATENCIES}})
        print(shape, rows[-1]["runs"], file=sys.stderr)
        options.results.write_text(json.dumps({**setup, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
