"""How many requests of a transfer run at once if that is found: more where bandwidth rises, and no more elsewhere."""

from __future__ import annotations

import gc
import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from azstoragetorch import TransferConfig
from azstoragetorch._engine.growth import FIRST, Growth, Progress
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import Engine, engine_for
from tests.faults.faults import Match, Together
from tests.faults.service import FaultService
from tests.support import QUICK, blob_client, content, in_time, taking

MB = 1e6
PART = 8 * MB


class Transfer:
    """Something that makes calls."""


class Simulation:
    """A process whose transfers have as many calls in flight as `Growth` says.

    *rate_of* that number is the rate of all in bytes/s, and *busy_of* it is the number of threads that have something
    to decrypt.
    """

    def __init__(
        self,
        rate_of: Callable[[int], float],
        busy_of: Callable[[int], float] = lambda _count: 0.0,
        *,
        most: int = 64,
        cores: int = 2,
    ) -> None:
        self.rate_of = rate_of
        self.busy_of = busy_of
        self.now = self.moved = self.tls_seconds = 0.0
        self.growth = Growth(most, cores, lambda: self.now, lambda: Progress(self.moved, self.tls_seconds))
        self.limits = [self.growth.limit]
        """Each one that was in force, in order."""
        self.calls: dict[int, int] = {}
        """Calls that began, by the limit in force."""

    def slow_down(self) -> None:
        """From now on the network is the limit, and the machine has little to do."""
        self.rate_of, self.busy_of = each(60 * MB), ready(0.04)

    def transfer(self, parts: int, transfer: object = None) -> None:
        transfer = transfer or Transfer()
        self.growth.begin(transfer)
        ends: list[float] = []
        limit = self.growth.limit
        while parts or ends:
            while parts and len(ends) < limit:
                parts -= 1
                self.calls[limit] = self.calls.get(limit, 0) + 1
                heapq.heappush(ends, self.now + PART * limit / self.rate_of(limit))
            if not parts:
                self.growth.end(transfer)
            active, before, self.now = len(ends), self.now, heapq.heappop(ends)
            self.tls_seconds += self.busy_of(active) * (self.now - before)
            self.moved += PART
            limit = self.growth.called(transfer)
            if limit != self.limits[-1]:
                self.limits.append(limit)


def each(rate: float) -> Callable[[int], float]:
    """A service that limits each connection."""
    return lambda count: rate * count


def shared(rate: float, limit: float) -> Callable[[int], float]:
    """A network that limits all of them, and a service that limits each one."""
    return lambda count: min(rate * count, limit)


def test_it_grows_while_every_connection_adds_bandwidth() -> None:
    simulation = Simulation(each(60 * MB))
    for _ in range(3):
        simulation.transfer(300)
    assert simulation.limits == [16, 24, 36, 54, 64]


def test_reads_of_one_gib_suffice() -> None:
    simulation = Simulation(each(60 * MB))
    for _ in range(5):
        simulation.transfer(128)
    assert simulation.growth.limit == 54


def test_it_never_exceeds_the_connections() -> None:
    simulation = Simulation(each(60 * MB), most=20)
    simulation.transfer(1000)
    assert simulation.limits == [16, 20]
    assert Growth(4, 2, lambda: 0.0, Progress).limit == 4


def test_it_stays_where_the_network_is_full() -> None:
    """One experiment, whose requests are counted, and no other one within a minute."""
    simulation = Simulation(shared(60 * MB, 900 * MB))
    simulation.transfer(5000)
    assert simulation.now < 60
    assert simulation.limits == [16, 24, 16]
    assert 3 * 24 <= simulation.calls[24] <= 4 * 24


def test_it_ends_where_the_network_becomes_full() -> None:
    simulation = Simulation(shared(60 * MB, 2000 * MB))
    simulation.transfer(10_000)
    assert simulation.now < 60
    assert simulation.limits == [16, 24, 36, 54, 36]


def test_nothing_is_tried_while_connections_are_fast() -> None:
    """The limit is this machine then, and more threads would only cost."""
    simulation = Simulation(each(170 * MB))
    simulation.transfer(1000)
    assert simulation.limits == [16]


def test_a_failed_experiment_is_repeated_ever_more_rarely() -> None:
    simulation = Simulation(shared(60 * MB, 900 * MB))
    tried: list[float] = []
    while simulation.now < 1000:
        before = simulation.calls.get(24, 0)
        simulation.transfer(100)
        if simulation.calls.get(24, 0) > before:
            tried.append(simulation.now)
    first = [tried[0], *(at for earlier, at in pairwise(tried) if at - earlier > 10)]
    assert [round(b - a, -1) for a, b in pairwise(first)] == [60, 120, 240, 480]


