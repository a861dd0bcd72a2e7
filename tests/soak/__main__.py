"""Soak: `python -m tests.soak [seconds]`. Prints the figures of every epoch, and writes them to build/soak.md.

Exits with 1 if a byte was wrong, or if the use of a resource still grew at the end.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from multiprocessing.util import get_temp_dir
from pathlib import Path
from tempfile import TemporaryDirectory

from azstoragetorch._engine.threads import engine_for

from .work import CACHE_BYTES, TRANSFER, Soak

_ROOT = Path(__file__).parent.parent.parent
_FIGURES = _ROOT / "build" / "soak.md"
_WARM_UP = 2  # epochs, in which pools are filled and libraries are loaded
_FEWEST = 6  # epochs that are compared
_NOISE = 16.0  # MiB of resident memory that the allocator can keep


@dataclass
class Figures:
    """Resources in use after an epoch. The counters of the run come first, then values that must not grow."""

    epoch: int
    seconds: int
    items: int
    requests: int
    faults: int
    memory: float  # MiB, resident
    threads: int
    processes: int
    sockets: int
    files: int
    temporary: int
    shared: int  # segments of memory in /dev/shm
    cached: float  # MiB on disk
    in_flight: int  # bytes of the budget


class Service:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.server"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def figures(self) -> dict[str, int | str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer: dict[str, int | str] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def descriptors() -> tuple[int, int]:
    """The numbers of open sockets and of other open descriptors."""
    kinds = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            kinds.append(str(link.readlink()).startswith("socket:"))
        except OSError:  # the descriptor of the listing itself
            continue
    return sum(kinds), len(kinds) - sum(kinds)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_flat(name: str, values: list[float]) -> bool:
    """Whether the last third of *values* is not higher than the first one."""
    third = max(2, len(values) // 3)
    first, last = values[:third], values[-third:]
    if name == "memory":
        return statistics.median(last) <= statistics.median(first) + _NOISE
    return min(last) <= max(first)


def in_flight() -> int:
    return engine_for(TRANSFER).budget.in_flight


def measured(epoch: int, seconds: float, items: int, service: Service, cache: Path) -> Figures:
    gc.collect()
    deadline = time.monotonic() + 60
    while in_flight() and time.monotonic() < deadline:
        time.sleep(0.01)
    told = service.figures()
    sockets, files = descriptors()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Figures(
        epoch=epoch,
        seconds=round(seconds),
        items=items,
        requests=int(told["requests"]),
        faults=int(told["faults"]),
        memory=round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        threads=threading.active_count(),
        processes=len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        sockets=sockets,
        files=files,
        temporary=len(list(Path(tempfile.gettempdir()).iterdir())),
        shared=len(list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))),
        cached=round(size_of(cache) / 2**20, 2),
        in_flight=in_flight(),
    )


def complaints(found: list[Figures]) -> Iterator[str]:
    for field in fields(Figures)[5:]:
        values = [getattr(each, field.name) for each in found[_WARM_UP:]]
        if not is_flat(field.name, values):
            yield f"{field.name} grew: {values}"
    if found[-1].in_flight:
        yield "memory in flight was not given back"
    if found[-1].cached > CACHE_BYTES / 2**20:
        yield "the cache is larger than it may be"


def row(values: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(seconds: float) -> int:
    with TemporaryDirectory(prefix="soak-") as name, Service() as service:
        folder = Path(name)
        temporary = folder / "tmp"
        temporary.mkdir()
        get_temp_dir()  # that of multiprocessing is removed at exit
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)  # of this process and its children only
        soak = Soak(str(service.figures()["url"]), folder / "cache")
        rows = [row(field.name.replace("_", " ") for field in fields(Figures)), "|--:" * len(fields(Figures)) + "|"]
        say("\n".join(rows))
        found: list[Figures] = []
        begin, items = time.monotonic(), 0
        while len(found) < _WARM_UP + _FEWEST or time.monotonic() - begin < seconds:
            items += soak.epoch(len(found))
            found.append(measured(len(found), time.monotonic() - begin, items, service, soak.cache))
            rows.append(row(astuple(found[-1])))
            say(rows[-1])
    told = list(complaints(found))
    say("\n".join(told) or "flat")
    if told:
        return 1
    _FIGURES.parent.mkdir(exist_ok=True)
    _FIGURES.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0))
