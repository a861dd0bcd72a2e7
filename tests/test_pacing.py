"""How fast requests begin at a service that throttles, with a clock that the tests set."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from typing import Protocol

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from azstoragetorch._engine.pacing import Pacing

MOST = 64
TRIP = 0.02


def pacing_after(accepted: int, *, most: int = MOST, until: float = 100.0) -> Pacing:
    """A pacing that has seen as many accepted requests in the second before *until*, with a round trip of `TRIP`."""
    pacing = Pacing(most)
    for number in range(accepted):
        at = until - 1 + (number + 1) / accepted
        pacing.accepted(at - TRIP, at)
    return pacing


def throttled(pacing: Pacing, began: float, now: float, retry_after: float = 0.0) -> bool:
    """As many refusals as show that the service throttles; what the last one returned."""
    for _ in range(3):
        assert not pacing.refused(began, now)
    return pacing.refused(began, now, retry_after)


class TestClosing:
    def test_a_service_that_refuses_nothing_is_not_paced(self) -> None:
        pacing = pacing_after(1000)
        assert [pacing.book(now) for now in (100.0, 100.0, 100.0)] == [100.0] * 3
        assert pacing.book_now(100.0)
        assert pacing.pace == math.inf

    def test_one_burst_of_refusals_halves_once(self) -> None:
        """All refusals of requests that began before the first of them arrived are one burst, in any order."""
        pacing = pacing_after(1000)
        answers = [pacing.refused(100.0 - TRIP + number / 1e4, 100.0 + number / 1e4) for number in range(64)]
        assert answers == [False] * 3 + [True] + [False] * 60
        assert pacing.limit == MOST / 2

    def test_what_was_sent_before_a_refusal_does_not_open_it(self) -> None:
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        assert not pacing.accepted(99.995, 100.01)
        assert pacing.is_closed
        assert not pacing.book_now(100.05)

    def test_a_request_that_was_sent_after_it_does(self) -> None:
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        probe = pacing.book(100.0)
        assert probe > 100.0
        old = pacing.plan
        assert pacing.accepted(probe, probe + TRIP)
        assert not pacing.is_closed
        assert pacing.plan is not old, "who waits must book again"

    def test_probes_come_at_growing_distances_and_end(self) -> None:
        """Each waiting request books its own; a service that is closed for seconds is left to the retries."""
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        turns = [pacing.book(100.0) for _ in range(60)]
        probes = [turn for turn in turns if turn < math.inf]
        assert 10 < len(probes) < 40
        assert all(later - earlier >= 0.999 * TRIP for earlier, later in itertools.pairwise(probes))
        assert probes[-1] <= 102.0
        assert turns[len(probes) :] == [math.inf] * (60 - len(probes))

    def test_the_limit_is_halved_again_only_after_it_was_open(self) -> None:
        """A refused probe is the same refusal."""
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        for probe in (100.05, 100.1, 100.2):
            pacing.refused(probe, probe + 0.001)
        assert pacing.limit == MOST / 2
        pacing.accepted(100.3, 100.3 + TRIP)
        pacing.refused(100.33, 100.331)
        assert pacing.limit == MOST / 4


class TestChance:
    """A few refusals that have nothing to do with the number of requests."""

    def test_one_among_many_changes_nothing(self) -> None:
        pacing = pacing_after(1000)
        plan = pacing.plan
        for round_ in range(100):
            assert not pacing.refused(100.0 + round_, 100.1 + round_)
            for number in range(5):  # three of sixteen at most
                pacing.accepted(100.2 + round_ + number / 100, 100.3 + round_ + number / 100)
        assert pacing.is_free
        assert pacing.plan is plan
        assert pacing.limit == MOST

    def test_a_quarter_of_the_last_ones_is_throttling(self) -> None:
        pacing = pacing_after(1000)
        for number in range(3):
            assert not pacing.refused(100.0 + number / 10, 100.05 + number / 10)
            for _ in range(4):
                pacing.accepted(100.0 + number / 10, 100.06 + number / 10)
        assert pacing.refused(100.4, 100.5)
        assert not pacing.is_free
        assert pacing.limit == MOST / 2

    def test_also_while_it_is_paced(self) -> None:
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        for number in range(16):
            pacing.accepted(100.1 + number / 1000, 100.2 + number / 1000)
        limit = pacing.limit
        assert not pacing.refused(100.25, 100.26)
        assert not pacing.is_closed
        assert pacing.limit == limit

    def test_the_service_is_free_when_the_limit_has_grown_back(self) -> None:
        """If it never refused for long, nothing else is known that would bound the pace."""
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        for number in range(33):
            assert not pacing.is_free
            pacing.accepted(100.1 + number * TRIP, 100.1 + (number + 1) * TRIP)
        assert pacing.is_free
        assert pacing.limit == MOST


class TestRetryAfter:
    def test_nothing_begins_before_its_end(self) -> None:
        pacing = pacing_after(1000)
        booked = pacing.plan
        pacing.refused(99.99, 100.0, retry_after=7.0)
        assert pacing.plan is not booked
        assert min(pacing.book(now) for now in (100.0, 103.0, 106.9)) >= 107.0
        assert not pacing.book_now(106.9)

    def test_the_longest_one_counts(self) -> None:
        pacing = pacing_after(1000)
        for asked in (2.0, 9.0, 1.0):
            pacing.refused(99.99, 100.0, retry_after=asked)
        assert pacing.book(100.0) >= 109.0

    def test_also_if_the_burst_had_been_answered_before(self) -> None:
        """A refusal of a burst that is over does not halve, but its pause holds, also for turns booked before."""
        pacing = pacing_after(1000)
        throttled(pacing, 99.9, 100.0)
        pacing.accepted(100.01, 100.03)
        pacing.book(100.03)
        booked, limit = pacing.plan, pacing.limit
        assert not pacing.refused(99.95, 100.04, retry_after=5.0)
        assert pacing.plan is not booked
        assert pacing.limit == limit
        assert pacing.book(100.05) >= 105.04


class TestRecovering:
    def test_the_limit_grows_by_one_in_a_round_trip(self) -> None:
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        now = 100.1
        pacing.accepted(now, now + TRIP)
        limits = []
        for _ in range(5):
            sent = now = now + TRIP
            for number in range(10):  # all of one round trip
                pacing.accepted(sent + number * 1e-4, sent + TRIP + number * 1e-4)
            limits.append(pacing.limit)
        assert limits == [33, 34, 35, 36, 37]

    def test_the_most_can_be_raised_but_not_lowered(self) -> None:
        pacing = Pacing(8)
        for most in (4, 100, 16):
            pacing.allow(most)
        throttled(pacing, 99.99, 100.0)
        assert pacing.limit == 50

    def test_not_before_the_pause_that_was_asked_for(self) -> None:
        """Although requests that began before it are accepted until the limit is where it was."""
        pacing = Pacing(2)
        pacing.refused(100.0, 100.0, 1.0)
        for _ in range(3):
            pacing.accepted(100.0, 100.0)
        assert pacing.book(100.1) == 101.0
        assert not pacing.book_now(100.2)
        pacing.accepted(101.0, 101.1)
        assert pacing.is_free

    def test_up_to_the_most(self) -> None:
        pacing = pacing_after(1000, most=4)
        throttled(pacing, 99.99, 100.0)
        for number in range(100):
            pacing.accepted(100.1 + number * TRIP, 100.1 + (number + 1) * TRIP)
        assert pacing.limit == 4

    def test_the_rate_is_what_was_accepted_in_a_second(self) -> None:
        """If the service refuses for longer than a round trip; one stray refusal says nothing about the rate."""
        pacing = pacing_after(400)
        pacing._responses.appendleft((98.0, TRIP))  # it knows what was before the last second
        throttled(pacing, 99.99, 100.0)
        assert pacing.rate == math.inf
        pacing.refused(100.05, 100.051)
        assert pacing.rate == pytest.approx(0.95 * 400, rel=0.07)
        rate = pacing.rate
        pacing.refused(100.5, 100.51)  # later probes: the service was closed, so fewer were accepted
        assert pacing.rate == rate

    def test_it_is_forgotten_after_a_minute(self) -> None:
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        assert pacing.book(159.0) > 159.0 or pacing.is_closed
        assert pacing.book(161.0) == 161.0
        assert pacing.is_free
        assert pacing.pace == math.inf

    def test_also_if_requests_keep_being_accepted(self) -> None:
        pacing = pacing_after(1000)
        throttled(pacing, 99.99, 100.0)
        for now in range(101, 170):
            pacing.accepted(now - TRIP, now)
        assert pacing.is_free


class PacingMachine(RuleBasedStateMachine):
    """Any order of requests, answers and pauses keeps the bounds."""

    sent = Bundle("sent")

    @initialize(most=st.integers(1, 200))
    def begin(self, most: int) -> None:
        self.most = most
        self.pacing = Pacing(most)
        self.now = 1000.0
        self.held_until = -math.inf
        self.bursts = 0

    @rule(target=sent)
    def book(self) -> float:
        turn = self.pacing.book(self.now)
        assert turn >= max(self.now, self.held_until)
        assert turn < math.inf or self.pacing.is_closed
        return min(turn, self.now + 3.0)

    @rule(target=sent)
    def book_now(self) -> float:
        if self.pacing.book_now(self.now):
            assert self.now >= self.held_until
        return self.now

    @rule(seconds=st.floats(0, 3) | st.floats(0, 0.05) | st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(began=sent)
    def accept(self, began: float) -> None:
        limit, plan = self.pacing.limit, self.pacing.plan
        self.now = max(self.now, began)
        are_earlier = self.pacing.accepted(began, self.now)
        assert are_earlier == (self.pacing.plan is not plan)
        assert self.pacing.is_free or limit <= self.pacing.limit <= limit + 1

    @rule(began=sent, asked=st.just(0.0) | st.floats(1e-3, 5))
    def refuse(self, began: float, asked: float) -> None:
        limit, was_closed = (self.pacing.limit, self.pacing.is_closed)
        self.now = max(self.now, began)
        self.held_until = max(self.held_until, self.now + asked if asked else -math.inf)
        is_first = self.pacing.refused(began, self.now, asked)
        assert self.pacing.is_closed or not is_first
        assert not (self.pacing.is_free and (is_first or asked))
        if is_first and not was_closed:
            assert self.pacing.limit == max(1.0, limit / 2)
        else:
            assert self.pacing.limit == limit

    @invariant()
    def within_bounds(self) -> None:
        if hasattr(self, "pacing"):
            assert 1 <= self.pacing.limit <= self.most
            assert self.pacing.rate >= 10
            assert self.pacing.pace > 0
            assert not (self.pacing.is_free and self.pacing.is_closed)


TestPacingMachine = PacingMachine.TestCase


class Account(Protocol):
    def accepts(self, now: float) -> bool: ...


class Window:
    """Accepts *limit* requests in every second of the clock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.second, self.seen = -1, 0

    def accepts(self, now: float) -> bool:
        if int(now) != self.second:
            self.second, self.seen = int(now), 0
        self.seen += 1
        return self.seen <= self.limit


