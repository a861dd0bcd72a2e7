"""How fast requests may begin at a service that throttles, as pure decisions: every method is given the time.

A service that refuses requests with 503 or 429 is in one of three phases:

    free      requests begin at once, and nothing but the last responses is remembered
    closed    requests were refused: the others wait. From time to time one of them begins, to find out whether
              the service accepts requests again
    open      a request that began after the refusal was accepted: requests begin one after the other, with a gap

A service also refuses single requests for reasons that have nothing to do with their number. One refusal among many
responses changes nothing here: only that request is sent again. Refusals close a service if they are `_TELLING` of the
last `_AMONG` responses, or if one names a pause. With one request in 100 refused by chance, that happens once in
hundreds of thousands; a service that throttles refuses as many within milliseconds.

Two values bound the gap. The *limit* is the number of requests that begin in one round trip. It is halved once for
all refusals of one round trip, and grows by one with each round trip of success: it reacts at once, but does not
remember. The *rate* does. It is what the service accepted in the last second before it refused again, less a little,
and grows slowly at first and then faster. A service that counts requests in windows of a second cannot be followed
with the limit alone: after it has refused for half a second the limit is one, and before the next window ends it is too
high. If the limit has grown back to where it was, and the rate is not known, nothing is left to bound: the service is
free.

"One round trip" needs no clock: refusals of requests that began before the last cut belong to the same burst.

The gap is kept by turns: a request books the next point in time and begins then. Since a turn is a time and not a
place that another request has to leave, no request ever waits for another one. When turns become earlier, the plan is
replaced, and everyone that waits books again. Attributes are read and written without a lock. A race, or an interrupt
between two lines, costs a turn or gives one to two requests; both are harmless.
"""

from __future__ import annotations

import math
from collections import deque

_HORIZON = 1.0  # seconds; services count requests in windows of about a second
_REMEMBERED = 4096  # responses
_MARGIN = 0.95  # of what was accepted: room for requests in the wrong window
_LOWEST_RATE = 10.0  # requests a second: a process among many finds out soon when the service accepts more
_TELLING, _AMONG = 4, 16  # refusals, and responses
_FORGET = 60.0  # seconds without a refusal until the service is free again
_SHORTEST_TRIP, _LONGEST_TRIP = 0.001, 1.0  # seconds; bounds for the measured round trip
_FIRST_PROBE = 0.02  # seconds between a refusal and the next request, at least
_PROBE_SHARE = 0.125  # a probe comes when the service has been closed this much longer than at the one before
_PROBE_FOR = 2.0  # seconds; a service that is closed for longer is not throttling but down


class Plan:
    """What turns are booked in. Turns of an old plan are void."""

    __slots__ = ("next",)

    def __init__(self, start: float) -> None:
        self.next = start


