"""Decide when a request that is silent is sent once more. No I/O: observations go in, decisions come out.

Most requests to a storage service are answered within milliseconds, and a few stall for seconds or minutes without an
error. A second request for the same bytes, on another connection, is answered at once. Sending it is a *hedge*.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.metrics import THROTTLED
from azstoragetorch._engine.process import PerProcess

# When a hedge is sent, and why an outage is not doubled
# ------------------------------------------------------
# Three conditions must hold (`Hedging.allows`), in this order:
#
#     late      The request has been silent for longer than nearly all others of its kind: for `patience`, which follows
#               from the running quantiles of the time to first byte. The quantiles are those of requests that were
#               answered. A request whose hedge was answered first is not counted, so stalls do not raise the limit that
#               detects them.
#     alone     Most of the requests that were sent after it, and should have been answered by now, were answered, and
#               faster. If most of them wait as well, the whole service is slow, or this machine is, and another
#               request would only add to the load.
#               Requests that were sent before it prove nothing: at the beginning of an outage they were just answered.
#               Without any later request, this evidence is missing. Then the request must be silent for twice as long,
#               and for longer than the last two answers took, while hardly any others are silent: if every request
#               takes 3 s, two of them are hedged.
#     afforded  There is a token. Every 1/budget requests earn one; a hedge earns none and takes one. A few are there
#               from the beginning, and at most `_MOST_TOKENS` are saved. So there are never more hedges than
#               ``_FIRST_TOKENS + budget * requests``, whatever the service does and whatever the other two conditions
#               say. Taking a token is one step (`deque.pop`), so two threads never take the same one.
#
# When the service throttles (429, 503), no hedge is sent for `_THROTTLED_SECONDS`. `pacing` finds out whether it does.
#
# No step waits or takes a lock. Two threads that note an answer at the same time can lose one of them, or compute a
# quantile from older answers, which changes a limit by next to nothing. An interrupt can leave a request in `_waiting`
# that no longer exists: it counts as stuck for `_FORGOTTEN_SECONDS`, in which at most some hedges are not sent.

MOST_HEDGES = 2  # of one request; that three responses in a row stall is rare enough
_FLOOR = 0.05  # seconds; shorter silences are those of busy machines and networks
_LATE = 2.0  # a request is late after this multiple of the 95th percentile
_STEADY = 1.5  # and not before this multiple of the time that the requests took that it is compared with
_COLD = 1.0  # seconds; the patience before there are any answers
_FEW = 4  # answers, with fewer of which nothing is known
_UNSURE = 16  # answers, with which the patience is twice as long as with many
_REMEMBERED = 256  # answers from which the quantiles are computed
_REFRESH = 64  # answers between two computations
_EARLY = frozenset({*range(_FEW, 17), 24, 32, 48})  # further computations, while there are few
_PEERS = 128  # answers that are looked through for evidence
_GRACE = 0.01  # seconds for which a later request must have been answered: answers may arrive in bursts
_LONELY = 2.0  # without evidence a request must be silent for this multiple of the patience
_MOST_SILENT = 3  # without evidence no more requests than these may be silent, this one and its hedges included
_FIRST_TOKENS, _MOST_TOKENS = 4, 16
_THROTTLED_SECONDS = 5.0
_FORGOTTEN_SECONDS = 120.0
_DRIP_SECONDS = 1.0  # a body may be slow for this long
_DRIP_FACTOR = 8.0  # a body drips if it takes this multiple of the time that nearly all others take
_FEW_BODIES = 8
_LARGE = 1 * MiB  # bytes of a body from which on it has a rate worth comparing


class Waiting(Protocol):
    """A request that has no answer yet."""

    kind: str
    """Requests of one kind are expected to be answered in similar times."""
    since: float
    """When it was sent."""


class _Times:
    """The latest of some durations in seconds, with their 95th percentile."""

    __slots__ = ("_before", "_last", "_latest", "count", "high", "patience")

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_REMEMBERED)
        self.count = 0
        self._last = self._before = 0.0
        self.high = 0.0
        self.patience = _COLD

    def note(self, seconds: float) -> None:
        self._latest.append(seconds)
        self._before, self._last = self._last, seconds
        self.count += 1
        if self.count % _REFRESH == 0 or self.count in _EARLY:
            self._refresh()

    @property
    def recent(self) -> float:
        """Seconds that the last two took at least: one slow answer says nothing about the service."""
        return min(self._before, self._last)

    def _refresh(self) -> None:
        with suppress(RuntimeError):  # another thread notes something at this moment
            times = sorted(self._latest)
            self.high = times[(len(times) - 1) * 95 // 100]  # of up to 20, not the largest one
            if len(times) >= _FEW:
                self.patience = _rounded(max(_FLOOR, _LATE * self.high) * (1 + _UNSURE / self.count))


def _rounded(seconds: float) -> float:
    """*seconds* rounded up by at most 19 %: a timeout of a socket that rarely changes is rarely set."""
    return float(2.0 ** (math.ceil(math.log2(seconds) * 4) / 4))


class Hedging:
    """What one process has seen of one service, and which of its requests are sent once more.

    Args:
        after: Seconds of silence; None to derive them from the answers.
        budget: Hedges for each request, at most.
        clock: Returns the time in seconds.
    """

    def __init__(self, after: float | None, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._after = after
        self._every = math.ceil(1 / budget)
        self._clock = clock
        self._tokens: deque[None] = deque([None] * _FIRST_TOKENS, maxlen=_MOST_TOKENS)
        self._sent = itertools.count(1)
        self._waiting: dict[Waiting, None] = {}
        self._answers: deque[tuple[float, float]] = deque(maxlen=_PEERS)  # when it was sent, and answered
        self._kinds: dict[str, _Times] = {}
        self._rates = _Times()  # seconds for each MiB of large bodies
        self._closed_until = -math.inf

    def enter(self, waiting: Waiting, *, is_hedge: bool = False) -> None:
        """Note that *waiting* was sent."""
        self._waiting[waiting] = None
        if not is_hedge and not next(self._sent) % self._every:
            self._tokens.append(None)

    def answered(self, waiting: Waiting, status: int = 200) -> None:
        """Note that the response to *waiting* has begun."""
        self._waiting.pop(waiting, None)
        if status in THROTTLED:
            return  # a refusal comes sooner than an answer
        now, since = self._clock(), waiting.since
        self._answers.append((since, now))
        self._times(waiting.kind).note(now - since)

    def throttled(self) -> None:
        """Note that the service throttles."""
        self._closed_until = self._clock() + _THROTTLED_SECONDS

    def drop(self, waiting: Waiting) -> None:
        """Forget *waiting*, which failed or was given up."""
        self._waiting.pop(waiting, None)

    def received(self, size: int, seconds: float) -> None:
        """Note that a body of *size* bytes was received in *seconds* after its first byte."""
        if size >= _LARGE:
            self._rates.note(seconds * _LARGE / size)

    def patience(self, kind: str) -> float:
        """Seconds of silence after which `allows` should be asked about a request of *kind*."""
        return self._after if self._after is not None else self._times(kind).patience

    def allows(self, kind: str, since: float) -> bool:
        """Whether to send a request of *kind*, which has been silent since *since*, once more; takes a token if so."""
        now = self._clock()
        if now < self._closed_until or now - since < self._required(kind, since, now):
            return False
        return self._take()

    def keeps_pace(self, size: int, received: int, seconds: float) -> bool:
        """Whether *received* bytes in *seconds* is a usual rate for a body of *size* bytes."""
        return size >= _LARGE and seconds <= _DRIP_FACTOR * self._rates.high * received / _LARGE

    def allows_for_drip(self, kind: str, size: int, received: int, since: float) -> bool:
        """Whether to request the rest of a body once more that has brought *received* bytes since *since*.

        *size* is that of the whole body. Takes a token if so. A large body is compared with others by its rate. A small
        one should not take much longer than others take until their first byte.
        """
        usual = self._rates if size >= _LARGE else self._times(kind)
        limit = max(self.drip_seconds, _DRIP_FACTOR * usual.high * max(1.0, received / _LARGE))
        now = self._clock()
        if usual.count < _FEW_BODIES or now < self._closed_until or now - since < limit:
            return False
        return now - since >= self._required(kind, since, now) and self._take()

    @property
    def drip_seconds(self) -> float:
        """Seconds between two questions whether a body drips."""
        return _DRIP_SECONDS if self._after is None else min(_DRIP_SECONDS, 4 * self._after)

    def _take(self) -> bool:
        try:
            self._tokens.pop()
        except IndexError:
            return False
        return True

    def _required(self, kind: str, since: float, now: float) -> float:
        """Seconds of silence after which a request is hedged now."""
        patience, times = self.patience(kind), self._times(kind)
        due = now - min(patience, times.high if times.count >= _FEW else patience) - _GRACE
        silent = [each.since for each in list(self._waiting) if now - _FORGOTTEN_SECONDS < each.since <= due]
        stuck = sum(began > since for began in silent)
        answered = sorted(seen - sent for sent, seen in list(self._answers) if sent > since and seen <= now - _GRACE)
        if len(answered) > stuck:
            return max(patience, _STEADY * answered[len(answered) // 2])
        if stuck or answered or len(silent) > _MOST_SILENT:
            return math.inf
        slowest = max(patience, _STEADY * times.recent)
        return slowest if self._after is not None else _LONELY * slowest

    def _times(self, kind: str) -> _Times:
        return self._kinds.get(kind) or self._kinds.setdefault(kind, _Times())


_services: PerProcess[dict[tuple[str, str, float | None, float], Hedging]] = PerProcess(dict)


def hedging_for(scheme: str, host: str, config: TransferConfig) -> Hedging | None:
    """What this process knows about the service at *host*; None if *config* turns hedging off."""
    if config.hedge_after is None or not config.hedge_budget:
        return None
    after = None if isinstance(config.hedge_after, str) else float(config.hedge_after)
    services, key = _services.get(), (scheme, host, after, config.hedge_budget)
    return services.get(key) or services.setdefault(key, Hedging(after, config.hedge_budget))