class Bucket:
    """Accepts *rate* requests a second, and *burst* at once after a pause."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self.level, self.at = burst, 0.0

    def accepts(self, now: float) -> bool:
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Chance:
    """Refuses one request in a hundred, besides what *account* refuses."""

    def __init__(self, account: Account | None = None) -> None:
        self.account = account
        self.random = random.Random(3)

    def accepts(self, now: float) -> bool:
        return self.random.random() >= 0.01 and (self.account is None or self.account.accepts(now))


class Unlimited:
    def accepts(self, now: float) -> bool:
        return True


class Simulation:
    """Processes that each keep as many requests in flight or waiting as they may, against one account."""

    def __init__(self, account: Account, processes: int, trip: float, most: int = MOST) -> None:
        self.now = 0.0
        self.account, self.trip = account, trip
        self.random = random.Random(1)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.shares = [0] * processes
        self.pacings = [Pacing(most) for _ in range(processes)]
        self.waiting: list[dict[int, object]] = [{} for _ in range(processes)]
        for process, _ in itertools.product(range(processes), range(most)):
            self.enter(process)

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), action))

    def enter(self, process: int) -> None:
        pacing, me = self.pacings[process], next(self.numbers)
        turn = min(pacing.book(self.now), self.now + self.random.uniform(1, 2) if pacing.is_closed else math.inf)
        plan = self.waiting[process][me] = pacing.plan

        def wake() -> None:
            if self.waiting[process].pop(me, None) is None:
                return
            if pacing.plan is plan or pacing.is_free:
                self.send(process)
            else:
                self.enter(process)

        self.at(turn, wake)

    def send(self, process: int) -> None:
        began, is_good = self.now, self.account.accepts(self.now)

        def answer() -> None:
            if is_good:
                self.accepted.append(self.now)
                self.shares[process] += 1
                if self.pacings[process].accepted(began, self.now):
                    waiting, self.waiting[process] = self.waiting[process], {}
                    for _ in waiting:
                        self.enter(process)
            else:
                self.refused.append(self.now)
                self.pacings[process].refused(began, self.now)
            self.enter(process)

        self.at(began + self.random.uniform(0.95, 1.2) * (self.trip if is_good else 0.001), answer)

    def run(self, until: float) -> None:
        while self.events[0][0] < until:
            self.now, _, action = heapq.heappop(self.events)
            action()


@pytest.mark.parametrize(
    ("make", "limit", "trip", "share"),
    [
        (lambda: Chance(Window(400)), 400, 0.02, 0.93),
        (lambda: Chance(Bucket(400, 20)), 400, 0.02, 0.97),
        (lambda: Window(400), 400, 0.005, 0.93),
        (lambda: Window(400), 400, 0.02, 0.93),
        (lambda: Window(400), 400, 0.05, 0.93),
        (lambda: Window(2000), 2000, 0.005, 0.9),
        (lambda: Window(2000), 2000, 0.02, 0.9),
        (lambda: Bucket(400, 20), 400, 0.005, 0.97),
        (lambda: Bucket(400, 20), 400, 0.02, 0.97),
        (lambda: Bucket(400, 20), 400, 0.05, 0.85),  # the limit of 20 is halved to 10, and grows back in half a second
        (lambda: Bucket(400, 400), 400, 0.02, 0.97),
    ],
)
def test_an_account_is_used(make: Callable[[], Account], limit: float, trip: float, share: float) -> None:
    """The *share* of what it accepts, in any three seconds after the first, with few refusals after the third."""
    simulation = Simulation(make(), 1, trip)
    simulation.run(16.0)
    for begin in range(1, 13):
        accepted = sum(begin < at <= begin + 3 for at in simulation.accepted)
        assert accepted >= share * limit * 3, f"{accepted} from {begin} s on"
    refused = sum(at > 3 for at in simulation.refused)
    # A small bucket is full again after a few short round trips, and it takes four refusals to see that it is empty.
    few = 0.25 if trip < 0.01 else 0.12
    assert refused <= few * sum(at > 3 for at in simulation.accepted)


def test_single_refusals_cost_little() -> None:
    """One request in a hundred is refused by chance: the others do not wait for that."""
    clean, chance = Simulation(Unlimited(), 1, TRIP), Simulation(Chance(), 1, TRIP)
    for simulation in (clean, chance):
        simulation.run(8.0)
    assert len(clean.accepted) > 23_000
    assert len(chance.refused) > 200
    assert len(chance.accepted) >= 0.99 * len(clean.accepted)


def test_throttling_that_ends_is_forgotten_although_requests_are_refused_by_chance() -> None:
    class Ends(Chance):
        def accepts(self, now: float) -> bool:
            if now > 3:
                self.account = None
            return super().accepts(now)

    simulation = Simulation(Ends(Window(400)), 1, TRIP)
    simulation.run(12.0)
    assert sum(2 < at <= 3 for at in simulation.accepted) <= 400
    assert sum(at > 10 for at in simulation.accepted) >= 0.9 * 2 * MOST / (1.075 * TRIP)


def test_processes_share_an_account() -> None:
    simulation = Simulation(Window(400), 4, TRIP)
    simulation.run(40.0)
    assert len(simulation.accepted) >= 0.9 * 400 * 40
    assert min(simulation.shares) >= 0.5 * max(simulation.shares)


def test_many_processes_do_not_flood_it() -> None:
    """Sixty-four at 400 requests/s: what the account gives, and not much more than 10/s of each."""
    simulation = Simulation(Window(400), 64, TRIP, most=8)
    simulation.run(12.0)
    assert len(simulation.accepted) >= 0.9 * 400 * 11
    assert sum(at > 6 for at in simulation.refused) <= 64 * 15 * 6