class Pacing:
    """The pace of all requests of this process to one service, of which at most *most* begin in one round trip."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.is_free = True
        self.is_closed = False
        self.limit = float(most)
        self.rate = math.inf
        """Requests a second."""
        self.held_until = -math.inf
        """No request begins before this time: the service asked for it."""
        self.plan = Plan(-math.inf)
        self._responses: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)  # when, and after how many seconds
        self._refusals: deque[bool] = deque(maxlen=_AMONG)  # whether the last responses were refusals
        self._round_trip = _SHORTEST_TRIP
        self.refused_at = -math.inf
        """When the last refusal arrived."""
        self._cut_at = -math.inf
        self._closed_since = -math.inf
        self._limit_grew_at = self._rate_set_at = -math.inf
        self._steps = 0  # by which the rate grew since the last refusal
        self._is_binding = False  # a request had to wait for its turn since the rate was set

    def allow(self, most: int) -> None:
        """Let the limit grow up to *most*, unless it may grow further already."""
        if most > self._most:
            self._most = most
            if self.is_free:
                self.limit = float(most)

    @property
    def pace(self) -> float:
        """Requests a second that may begin while the service is open."""
        return math.inf if self.is_free else 1.0 / self.gap

    @property
    def gap(self) -> float:
        """Seconds between the beginnings of two requests while the service is open."""
        return max(self._round_trip / self.limit, 1.0 / self.rate)

    def book(self, now: float) -> float:
        """When the next request may begin: now or later; infinity if it should wait for the service to open."""
        self._forget_if_old(now)
        plan = self.plan
        if self.is_free:
            return now
        start = max(plan.next, now, self.held_until)
        if not self.is_closed:
            plan.next = start + self.gap
            self._is_binding = self._is_binding or start > now
            return start
        age = start - max(self._closed_since, self.held_until)
        if age > _PROBE_FOR:
            return math.inf
        plan.next = start + max(self._round_trip, _FIRST_PROBE, age * _PROBE_SHARE)
        return start

    def book_now(self, now: float) -> bool:
        """Book the next turn if it is now; whether it is."""
        if self.is_free:
            return True
        if self.is_closed or max(self.plan.next, self.held_until) > now:
            return False
        self.plan.next = now + self.gap
        return True

    def closed_for(self, now: float) -> float:
        """Seconds for which the service has been closed without having asked for it; 0 if it is not."""
        return max(0.0, now - max(self._closed_since, self.held_until)) if self.is_closed else 0.0

    def accepted(self, began: float, now: float) -> bool:
        """A request that began at *began* was accepted. Returns whether turns have become earlier."""
        self._responses.append((now, now - began))
        self._refusals.append(False)
        if self.is_free:
            return False
        if self.is_closed:
            if began < self._cut_at:
                return False  # sent before the refusal: it says nothing about what comes after
            self.is_closed = False
            self._round_trip = self._measured_trip()
            self._limit_grew_at = now
            self.plan = Plan(began + self.gap)  # it has accepted requests since the probe began
            return True
        return self._forget_if_old(now) or self._grow(began, now)

    def refused(self, began: float, now: float, retry_after: float = 0.0) -> bool:
        """A request that began at *began* was refused.

        Returns whether the service throttles, and this is the first refusal of a round trip.
        """
        self._refusals.append(True)
        if now + retry_after > max(now, self.held_until):
            self.held_until = now + retry_after
            self.plan = Plan(self.held_until)  # turns before that are void
            self.is_free = False
        is_alone = not retry_after and not self.is_closed and self._refusals.count(True) < _TELLING
        if began < self._cut_at or is_alone:
            return False
        self._cut_at = now
        if not self.is_closed:
            self.limit = max(1.0, self.limit / 2)
            self._round_trip = self._measured_trip()
            self._closed_since = now
            self.plan = Plan(now + self.gap)
        elif self._rate_set_at <= self._closed_since and now - self._closed_since >= max(
            self._round_trip, _FIRST_PROBE
        ):
            self.rate = max(_LOWEST_RATE, _MARGIN * min(self.rate, self._accepted_lately(now)))
            self._rate_set_at = now
            self._steps = 0
            self._is_binding = False
        self.refused_at = now
        self.is_closed, self.is_free = True, False
        return True

    def _grow(self, began: float, now: float) -> bool:
        before = self.gap
        if began >= self._limit_grew_at and self.limit < self._most:
            self.limit = min(float(self._most), self.limit + 1)
            self._limit_grew_at = now
        if self.limit == self._most and self.rate == math.inf and now >= self.held_until:
            return self._free(now)
        if self._is_binding and now - self._rate_set_at >= _HORIZON and self.rate < math.inf:
            self.rate += math.sqrt(self.rate) * 2**self._steps
            self._steps += 1
            self._rate_set_at = now
            self._is_binding = False
        return self.gap < before and self._replan(now)

    def _replan(self, now: float) -> bool:
        self.plan = Plan(min(self.plan.next, now + self.gap))
        return True

    def _forget_if_old(self, now: float) -> bool:
        if self.is_free or now - self.refused_at <= _FORGET or now < self.held_until:
            return False
        return self._free(now)

    def _free(self, now: float) -> bool:
        self.is_free, self.is_closed = True, False
        self.limit, self.rate = float(self._most), math.inf
        self.plan = Plan(now)
        return True

    def _measured_trip(self) -> float:
        latest = sorted(seconds for _, seconds in list(self._responses.copy())[-32:])
        found = latest[len(latest) // 2] if latest else _SHORTEST_TRIP
        return min(max(found, _SHORTEST_TRIP), _LONGEST_TRIP)

    def _accepted_lately(self, now: float) -> float:
        """Requests a second that were accepted in the last second."""
        responses = self._responses.copy()
        times = [at for at, _ in responses if at > now - _HORIZON]
        if not times:
            return 0.0
        knows_more = len(times) < len(responses)
        return len(times) / (_HORIZON if knows_more else max(now - times[0], _SHORTEST_TRIP))