def test_a_network_that_becomes_wider_is_noticed() -> None:
    simulation = Simulation(shared(60 * MB, 900 * MB))
    simulation.transfer(1000)
    assert simulation.growth.limit == 16
    simulation.rate_of = each(60 * MB)
    simulation.now += 61
    simulation.transfer(1000)
    assert simulation.growth.limit == 64


def machine(rate: float) -> Callable[[int], float]:
    """A machine that is the limit, whatever the number of requests."""
    return lambda _count: rate


def ready(share: float) -> Callable[[int], float]:
    """Each thread has something to decrypt for *share* of its time."""
    return lambda count: share * count


@pytest.mark.parametrize(
    ("cores", "limits"), [(1, [16, 5, 3]), (2, [16, 5, 3]), (3, [16, 8, 5, 4]), (64, [16, 10, 7, 6, 5])]
)
def test_fewer_suffice_where_the_machine_is_the_limit(cores: int, limits: list[int]) -> None:
    simulation = Simulation(machine(1000 * MB), ready(0.85), cores=cores)
    simulation.transfer(64)
    assert simulation.limits == limits
    simulation.transfer(500)
    assert simulation.limits == limits


def test_threads_that_wait_for_the_work_of_others_are_not_reduced() -> None:
    """A busy thread of the program holds the interpreter lock: fewer threads would get it even more rarely."""
    simulation = Simulation(machine(50 * MB), ready(0.98))
    simulation.transfer(200)
    assert simulation.growth.limit >= 16
    simulation.rate_of = machine(1000 * MB)
    simulation.transfer(200)
    assert simulation.growth.limit == 3


def test_the_number_rises_one_by_one_while_the_machine_decrypts() -> None:
    """With a few too many, threads wait for each other, and the number would swing between too few and too many."""
    simulation = Simulation(machine(1000 * MB), ready(0.85))
    simulation.transfer(200)
    assert simulation.limits == [16, 5, 3]
    simulation.busy_of = ready(0.18)
    simulation.transfer(200)
    assert simulation.limits == [16, 5, *range(3, 13)]


def test_a_network_that_becomes_the_limit_gets_all_of_them_soon() -> None:
    simulation = Simulation(machine(1000 * MB), ready(0.85))
    simulation.transfer(200)
    assert simulation.growth.limit == 3
    simulation.slow_down()
    simulation.transfer(60)
    assert simulation.growth.limit >= 16


def test_threads_that_wait_for_the_network_are_not_in_the_way() -> None:
    simulation = Simulation(each(60 * MB), ready(0.02))
    for _ in range(3):
        simulation.transfer(300)
    assert simulation.limits == [16, 24, 36, 54, 64]


def test_what_was_found_about_the_machine_is_forgotten() -> None:
    """The next transfer may be one from a slower service, and too short to be measured."""
    simulation = Simulation(machine(1000 * MB), ready(0.85))
    simulation.transfer(200)
    simulation.now += 9
    simulation.growth.begin(Transfer())
    assert simulation.growth.limit == 3
    simulation.now += 11
    simulation.growth.begin(Transfer())
    assert simulation.growth.limit == 16


@pytest.mark.parametrize("parts", [4, 7])
def test_short_transfers_do_not_keep_it(parts: int) -> None:
    """They are too short to find that threads wait for the network again."""
    simulation = Simulation(machine(1000 * MB), ready(0.85))
    simulation.transfer(200)
    simulation.slow_down()
    for _ in range(12):
        simulation.now += 1
        simulation.transfer(parts)
    assert simulation.growth.limit == 16


def test_a_long_transfer_without_tls_after_one_with_it() -> None:
    """A share that is halved again and again gets so small that a division by it overflows."""
    simulation = Simulation(machine(1000 * MB), ready(0.85))
    simulation.transfer(200)
    simulation.busy_of = ready(0.0)
    simulation.transfer(9000)
    assert simulation.growth.limit == 16


class Ended(Growth):
    """The measured transfer ends, on another thread, right after it was looked up."""

    _looked_up: weakref.ref[object] | None = None

    @property
    def _measured(self) -> weakref.ref[object] | None:
        found, self._looked_up = self._looked_up, None
        return found

    @_measured.setter
    def _measured(self, value: weakref.ref[object] | None) -> None:
        self._looked_up = value


@pytest.mark.parametrize("step", ["begin", "called", "end"])
def test_another_thread_ends_the_measured_transfer(step: str) -> None:
    growth, transfer = Ended(64, 2, lambda: 0.0, Progress), Transfer()
    growth.begin(transfer)
    getattr(growth, step)(transfer)
    assert growth.limit == 16


