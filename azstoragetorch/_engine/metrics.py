"""Counts the transfers of this process.

A forked child starts at zero, and so does every DataLoader worker: call `metrics` there.

Counting must not wait, because signal handlers transfer as well. So each count is appended to a queue in one step, and
the queue is summed when the sums are requested or when it gets long. Sums are never modified: a thread creates new ones
and links them to the previous ones. The first link wins, and any other thread starts again from there.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace

from azstoragetorch._engine.growth import Progress
from azstoragetorch._engine.process import PerProcess

_SHORTEST = 50e-6  # seconds; the upper end of the first bucket
_STEPS = 8  # buckets for each doubling: a percentile is right to 9 %
_BUCKETS = 22 * _STEPS  # up to 200 s
THROTTLED = frozenset({429, 503})


@dataclass(frozen=True)
class Metrics:
    """Transfers of this process since it began, or between two snapshots: ``after - before``.

    Attributes:
        requests: Requests that were answered, with any status.
        refusals: Responses with a status of 400 or more.
        throttles: Of these, responses that ask to slow down (429, 503).
        retries: Attempts after the first one.
        hedged: Requests that were sent once more because they were silent; see ``TransferConfig.hedge_after``.
        hedges_won: Of these, requests whose second response was used.
        hedges_canceled: Of these, requests whose first response was used, or whose second one was refused or failed.
        connections: Connections opened.
        bytes_received: Bytes of response bodies.
        bytes_sent: Bytes of request bodies.
        bytes_copied: Bytes that the service copied from one blob to another, without a transfer.
        blocked_seconds: Time in which callers waited for the network, summed over threads.
        transform_seconds: Time in ``transform`` of datasets, including the time that it waited for the network.
        throttled_seconds: Time in which requests were not sent because the service throttles, summed over threads.
        tls_seconds: Time for receiving and decrypting large bodies after they had arrived over TLS, summed over
            threads. It includes the time that these threads waited for a core or the interpreter lock.
        pace: Requests that may be sent to the service in a second at the moment; of several services that throttle, to
            the slowest. Infinite if none throttles. In a difference, the value of the later snapshot.
        latencies: Responses by the time until their first byte, in buckets; see `latency`.
    """

    requests: int = 0
    refusals: int = 0
    throttles: int = 0
    retries: int = 0
    hedged: int = 0
    hedges_won: int = 0
    hedges_canceled: int = 0
    connections: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    bytes_copied: int = 0
    blocked_seconds: float = 0.0
    transform_seconds: float = 0.0
    throttled_seconds: float = 0.0
    tls_seconds: float = 0.0
    pace: float = math.inf
    latencies: tuple[int, ...] = field(default=(0,) * _BUCKETS, repr=False)

    def latency(self, share: float) -> float:
        """Seconds within which *share* (0 to 1) of the responses began, accurate to about 9%; NaN without responses.

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
            if item.name in _SUMS
        }
        buckets = tuple(now - then for now, then in zip(self.latencies, earlier.latencies, strict=True))
        return Metrics(**differences, pace=self.pace, latencies=buckets)


_SUMS = tuple(item.name for item in fields(Metrics) if item.name not in ("latencies", "pace"))
_LONG = 512  # entries of the queue: a few dozen KiB
_Entry = tuple[str, float] | tuple[None, tuple[float, int, int]]


class _Sums:
    """What was counted up to some moment, and a link to the sums that came after, if there are any."""

    __slots__ = ("next", "values")

    def __init__(self, values: Metrics) -> None:
        self.values = values
        self.next: dict[None, _Sums] = {}


class _Counters:
    """What one process has counted: the latest sums, or older ones that lead to them, and what came since."""

    def __init__(self) -> None:
        self._queue: deque[_Entry] = deque()
        self._sums = _Sums(Metrics())
        self.paces: dict[str, float] = {}  # of services that throttle, by host

    def add(self, entry: _Entry) -> None:
        self._queue.append(entry)
        if len(self._queue) > _LONG:
            self.total()

    def total(self) -> Metrics:
        """The sums of everything that was counted before the call."""
        entries: list[_Entry] = []
        with suppress(IndexError):  # another thread takes from the queue, too
            while self._queue:
                entries.append(self._queue.popleft())
        sums = self._sums
        while True:
            while sums.next:
                sums = sums.next[None]
            if not entries:
                break
            added = _Sums(_added(sums.values, entries))
            if sums.next.setdefault(None, added) is added:
                sums = added
                break
        self._sums = sums
        return sums.values


def _added(before: Metrics, entries: list[_Entry]) -> Metrics:
    sums: dict[str, float] = {name: getattr(before, name) for name in _SUMS}
    latencies = list(before.latencies)
    for name, value in entries:
        if name is not None:
            sums[name] += value  # type: ignore[operator]
            continue
        seconds, status, sent = value  # type: ignore[misc]
        sums["requests"] += 1
        sums["bytes_sent"] += sent
        if status >= 400:
            sums["refusals"] += 1
            sums["throttles"] += status in THROTTLED
        short = seconds <= _SHORTEST
        latencies[0 if short else min(math.ceil(math.log2(seconds / _SHORTEST) * _STEPS), _BUCKETS - 1)] += 1
    return Metrics(**sums, latencies=tuple(latencies))  # type: ignore[arg-type]


_counters: PerProcess[_Counters] = PerProcess(_Counters)


def metrics() -> Metrics:
    """A snapshot of what this process has transferred so far."""
    counters = _counters.get()
    return replace(counters.total(), pace=min(list(counters.paces.values()), default=math.inf))


def progress() -> Progress:
    """What this process has transferred so far, for `Growth`."""
    found = _counters.get().total()
    return Progress(found.bytes_received + found.bytes_sent, found.tls_seconds)


def count(name: str, amount: float = 1) -> None:
    """Add *amount* to the field *name*."""
    _counters.get().add((name, amount))


def count_answer(seconds: float, status: int, sent: int) -> None:
    """Count an answer that began after *seconds* to a request with *sent* bytes."""
    _counters.get().add((None, (seconds, status, sent)))


def set_pace(host: str, pace: float) -> None:
    """Report that *pace* requests a second may be sent to *host*; infinity if it does not throttle."""
    paces = _counters.get().paces
    if pace < math.inf:
        paces[host] = pace
    else:
        paces.pop(host, None)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time inside to the field *name*."""
    started = time.perf_counter()
    try:
        yield
    finally:
        count(name, time.perf_counter() - started)
