"""When a silent request is sent once more: decisions under a clock that the test moves, without any I/O."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch import TransferConfig
from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.hedging import Hedging, hedging_for

FIRST = 4  # hedges that need no earlier requests


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Asked:
    since: float
    kind: str = "GET"


@dataclass(order=True)
class Event:
    at: float
    number: int
    act: Callable[[], None] = field(compare=False)


class Simulation:
    """Requests at a service, *width* at once, each asked about whenever it was silent for the patience."""

    def __init__(self, latency: Callable[[int], float], width: int, after: float | None = None) -> None:
        self.clock = Clock()
        self.hedging = Hedging(after, 0.02, self.clock)
        self.latency = latency
        self.width = width
        self.numbers = itertools.count()
        self.events: list[Event] = []
        self.hedges = 0
        self.longest = 0.0

    def run(self, count: int) -> None:
        for _ in range(self.width):
            self.send(count)
        while self.events:
            event = heapq.heappop(self.events)
            self.clock.now = event.at
            event.act()

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, Event(self.clock.now + seconds, next(self.numbers), act))

    def send(self, count: int) -> None:
        number = next(self.numbers)
        self.sent = getattr(self, "sent", 0) + 1
        if self.sent > count:
            return
        began, asked, is_over = self.clock.now, Asked(self.clock.now), False
        self.hedging.enter(asked)
        in_flight = [asked]

        def answer(which: Asked) -> None:
            nonlocal is_over
            if is_over:
                return
            is_over = True
            self.hedging.answered(which)
            for other in in_flight:
                self.hedging.drop(other)
            self.longest = max(self.longest, self.clock.now - began)
            self.send(count)

        def look() -> None:
            if is_over:
                return
            if len(in_flight) < 3 and self.hedging.allows("GET", in_flight[-1].since):
                self.hedges += 1
                hedge = Asked(self.clock.now)
                self.hedging.enter(hedge, is_hedge=True)
                in_flight.append(hedge)
                self.later(self.latency(next(self.numbers)), lambda: answer(hedge))
            self.later(max(0.2, self.hedging.patience("GET") / 2), look)

        self.later(self.latency(number), lambda: answer(asked))
        self.later(self.hedging.patience("GET"), look)


def usual(chance: random.Random) -> float:
    return 0.02 + chance.expovariate(1 / 0.003)


@pytest.mark.parametrize("width", [1, 4, 64])
def test_a_clean_service_is_never_asked_twice(width: int) -> None:
    chance = random.Random(1)
    simulation = Simulation(lambda _: usual(chance), width)
    simulation.run(3000)
    assert simulation.hedges == 0


@pytest.mark.parametrize("width", [1, 4, 64])
def test_stalls_of_one_percent_end_soon_and_cost_at_most_two_percent(width: int) -> None:
    chance = random.Random(2)
    simulation = Simulation(lambda _: 5.0 if chance.random() < 0.01 else usual(chance), width)
    simulation.run(300)  # what is usual has to be learned
    before, simulation.longest = simulation.hedges, 0.0
    simulation.sent = 0
    simulation.run(4000)
    assert simulation.longest < 1
    assert simulation.hedges - before <= 0.02 * 4000 + FIRST


@pytest.mark.parametrize("width", [1, 4, 64])
@pytest.mark.parametrize("after", [None, 0.05])
def test_an_outage_costs_at_most_one_percent(width: int, after: float | None) -> None:
    """From one moment on every answer takes 3 s longer."""
    chance = random.Random(3)
    began: list[float] = []
    simulation = Simulation(
        lambda _: usual(chance) + (3.0 if began and simulation.clock.now >= began[0] else 0.0), width, after
    )
    simulation.run(500)
    assert simulation.hedges <= 1
    began.append(simulation.clock.now)
    simulation.sent = simulation.hedges = 0
    simulation.run(500)
    assert simulation.hedges <= 5


@pytest.mark.parametrize("width", [1, 16])
def test_a_service_that_was_slow_from_the_beginning_is_not_asked_twice(width: int) -> None:
    chance = random.Random(4)
    simulation = Simulation(lambda _: 3.0 + usual(chance), width)
    simulation.run(500)
    assert simulation.hedges <= 2


@given(
    budget=st.floats(0.001, 1.0),
    steps=st.lists(st.tuples(st.sampled_from(["send", "answer", "ask", "drip"]), st.floats(0, 10)), max_size=300),
)
def test_no_order_of_events_exceeds_the_budget(budget: float, steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    hedging = Hedging(0.001, budget, clock)
    waiting: list[Asked] = []
    sent = hedges = 0
    for step, seconds in steps:
        clock.now += seconds
        if step == "send":
            waiting.append(Asked(clock.now))
            hedging.enter(waiting[-1])
            sent += 1
        elif step == "answer" and waiting:
            hedging.answered(waiting.pop(0))
            hedging.received(2 * MiB, seconds)
        elif step == "ask":
            if hedging.allows("GET", clock.now - seconds):
                hedges += 1
                hedging.enter(Asked(clock.now), is_hedge=True)
        elif step == "drip":
            hedges += hedging.allows_for_drip("GET", 4 * MiB, 100, clock.now - seconds)
        assert hedges <= FIRST + budget * sent


def answered(hedging: Hedging, clock: Clock, times: list[float], kind: str = "GET") -> None:
    for seconds in times:
        asked = Asked(clock.now, kind)
        hedging.enter(asked)
        clock.now += seconds
        hedging.answered(asked)


def test_the_patience_follows_what_is_usual() -> None:
    clock = Clock()
    hedging = Hedging(None, 0.02, clock)
    assert hedging.patience("GET") == 1.0
    answered(hedging, clock, [0.01] * 300)
    assert 0.05 <= hedging.patience("GET") <= 0.07
    answered(hedging, clock, [0.2, 0.3] * 200)
    assert 0.6 <= hedging.patience("GET") <= 0.8


def test_kinds_of_requests_are_not_compared_with_each_other() -> None:
    clock = Clock()
    hedging = Hedging(None, 0.02, clock)
    answered(hedging, clock, [0.01] * 300)
    answered(hedging, clock, [0.6] * 300, "GET (list)")
    assert hedging.patience("GET") < 0.1
    assert hedging.patience("GET (list)") > 0.9


def test_a_few_stalls_at_the_beginning_do_not_hide_the_next_ones() -> None:
    clock = Clock()
    hedging = Hedging(None, 0.02, clock)
    answered(hedging, clock, [0.02] * 10 + [5.0] + [0.02] * 10)
    assert hedging.patience("GET") < 0.2


def test_a_silence_is_judged_by_the_requests_that_came_later() -> None:
    clock = Clock()
    hedging = Hedging(0.05, 1.0, clock)
    others = [Asked(clock.now + number / 10_000) for number in range(1, 11)]
    first = Asked(clock.now)
    for asked in [first, *others]:
        hedging.enter(asked)
    clock.now += 0.07
    assert not hedging.allows("GET", first.since), "all wait"
    for asked in others[:6]:
        hedging.answered(asked)
    assert not hedging.allows("GET", first.since), "most were answered at this very moment, and more may be coming"
    clock.now += 0.02
    assert not hedging.allows("GET", first.since), "they took nearly as long"
    clock.now += 0.03
    assert hedging.allows("GET", first.since)


def test_nothing_is_sent_twice_to_a_service_that_throttles() -> None:
    clock = Clock()
    hedging = Hedging(0.05, 1.0, clock)
    asked = Asked(clock.now)
    hedging.enter(asked)
    hedging.answered(asked, 503)
    assert hedging.patience("GET") == 0.05
    hedging.throttled()
    clock.now += 4.9
    assert not hedging.allows("GET", clock.now - 4)
    clock.now += 0.2
    assert hedging.allows("GET", clock.now - 4)


def test_a_body_drips_only_compared_with_others() -> None:
    clock = Clock()
    hedging = Hedging(None, 0.02, clock)
    clock.now += 60
    assert not hedging.allows_for_drip("GET", 8 * MiB, 1000, clock.now - 60), "nothing is known"
    for _ in range(20):
        hedging.received(8 * MiB, 0.8)  # 0.1 s for each MiB
    assert hedging.keeps_pace(8 * MiB, 2 * MiB, 1.0)
    assert not hedging.allows_for_drip("GET", 8 * MiB, 1000, clock.now - 0.9)
    assert hedging.allows_for_drip("GET", 8 * MiB, 1000, clock.now - 5)


def test_each_service_and_setting_has_its_own() -> None:
    auto = TransferConfig(hedge_after="auto")
    assert hedging_for("https", "a", auto) is hedging_for("https", "a", TransferConfig(hedge_after="auto"))
    assert hedging_for("https", "a", auto) is not hedging_for("https", "b", auto)
    assert hedging_for("https", "a", auto) is not hedging_for("https", "a", TransferConfig(hedge_after=1.0))


@pytest.mark.parametrize("setting", [{"hedge_after": None}, {"hedge_after": "auto", "hedge_budget": 0}])
def test_it_can_be_turned_off(setting: dict[str, object]) -> None:
    assert hedging_for("https", "a", TransferConfig(**setting)) is None  # type: ignore[arg-type]
