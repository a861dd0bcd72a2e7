"""How many requests of one transfer run at once where that is found automatically, as pure decisions.

One connection to a storage service is slower than the network: about 60 MB/s. `FIRST` connections fill the network of
most machines, but not that of a large one. Only an experiment can tell: more requests at once, for a while. If
bandwidth rises by a good part of what the added connections could carry, the new number stays, and a larger one is
tried. Otherwise the former number is restored, and the next experiment comes much later. An experiment is not even made
while single connections are fast, since then something else is the limit: this machine, or all of the network.

If this machine is the limit, fewer are faster: threads that all have something to decrypt take the cores and the
interpreter lock from each other. How many have something at a time follows from the time that they spend on it, summed
over threads. The number of requests is reduced to as many as it takes for about one such thread for each core, and is
raised again when threads wait for the network.

Threads also wait for the interpreter lock while another thread of the program runs Python code. Then more of them are
faster, since each one that waits is one more chance to get the lock. So the number is reduced only if the threads do
decrypt, which shows in their bandwidth. (Their CPU time would show it as well, but to read its clock takes 4 % of the
bandwidth.)

Bandwidth is that of the whole process, in calls of one transfer: those after the first round, when the requests of the
former number have ended. Calls begin together at first, and so they end together: only whole rounds are measured. Only
a transfer that always has something to request is measured, and one at a time. All transfers of an engine use what was
found. Attributes are changed by the transfer that is measured, one call at a time. An interrupt, or a second transfer
that begins at the same moment, spoils one measurement: a number of requests that is between `_FEWEST` and the number of
connections in any case.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

FIRST = 16
_STEP = 1.5  # an experiment has this multiple of the requests
_WORTH = 0.5  # of the bandwidth that the added connections could carry; less is noise, or a network that is full
_FAST = 80e6  # bytes/s of one connection, from which on more of them are not tried
_ROUNDS = 2  # calls of each connection that are measured
_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0  # seconds after an experiment that failed
_CHECK, _SHORTEST = 8, 0.01  # calls, and seconds, from which it is computed how many threads had something to decrypt
_FEWEST, _MANY = 2, 4  # threads that decrypt; of more, even with more cores, most wait for the interpreter lock
_DECRYPTED = 200e6  # bytes/s, a fraction of what a core decrypts; with less, threads wait for something else
_NETWORK = 4  # with fewer threads that decrypt, by this factor, the network is the limit
_STALE_SECONDS = 10.0  # the next transfer may be one from a slower service


class Progress(NamedTuple):
    """What all transfers of the process have done."""

    moved: float = 0.0
    """Bytes sent and received."""
    tls_seconds: float = 0.0
    """Time for receiving what had arrived over TLS, summed over threads."""


class Growth:
    """The number of requests at once of each transfer of an engine.

    Args:
        most: The largest number.
        cores: Threads that this machine can run at once.
        clock: Returns the time in seconds.
        progress: Returns what the process has done.
    """

    def __init__(self, most: int, cores: int, clock: Callable[[], float], progress: Callable[[], Progress]) -> None:
        self._most = most
        self._enough = min(max(_FEWEST, cores), _MANY)
        self._clock = clock
        self._progress = progress
        self._tried = min(FIRST, most)
        self._found = self._tried  # without an experiment
        self._rate = 0.0  # bytes/s with that
        self._share = 0.0  # of the time of a request, in which there is something to decrypt
        self._measured: weakref.ref[object] | None = None  # the transfer
        self._calls = 0  # since the limit changed
        self._first_mark = self._mark = (0.0, Progress())  # after the first round, and after the last one
        self._checked = (-math.inf, Progress())  # time and progress when `_share` was computed, or a transfer began
        self._unchecked = 0  # calls since then
        self._shared_at = -math.inf  # time when `_share` was computed: a short transfer does not do that
        self._try_at, self._pause = -math.inf, _PAUSE

    @property
    def limit(self) -> int:
        """How many requests of one transfer run at once."""
        if self._share * self._tried <= self._enough:  # a share of almost zero would divide to infinity
            return self._tried
        return min(self._tried, max(_FEWEST, math.ceil(self._enough / self._share)))

    def begin(self, transfer: object) -> None:
        """*transfer* has begun. It is measured unless another one is."""
        if self._transfer() is None:
            self._measured, self._calls, self._unchecked = weakref.ref(transfer), 0, 0
            now = self._clock()
            if now - self._shared_at > _STALE_SECONDS:
                self._share = 0.0
            self._checked = now, self._progress()

    def end(self, transfer: object) -> None:
        """*transfer* has nothing left to request."""
        if self._transfer() is transfer:
            self._measured = None
            if self._calls >= 2 * self.limit:  # one round is better than nothing
                self._conclude()

    def called(self, transfer: object) -> int:
        """A call of *transfer* has returned; how many are to run at once from now on."""
        if self._transfer() is not transfer:
            return self.limit
        self._calls += 1
        self._unchecked += 1
        if self._unchecked >= _CHECK and self._check():
            self._calls = 0
        elif self._calls % self.limit == 0:
            self._mark = self._clock(), self._progress()
            if self._calls == self.limit:
                self._first_mark = self._mark
            elif self._calls >= (1 + _ROUNDS) * self.limit:
                self._conclude()
        return self.limit

    def _transfer(self) -> object:
        """The transfer that is measured, if any."""
        measured = self._measured  # another thread may set it to None between two reads
        return None if measured is None else measured()

    def _check(self) -> bool:
        """Compute `_share`; whether that has changed the limit."""
        limit, now, (since, before) = self.limit, self._clock(), self._checked
        if now - since < _SHORTEST:
            return False
        progress = self._progress()
        self._checked, self._unchecked, self._shared_at = (now, progress), 0, now
        busy = (progress.tls_seconds - before.tls_seconds) / (now - since)
        if progress.moved - before.moved < _DECRYPTED * (now - since):
            busy = 0.0
        self._share = (self._share + min(busy / limit, 1.0)) / 2
        if busy > self._enough / _NETWORK and limit < self._tried:
            # One more at a time: with a few too many, each one waits for all others.
            self._share = max(self._share, self._enough / (limit + 1))
        return self.limit != limit

    def _conclude(self) -> None:
        self._calls = 0
        if self.limit < self._tried:
            return  # this machine is the limit
        (since, before), (now, progress) = self._first_mark, self._mark
        rate = (progress.moved - before.moved) / max(now - since, 1e-6)
        added = self._tried / self._found - 1
        if added and rate < self._rate * (1 + _WORTH * added):
            self._tried = self._found
            self._try_at = now + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return
        self._found, self._rate = self._tried, rate
        if now >= self._try_at and rate < _FAST * self._tried:
            self._tried = min(self._most, math.ceil(_STEP * self._tried))
