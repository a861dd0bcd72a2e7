"""How many requests of one transfer run at once where that is found automatically, as pure decisions.

One connection to a storage service is slower than the network: about 60 MB/s. `FIRST` connections fill the network of
most machines, but not that of a large one. Only an experiment can tell: more requests at once, for a while. If
bandwidth rises by a good part of what the added connections could carry, the new number stays, and a larger one is
tried. Otherwise the former number is restored, and the next experiment comes much later. An experiment is not even made
while single connections are fast, since then something else is the limit: this machine, or all of the network.

Bandwidth is that of the whole process, in calls of one transfer: those after the first round, when the requests of the
former number have ended. Calls begin together at first, and so they end together: only whole rounds are measured. Only
a transfer that always has something to request is measured, and one at a time. All transfers of an engine use what was
found. Attributes are changed by the transfer that is measured, one call at a time. An interrupt, or a second transfer
that begins at the same moment, spoils one measurement: a number of requests that is between `FIRST` and the number of
connections in any case.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

FIRST = 16
_STEP = 1.5  # an experiment has this multiple of the requests
_WORTH = 0.5  # of the bandwidth that the added connections could carry; less is noise, or a network that is full
_FAST = 80e6  # bytes/s of one connection, from which on more of them are not tried
_ROUNDS = 2  # calls of each connection that are measured
_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0  # seconds after an experiment that failed


class Growth:
    """The number of requests at once of each transfer of an engine that makes at most *most*.

    *clock* returns seconds, and *moved* the bytes that the process has sent and received.
    """

    def __init__(self, most: int, clock: Callable[[], float], moved: Callable[[], float]) -> None:
        self.limit = min(FIRST, most)
        self._most = most
        self._clock = clock
        self._moved = moved
        self._found = self.limit  # without an experiment
        self._rate = 0.0  # bytes/s with that
        self._measured: weakref.ref[object] | None = None  # the transfer
        self._calls = 0  # since the limit changed
        self._first_mark = self._mark = (0.0, 0.0)  # time and bytes after the first round, and after the last one
        self._try_at, self._pause = -math.inf, _PAUSE

    def begin(self, transfer: object) -> None:
        """*transfer* has begun. It is measured unless another one is."""
        if self._measured is None or self._measured() is None:
            self._measured, self._calls = weakref.ref(transfer), 0

    def end(self, transfer: object) -> None:
        """*transfer* has nothing left to request."""
        if self._measured is not None and self._measured() is transfer:
            self._measured = None
            if self._calls >= 2 * self.limit:  # one round is better than nothing
                self._conclude()

    def called(self, transfer: object) -> int:
        """A call of *transfer* has returned; how many are to run at once from now on."""
        if self._measured is None or self._measured() is not transfer:
            return self.limit
        self._calls += 1
        if self._calls % self.limit == 0:
            self._mark = self._clock(), self._moved()
            if self._calls == self.limit:
                self._first_mark = self._mark
            elif self._calls >= (1 + _ROUNDS) * self.limit:
                self._conclude()
        return self.limit

    def _conclude(self) -> None:
        (since, before), (now, moved) = self._first_mark, self._mark
        rate = (moved - before) / max(now - since, 1e-6)
        self._calls = 0
        added = self.limit / self._found - 1
        if added and rate < self._rate * (1 + _WORTH * added):
            self.limit = self._found
            self._try_at = now + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return
        self._found, self._rate = self.limit, rate
        if now >= self._try_at and rate < _FAST * self.limit:
            self.limit = min(self._most, math.ceil(_STEP * self.limit))
