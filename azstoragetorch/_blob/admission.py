"""When requests to a service may begin: at once, or at the pace that `Pacing` found while the service throttles.

All transfers of this process to one host share one `Admission`, whatever their credentials and configurations.

Waiting for a turn is waiting for a point in time, never for another request to end. So a signal handler that sends
requests while the interrupted code waits here, or while a request of it is in flight, gets its own turn. A waiting
thread sleeps in a scope that is cancelled when its own scope is, and when turns have become earlier. The order is the
one of `Scope`: the thread enters its scope into `_waiting` and then looks whether the plan is still the same; the
thread that replaces the plan does that first and then goes through `_waiting`. So at least one sees the other.

While the service is closed, a thread does not wait without end. Either its turn to probe comes, or it has waited for as
long as a failed request waits for its next attempt, in proportion to how long the service has refused everything.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter, deque
from contextlib import suppress
from typing import NamedTuple

from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.metrics import set_pace, timed
from azstoragetorch._engine.pacing import Pacing
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._engine.threads import start_thread

log = logging.getLogger("azstoragetorch")

LONGEST_HOLD = 120.0  # seconds; a service that asks for a longer pause is treated as unavailable
_LONGEST_SLEEP = 60.0  # seconds; a request that waits for longer books again then
_BACKOFF = 2.0  # seconds, less up to a half; more than the windows of a second in which services count requests
_WARN_EVERY = 60.0  # seconds between two warnings about throttling


class Entry(NamedTuple):
    """The permission to send one request."""

    began: float
    is_early: bool
    """Whether it was sent before a failed request would have been sent again: a refusal is then not an attempt."""
    is_alone: bool = False
    """Whether it was refused while the service accepts most others."""


class Admission:
    """Admits the requests of this process to *host*."""

    def __init__(self, host: str, pacing: Pacing) -> None:
        self._host = host
        self.pacing = pacing
        self._waiting: deque[Scope] = deque()

    def enter(self, config: TransferConfig, scope: Scope | None) -> Entry:
        """Wait until a request may be sent.

        Raises:
            Cancelled: *scope* was cancelled.
        """
        if self.pacing.is_free:
            return Entry(time.monotonic(), is_early=True)
        with timed("throttled_seconds"):
            return self._wait(config, scope or Scope())

    def enter_now(self) -> bool:
        """Admit a request that may be sent now; False if it would have to wait."""
        return self.pacing.book_now(time.monotonic())

    def accepted(self, began: float) -> None:
        """A request that was sent at *began* was answered, with anything but a request to slow down."""
        if self.pacing.accepted(began, time.monotonic()):
            self._publish("accepts requests")
            self._wake()

    def refused(self, began: float, answer: str, retry_after: float | None, most: int) -> None:
        """A request that was sent at *began* was answered with *answer*, such as ``"503 ServerBusy"``.

        *retry_after* is the pause that the service asks for.

        *most* is the number of requests that the caller may have in flight.
        """
        self.pacing.allow(most)
        hold = min(retry_after or 0.0, LONGEST_HOLD)
        is_news = self.pacing.refused(began, time.monotonic(), hold)
        if not self.pacing.is_free:
            _note_throttling(answer)
        if is_news:
            self._publish(f"refuses requests ({answer}, Retry-After {hold:g} s)")

    def refusal_of(self, entry: Entry) -> Entry:
        """*entry*, now that its request was refused."""
        return entry._replace(is_alone=self.pacing.is_free)

    def _wait(self, config: TransferConfig, scope: Scope) -> Entry:
        pacing, held_until = self.pacing, math.inf
        while True:
            now = time.monotonic()
            plan, turn, patience = pacing.plan, pacing.book(now), math.inf
            if pacing.held_until > now:
                held_until = pacing.held_until
            if pacing.is_closed:
                patience = max(pacing.refused_at, pacing.held_until) + self._backoff(config, now)
                turn = min(turn, patience)
            if turn - now > _LONGEST_SLEEP:
                self._sleep(_LONGEST_SLEEP, plan, scope)
                continue
            while pacing.plan is plan and (rest := turn - time.monotonic()) > 0:
                self._sleep(rest, plan, scope)
            now = time.monotonic()
            if pacing.plan is plan or pacing.is_free:
                return Entry(now, is_early=not pacing.is_closed or now < min(patience, held_until))

    def _backoff(self, config: TransferConfig, now: float) -> float:
        """Seconds after the last refusal, or its pause, until a request is sent although none has been accepted."""
        longest = min(config.max_backoff, max(_BACKOFF, self.pacing.closed_for(now) / 2))
        return random.uniform(0.5, 1.0) * longest

    def _sleep(self, seconds: float, plan: object, scope: Scope) -> None:
        with scope.child() as nap:
            try:
                self._waiting.append(nap)
                if self.pacing.plan is plan:
                    nap.pause(seconds)
            except Cancelled:
                scope.check()  # if it is not cancelled, the turns have become earlier
            finally:
                with suppress(ValueError):
                    self._waiting.remove(nap)

    def _wake(self) -> None:
        """Make every waiting thread book again, in the order in which they came."""
        with suppress(IndexError):
            while self._waiting:
                self._waiting.popleft().cancel()

    def _publish(self, what: str) -> None:
        pacing = self.pacing
        if _admissions.get().get(self._host) is self:
            set_pace(self._host, pacing.pace)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "%s %s: at most %.0f requests/s, %.0f in one round trip", self._host, what, pacing.pace, pacing.limit
            )


_admissions: PerProcess[dict[str, Admission]] = PerProcess(dict)


def admission_for(host: str, config: TransferConfig) -> Admission:
    """The admission of this process to *host*, which can include a port."""
    admissions = _admissions.get()
    return admissions.get(host) or admissions.setdefault(host, Admission(host, Pacing(config.max_connections)))


def forget_admissions() -> None:
    """Forget which services throttle."""
    admissions = _admissions.get()
    for host in list(admissions):
        admissions.pop(host, None)
        set_pace(host, math.inf)


_throttled: deque[str] = deque(maxlen=100_000)  # responses since the last warning
_warned: dict[str, float] = {}


def _note_throttling(answer: str) -> None:
    """Warn that the service throttles, at once and then at most once a minute, with the number of responses."""
    _throttled.append(answer)
    now = time.monotonic()
    since = now - _warned.get("at", now - _WARN_EVERY)
    if since < _WARN_EVERY:
        return
    _warned["at"] = now
    answers: Counter[str] = Counter()
    with suppress(IndexError):  # another thread also takes from it
        while _throttled:
            answers[_throttled.popleft()] += 1

    def warn() -> None:
        log.warning(
            "the service is throttling requests: it refused %d in the last %.0f s (%s). They are sent again, and all "
            "requests of this process at the pace that the service accepts. Larger blobs or a larger part_size need "
            "fewer requests",
            sum(answers.values()),
            max(since, _WARN_EVERY),
            ", ".join(f"{number} x {answer}" for answer, number in answers.most_common()),
        )

    # On another thread: a logging handler can hold a lock, and this thread must not wait, since others wait for it.
    start_thread(warn)
