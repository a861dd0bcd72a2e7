"""Runs cases for one library, in its virtual environment: a command on stdin, an answer on stdout, both lines of JSON.

It stays alive, so that libraries can take turns without each turn paying for imports.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import libraries

MiB = 1 << 20
SAMPLE = 110_000  # bytes of a photograph of ImageNet, on average
LATENCIES = 100
Timed = Callable[[], float]
"""Does it; returns the amount that was done."""


@lru_cache(maxsize=2)
def content(size: int) -> bytes:
    return (os.urandom(min(size, MiB)) * -(-size // MiB))[:size]


@lru_cache(maxsize=1)
def tensors(count: int, elements: int, small: int) -> dict[str, Any]:
    import torch

    state = {f"layer{number}.weight": torch.randn(elements) for number in range(count)}
    return state | {f"layer{number % count}.small{number}": torch.randn(512) for number in range(small)}


def state_of(kind: str, size: int) -> dict[str, Any]:
    """``few``: 16 tensors of *size* bytes in all; ``many``: as many tensors as a ResNet-50 has, most of them small."""
    return tensors(16, max(1, size // 64), 0) if kind == "few" else tensors(53, max(1, size // 212), 265)


def nbytes(state: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def make(library: Any, command: dict[str, Any]) -> tuple[Timed, str] | None:
    """What is to be timed and in which unit; None if the library has no such thing."""
    case, name, size = command["case"], command.get("name", ""), command.get("size", 0)
    needs = {
        "latency": "read",
        "concurrency": "read_with",
        "save": "save",
        "load": "load",
        "checkpoint-save": "checkpoint_save",
        "checkpoint-load": "checkpoint_load",
        "tensors-load": "tensors_into",
    }.get(case, case)
    if not hasattr(library, needs):
        return None

    def latency() -> float:
        return float(LATENCIES * bool([library.read(name) for _ in range(LATENCIES)]))

    def read() -> float:
        return expect(library.read(name), size) / MiB

    def stream() -> float:
        return expect(library.stream(name), size) / MiB

    def ranges() -> float:
        count = command["count"]
        expect(library.ranges(name, size, count), count * min(libraries.RANGE, size // count))
        return float(count)

    def concurrency() -> float:
        return expect(library.read_with(name, command["concurrency"]), size) / MiB

    def write() -> float:
        library.write(name, content(size))
        return size / MiB

    def save() -> float:
        library.save(name, state_of(command["state"], size))
        return nbytes(state_of(command["state"], size)) / MiB

    def load() -> float:
        return nbytes(library.load(name)) / MiB

    def samples() -> float:
        return expect(library.samples(name), command["count"] * SAMPLE) / SAMPLE

    def names() -> float:
        return float(expect(library.names(name), command["count"]))

    def checkpoint_save() -> float:
        library.checkpoint_save(name, dict(state_of(command["state"], size)))
        return nbytes(state_of(command["state"], size)) / MiB

    def checkpoint_load() -> float:
        import torch

        target = {key: torch.empty_like(tensor) for key, tensor in state_of(command["state"], size).items()}
        library.checkpoint_load(name, target)
        return nbytes(target) / MiB

    def tensors() -> float:
        return expect(nbytes(library.tensors(name)), nbytes(state_of(command["state"], size))) / MiB

    def tensors_load() -> float:
        import torch

        target = {key: torch.empty_like(tensor) for key, tensor in state_of(command["state"], size).items()}
        library.tensors_into(name, target)
        return nbytes(target) / MiB

    if case == "write":
        content(size)
    if case in ("save", "checkpoint-save", "checkpoint-load", "tensors", "tensors-load"):
        state_of(command["state"], size)
    if case == "checkpoint-load" and command.get("first"):
        library.checkpoint_save(name, dict(state_of(command["state"], size)))
    units = {"latency": "reads/s", "samples": "samples/s", "names": "names/s", "ranges": "ranges/s"}
    run = locals()[case.replace("-", "_")]
    return run, units.get(case, "MiB/s")


def expect(found: int, expected: int) -> int:
    if found != expected:
        raise AssertionError(f"{found} instead of {expected}")
    return found


def prepare(library: Any, command: dict[str, Any]) -> None:
    """Write what the cases read."""
    size = command["size"]
    match command["what"]:
        case "blob":
            library.write(command["name"], content(size))
        case "state":
            library.save(command["name"], state_of(command["state"], size))
        case "tensors":
            library.save_tensors(command["name"], state_of(command["state"], size))
        case "samples":
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(16) as pool:
                list(
                    pool.map(
                        lambda number: library.write(f"{command['name']}{number:06d}", content(SAMPLE)),
                        range(command["count"]),
                    )
                )


def memory(field: str) -> int:
    """A line of the kernel's statistics of this process, in bytes; 0 where the kernel has no such line."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(field)), 0)


def measure(run: Timed) -> dict[str, float]:
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, cpu, begin = memory("VmRSS"), sum(os.times()[:2]), time.perf_counter()
    amount = run()
    seconds = time.perf_counter() - begin
    used, peak = sum(os.times()[:2]) - cpu, memory("VmHWM")
    return {
        "rate": round(amount / seconds, 3),
        "amount": round(amount, 3),
        "seconds": round(seconds, 4),
        "cpu_seconds": round(used, 3),
        "peak_mib": round(max(0, peak - before) / MiB, 1),
    }


def answer(library: str, command: dict[str, Any]) -> dict[str, Any]:
    if command["case"] == "version":
        return {"version": libraries.version_of(library)}
    place = libraries.Place(command["account_url"], command["container"], os.environ.get("BENCHMARK_SAS"))
    opened = opened_at(library, place)
    if command["case"] == "prepare":
        prepare(opened, command)
        return {}
    made = make(opened, command)
    if made is None:
        return {"unsupported": True}
    run, unit = made
    return {"unit": unit, **measure(run)}


@lru_cache(maxsize=8)
def opened_at(library: str, place: libraries.Place) -> Any:
    return libraries.LIBRARIES[library](place)


def main() -> None:
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries apart from the answers
    for line in sys.stdin:
        try:
            found = answer(sys.argv[1], json.loads(line))
        except BaseException as error:  # noqa: BLE001 - the report shows it; torch raises one that is not an Exception
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