def test_short_transfers_change_nothing() -> None:
    """Their beginning and their end are most of them."""
    simulation = Simulation(each(60 * MB))
    for _ in range(100):
        simulation.transfer(3 * FIRST - 1)
    assert simulation.limits == [16]


def test_one_transfer_is_measured_at_a_time() -> None:
    growth = Growth(64, 2, lambda: 0.0, Progress)
    one, other = Transfer(), Transfer()
    growth.begin(one)
    growth.begin(other)
    assert [growth.called(other) for _ in range(1000)] == [16] * 1000
    assert growth._calls == 0
    del one  # it was interrupted, and has not ended
    growth.begin(other)
    growth.called(other)
    assert growth._calls == 1


class Scripted(Growth):
    """Has the test say how many run at once, and notes that a map was told."""

    limit = 0

    def __init__(self, first: int) -> None:
        super().__init__(64, 2, lambda: 0.0, Progress)
        self.limit = first
        self.told_three = threading.Event()

    def called(self, transfer: object) -> int:
        if self.limit == 3:
            self.told_three.set()
        return self.limit


def test_more_threads_join_a_map_and_leave_it() -> None:
    """Two calls at once, then five, then three."""
    engine, growth, lock = Engine(16, 1 << 20), Scripted(2), threading.Lock()
    two, five = threading.Barrier(2), threading.Barrier(5)
    active: list[int] = []
    peaks = {10: 0, 30: 0, 100: 0}

    def call(number: int, _scope: Scope) -> int:
        phase = next(end for end in peaks if number < end)
        with lock:
            active.append(phase)
            peaks[phase] = max(peaks[phase], active.count(phase) if number >= 35 or phase < 100 else 0)
        if number < 2:
            two.wait(60)
        elif number == 9:
            growth.limit = 5
        elif 20 <= number < 25:
            five.wait(60)
        elif number == 29:
            growth.limit = 3
        elif 30 <= number < 35:  # no more than these are drawn before the map is told
            growth.told_three.wait(60)
        elif number >= 35:
            time.sleep(0.002)  # others would run meanwhile
        with lock:
            active.remove(phase)
        return number

    assert in_time(lambda: engine.map(call, range(100), growth)) == list(range(100))
    assert peaks[10] == 2
    assert peaks[30] == 5
    assert peaks[100] <= 3


def test_only_a_transfer_that_always_has_something_to_request_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(64, 1 << 20)
    growth = engine.concurrency(TransferConfig())
    assert isinstance(growth, Growth)
    begun: list[object] = []
    monkeypatch.setattr(growth, "begin", begun.append)
    engine.map(lambda number, _scope: number, range(16), growth)
    engine.map(lambda number, _scope: number, iter(range(100)), growth)
    assert not begun
    engine.map(lambda number, _scope: number, range(17), growth)
    assert len(begun) == 1


def test_a_transfer_whose_error_is_kept_is_measured_no_longer() -> None:
    """The traceback of the error refers to the transfer."""
    engine = Engine(4, 1 << 20)
    growth = engine.concurrency(TransferConfig())
    assert isinstance(growth, Growth)
    with pytest.raises(ZeroDivisionError) as kept:
        engine.map(lambda number, _scope: 1 // (number - 5), range(40), growth)
    gc.collect()
    assert growth._measured is None
    assert kept.tb is not None


def test_a_number_means_this_number() -> None:
    transfer = TransferConfig(max_concurrency=7)
    assert engine_for(transfer).concurrency(transfer) == 7
    assert transfer.initial_concurrency == 7


def test_all_transfers_of_a_process_share_what_was_found() -> None:
    transfer = TransferConfig(max_connections=33)
    found = engine_for(transfer).concurrency(transfer)
    assert engine_for(replace(transfer, part_size=1 << 20)).concurrency(TransferConfig()) is found


def test_a_read_grows(fault_service: FaultService, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests are in flight as were found, and not more than there are connections."""
    data = content(200 * (64 << 10))
    fault_service.put("c", "blob", data)
    transfer = replace(QUICK, max_concurrency="auto", max_connections=30, memory_limit=64 << 20)
    engine = engine_for(transfer)
    ticks, counted = itertools.count(), itertools.count(step=1000)
    growth = Growth(30, 2, lambda: float(next(ticks)), lambda: Progress(float(next(counted)) ** 2))
    monkeypatch.setattr(engine, "_growth", growth)
    rule = fault_service.script(Match("get_blob", nth=50), [Together(24)] * 24)
    with taking():
        assert blob_client(fault_service.blob_url("c", "blob"), transfer).read()[0] == data
    assert rule.is_exhausted
    assert 24 <= fault_service.peak_active <= 30
