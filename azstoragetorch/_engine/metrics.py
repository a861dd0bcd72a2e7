"""What this process has transferred so far, counted where it happens.

Counting costs one lock per request. A forked child starts at zero, and so does every DataLoader worker: ask there.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

_SHORTEST = 50e-6  # seconds; the upper end of the first bucket
_STEPS = 8  # buckets for each doubling: a percentile is right to 9 %
_BUCKETS = 22 * _STEPS  # up to 200 s
THROTTLED = frozenset({429, 503})


@dataclass(frozen=True)
class Metrics:
    """Transfers of this process since it began, or between two snapshots: ``after - before``.

    Attributes:
        requests: Requests that were answered, whatever the answer.
        refusals: Answers with a status of 400 or more.
        throttles: Of these, answers that ask to slow down (429, 503).
        retries: Tries after the first one.
        connections: Connections opened.
        bytes_received: Bytes of answers' bodies.
        bytes_sent: Bytes of requests' bodies.
        blocked_seconds: Time in which callers waited for the network, summed over threads.
        transform_seconds: Time in ``transform`` of datasets, with what it waited for itself.
        latencies: Answers by the time until their first byte, in buckets; see `latency`.
    """

    requests: int = 0
    refusals: int = 0
    throttles: int = 0
    retries: int = 0
    connections: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    blocked_seconds: float = 0.0
    transform_seconds: float = 0.0
    latencies: tuple[int, ...] = field(default=(0,) * _BUCKETS, repr=False)

    def latency(self, share: float) -> float:
        """Seconds within which *share* (0 to 1) of the answers began, right to about 9 %; NaN without answers.

        Raises:
            ValueError: *share* is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be between 0 and 1, not {share!r}")
        wanted, seen = share * sum(self.latencies), 0
        for bucket, count in enumerate(self.latencies):
            seen += count
            if count and seen >= wanted:
                return float(_SHORTEST * 2 ** (bucket / _STEPS))
        return math.nan

    def __sub__(self, earlier: Metrics) -> Metrics:
        differences = {
            item.name: getattr(self, item.name) - getattr(earlier, item.name)
            for item in fields(self)
            if item.name != "latencies"
        }
        buckets = tuple(now - then for now, then in zip(self.latencies, earlier.latencies, strict=True))
        return Metrics(**differences, latencies=buckets)


class _Counters:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, float] = {item.name: 0 for item in fields(Metrics) if item.name != "latencies"}
        self.values |= {"blocked_seconds": 0.0, "transform_seconds": 0.0}
        self.latencies = [0] * _BUCKETS


_counters = _Counters()


def metrics() -> Metrics:
    """A snapshot of what this process has transferred so far."""
    with _counters.lock:
        return Metrics(**_counters.values, latencies=tuple(_counters.latencies))  # type: ignore[arg-type]


def count(name: str, amount: float = 1) -> None:
    """Add *amount* to the field *name*."""
    with _counters.lock:
        _counters.values[name] += amount


def count_answer(seconds: float, status: int, sent: int) -> None:
    """Count an answer that began after *seconds* to a request with *sent* bytes."""
    bucket = 0 if seconds <= _SHORTEST else min(math.ceil(math.log2(seconds / _SHORTEST) * _STEPS), _BUCKETS - 1)
    with _counters.lock:
        values = _counters.values
        values["requests"] += 1
        values["bytes_sent"] += sent
        if status >= 400:
            values["refusals"] += 1
            values["throttles"] += status in THROTTLED
        _counters.latencies[bucket] += 1


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time inside to the field *name*."""
    started = time.perf_counter()
    try:
        yield
    finally:
        count(name, time.perf_counter() - started)


def _start_anew() -> None:
    global _counters
    _counters = _Counters()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
