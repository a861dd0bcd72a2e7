"""The engine: no more threads than allowed, a budget that is kept, waits that end."""

from __future__ import annotations

import gc
import queue
import random
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from azstoragetorch._engine.budget import Budget, BufferPool, Loan
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._engine.threads import Engine, engine_for
from tests.support import (
    collect_garbage,
    in_time,
    interrupted_once,
    run_python,
    run_threads,
    taking,
    wait_until,
    watch_peak,
)


def thread_count() -> int:
    """Threads of this process, including those that `threading` does not know."""
    return len(list(Path("/proc/self/task").iterdir()))


def run_all(engine: Engine, tasks: Sequence[Callable[[Scope], None]], at_most: int, scope: Scope | None = None) -> None:
    engine.map(lambda task, inner: task(inner), tasks, at_most, scope)


def run_at_once(engine: Engine, count: int) -> None:
    """Return when *count* tasks, which wait for each other, have run."""
    together = threading.Barrier(count + 1)
    for _ in range(count):
        engine.submit(lambda: together.wait(60))
    together.wait(60)


class _Halt:
    """A place in the code where the first thread that comes there, once this is armed, waits."""

    def __init__(self) -> None:
        self.is_armed = False
        self._arrived, self._gate = threading.Event(), threading.Event()

    def here(self, *, when: bool) -> None:
        if when and self.is_armed:
            self._arrived.set()
            assert self._gate.wait(60)

    def wait(self) -> None:
        assert self._arrived.wait(60)

    def go_on(self) -> None:
        self._gate.set()


class TestThreads:
    @pytest.mark.parametrize("limit", [1, 2, 8])
    def test_as_many_tasks_run_at_once_as_there_may_be_threads(self, limit: int) -> None:
        """An idle thread is never counted twice, so no task waits while another thread is allowed."""
        engine = Engine(limit, MiB)
        for _ in range(300):
            run_at_once(engine, limit)

    @pytest.mark.parametrize("is_counted_on", [False, True])
    def test_a_task_that_counts_on_a_thread_that_takes_another_gets_one_of_its_own(self, is_counted_on: bool) -> None:
        """It is submitted just after a resting thread has taken a task, as by a finalizer in that thread."""
        meanwhile: deque[Callable[[], object]] = deque()

        class Tasks(queue.SimpleQueue[tuple[Callable[[], object], bool]]):
            def get(self, block: bool = True, timeout: float | None = None) -> tuple[Callable[[], object], bool]:
                task = super().get(block, timeout)
                meanwhile.popleft()() if meanwhile else None
                return task

        engine = Engine(3, MiB)
        engine._tasks = Tasks()
        engine.submit(int)
        wait_until(lambda: len(engine._resting) == 1)
        gate, ran = threading.Event(), threading.Event()
        meanwhile.append(lambda: engine.submit(ran.set))
        if is_counted_on:
            engine.submit(gate.wait)
        else:
            engine._tasks.put((gate.wait, False))  # by a submitter that looked before the thread rested
        assert ran.wait(60)
        gate.set()
        for _ in range(10):  # no task counts on a thread that does not exist
            run_at_once(engine, 3)

    def test_a_task_that_counts_on_a_thread_that_ends_is_run(self) -> None:
        """One of two threads takes a task, the other one ends, and a third task counts on one of them."""
        takes, ends, puts = (_Halt() for _ in range(3))
        has_looked = threading.Event()

        class Tasks(queue.SimpleQueue[Any]):
            def get(self, block: bool = True, timeout: float | None = None) -> Any:
                task = super().get(block, timeout)
                if task is None:
                    raise queue.Empty  # it has waited for long
                takes.here(when=not task[1])
                return task

            def put(self, task: Any, *_: Any) -> None:
                puts.here(when=task is not None and task[1])
                super().put(task)

            def empty(self) -> bool:
                has_looked.set()
                return super().empty()

        class Permits(dict[Any, None]):
            def pop(self, key: Any, *default: Any) -> None:
                ends.here(when=bool(default))
                super().pop(key, *default)

        engine = Engine(2, MiB)
        engine._tasks, engine._permits = Tasks(), Permits()
        together, gate, ran = threading.Barrier(2), threading.Event(), threading.Event()
        for _ in range(2):
            engine.submit(lambda: together.wait(60))
        wait_until(lambda: len(engine._resting) == 2)
        takes.is_armed = ends.is_armed = puts.is_armed = True
        engine._tasks.put((lambda: gate.wait(300), False))  # by a submitter that looked before the threads rested
        takes.wait()
        engine._tasks.put(None)
        ends.wait()
        submitter = threading.Thread(target=engine.submit, args=(ran.set,))
        submitter.start()
        puts.wait()
        takes.go_on()
        wait_until(lambda: bool(engine._owed))
        ends.go_on()
        assert has_looked.wait(60)
        puts.go_on()
        submitter.join(60)
        try:
            assert ran.wait(60)
        finally:
            gate.set()

    def test_no_task_counts_on_a_thread_that_does_not_exist(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the order in which the threads switch."""
        monkeypatch.setattr("azstoragetorch._engine.threads._IDLE_THREAD_SECONDS", 0.02)
        engine, interval = Engine(8, MiB), sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(5000):
                engine.map(lambda _item, _scope: None, range(4), 4)
        finally:
            sys.setswitchinterval(interval)
        wait_until(lambda: not engine._permits)  # all threads have ended
        assert not engine._resting
        run_at_once(engine, 8)

    def test_no_more_threads_than_allowed(self) -> None:
        engine = Engine(3, MiB)
        lock, names = threading.Lock(), set()
        done = threading.Semaphore(0)

        def task() -> None:
            with lock:
                names.add(threading.get_ident())
            time.sleep(0.001)
            done.release()

        for _ in range(100):
            engine.submit(task)
        for _ in range(100):
            assert done.acquire(timeout=240)
        assert len(names) <= 3

    def test_none_before_the_first_task(self) -> None:
        before = thread_count()
        Engine(8, MiB)
        assert thread_count() == before

    def test_submitting_from_many_threads_loses_nothing(self) -> None:
        engine = Engine(4, MiB)
        done = threading.Semaphore(0)
        run_threads(8, lambda _: [engine.submit(done.release) for _ in range(200)])
        for _ in range(1600):
            assert done.acquire(timeout=240)

    def test_idle_threads_end_and_come_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("azstoragetorch._engine.threads._IDLE_THREAD_SECONDS", 0.02)
        engine = Engine(4, MiB)
        before = thread_count()
        for _ in range(5):
            run_at_once(engine, 4)
            wait_until(lambda: thread_count() <= before)

    def test_work_continues_where_no_thread_can_be_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As at interpreter exit, or at the limit of the system: the caller does the work."""

        def refuse(*_arguments: object) -> None:
            raise RuntimeError("can't start new thread")

        engine = Engine(4, MiB)
        done: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr("azstoragetorch._engine.threads._thread.start_new_thread", refuse)
            engine.submit(lambda: done.append(0))
            run_all(engine, [lambda _: done.append(1), lambda _: done.append(2)], 4)
            assert done == [0, 1, 2]
        run_at_once(engine, 4)

    def test_an_engine_is_shared_by_all_with_the_same_limits(self) -> None:
        one = engine_for(TransferConfig(max_connections=3, memory_limit=7 * MiB))
        assert engine_for(TransferConfig(max_connections=3, memory_limit=7 * MiB, part_size=MiB)) is one
        assert engine_for(TransferConfig(max_connections=4, memory_limit=7 * MiB)) is not one


class TestRunAll:
    def test_every_task_runs_once_and_not_too_many_at_a_time(self) -> None:
        engine = Engine(8, MiB)
        lock, running, peak, done = threading.Lock(), 0, 0, []

        def task(number: int) -> Callable[[Scope], None]:
            def run(_scope: Scope) -> None:
                nonlocal running, peak
                with lock:
                    running += 1
                    peak = max(peak, running)
                time.sleep(0.002)
                with lock:
                    running -= 1
                    done.append(number)

            return run

        run_all(engine, [task(number) for number in range(40)], 3)
        assert sorted(done) == list(range(40))
        assert peak == 3

    def test_nothing_to_do(self) -> None:
        run_all(Engine(1, MiB), [], 4)

    def test_the_caller_takes_part(self) -> None:
        """With every thread of the engine busy, a transfer continues."""
        engine = Engine(1, MiB)
        gate = threading.Event()
        engine.submit(lambda: gate.wait(60) and None)
        who: list[int] = []
        run_all(engine, [lambda _: who.append(threading.get_ident())] * 5, 4)
        assert who == [threading.get_ident()] * 5
        gate.set()

    def test_from_within_a_task(self) -> None:
        engine = Engine(2, MiB)
        done = []

        def outer(_scope: Scope) -> None:
            run_all(engine, [lambda _: run_all(engine, [lambda _: done.append(1)] * 3, 3)] * 3, 3)

        in_time(lambda: run_all(engine, [outer] * 4, 4))
        assert len(done) == 36

    def test_the_first_error_stops_the_rest_and_is_raised_when_all_have_ended(self) -> None:
        engine = Engine(4, MiB)
        ended, begun = [], []
        failing = threading.Event()

        def slow(scope: Scope) -> None:
            begun.append(1)
            failing.set()
            wait_until(lambda: scope.is_cancelled)
            time.sleep(0.05)
            ended.append(1)

        def fail(_scope: Scope) -> None:
            failing.wait(60)
            raise KeyError("first")

        with pytest.raises(KeyError, match="first"):
            run_all(engine, [slow, fail, *[slow] * 20], 2)
        assert len(ended) == len(begun) < 5

    def test_a_cancelled_scope_does_not_count_as_done(self) -> None:
        scope = Scope()
        scope.cancel()
        done: list[int] = []
        with pytest.raises(Cancelled):
            run_all(Engine(2, MiB), [lambda _: done.append(1)], 2, scope)
        assert done == []

    def test_cancelling_from_outside_ends_it(self) -> None:
        scope, inside = Scope(), threading.Event()

        def task(scope: Scope) -> None:
            inside.set()
            wait_until(lambda: scope.is_cancelled)
            scope.check()

        def cancel() -> None:
            inside.wait(60)
            scope.cancel()

        threading.Thread(target=cancel).start()
        with pytest.raises(Cancelled):
            run_all(Engine(2, MiB), [task] * 3, 2, scope)

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_helper_whose_turn_comes_late_holds_nothing(self, fails: bool) -> None:
        """The buffer of the caller can be resized, as after a read of a local file."""
        engine, busy = Engine(1, MiB), threading.Event()
        buffer = bytearray(b"abcd")

        def call(view: memoryview, _scope: Scope) -> None:
            view[:] = b"xy"
            if fails:
                raise ValueError("of the first")

        try:
            engine.submit(busy.wait)  # its only thread
            with pytest.raises(ValueError, match="of the first") if fails else nullcontext():
                engine.map(call, [memoryview(buffer)[:2], memoryview(buffer)[2:]], 8)
            buffer += b"e"
        finally:
            busy.set()

    def test_nothing_of_a_failed_transfer_stays_in_memory(self) -> None:
        class Payload:
            pass

        payload = Payload()
        gone = weakref.ref(payload)

        def fail(_scope: Scope, payload: Payload = payload) -> None:
            raise KeyError

        with pytest.raises(KeyError):
            run_all(Engine(2, MiB), [fail] * 2, 2)
        del payload, fail
        wait_until(lambda: gc.collect() >= 0 and gone() is None)

    def test_an_interrupted_transfer_leaves_no_reference_cycle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What its calls refer to is free at once, not when the collector comes."""

        class Payload:
            pass

        def interrupted(_task: object) -> None:
            raise KeyboardInterrupt

        def transfer() -> weakref.ref[Payload]:
            payload = Payload()
            with pytest.raises(KeyboardInterrupt):
                engine.map(lambda _item, _scope, _payload=payload: None, [1, 2], 2)  # type: ignore[misc]
            return weakref.ref(payload)

        engine = Engine(2, MiB)
        monkeypatch.setattr(engine, "submit", interrupted)
        gc.disable()
        try:
            assert transfer()() is None
        finally:
            gc.enable()


class TestScope:
    def test_cancelling_interrupts_what_is_held_and_nothing_else(self) -> None:
        interrupted = []

        scope = Scope()
        with scope.holding(lambda: interrupted.append("left")) as left:
            pass
        with scope.holding(lambda: interrupted.append("held")) as held:
            scope.cancel()
        assert interrupted == ["held"]
        assert (left.was_woken, held.was_woken) == (False, True)

    def test_nothing_begins_after(self) -> None:
        scope = Scope()
        scope.cancel()
        with pytest.raises(Cancelled), scope.holding(lambda: None):
            pytest.fail("began")
        with pytest.raises(Cancelled):
            scope.check()

    def test_a_pause_ends_with_the_scope(self) -> None:
        """A wait for the next attempt ends at once."""
        scope, pausing = Scope(), threading.Event()

        def pause() -> None:
            pausing.set()
            with pytest.raises(Cancelled), taking():
                scope.pause(60)

        def cancel() -> None:
            pausing.wait(60)
            time.sleep(0.05)
            scope.cancel()

        run_threads(2, lambda number: (pause, cancel)[number]())

    def test_a_pause_lasts_as_long_as_it_was_told(self) -> None:
        with taking(0.1):
            Scope().pause(0.1)


class TestBudget:
    def test_an_oversized_piece_goes_alone(self) -> None:
        budget = Budget(10)
        peak = watch_peak(budget)
        large = loan_of(budget, 25)
        assert budget.take(1) is None
        large.release()
        small = loan_of(budget, 1)
        assert budget.take(25) is None
        assert peak() == 25
        small.release()

    def test_small_pieces_after_large_ones_are_added_up(self) -> None:
        """The bound that spares adding up all loans knows each amount that was ever lent."""
        budget = Budget(100)
        loans = [loan_of(budget, 60), *(loan_of(budget, 1) for _ in range(40))]
        assert budget.take(1) is None
        loans.pop(0).release()
        loans += [loan_of(budget, 1) for _ in range(60)]
        assert budget.take(1) is None

    def test_first_come_first_served(self) -> None:
        """A large piece waits for earlier ones, not for later ones."""
        budget = Budget(10)
        first = budget.wait_for(6)
        order: list[int] = []

        def take(amount: int) -> None:
            with budget.wait_for(amount):
                order.append(amount)

        threads = []
        for amount in (10, 1, 2):
            threads.append(threading.Thread(target=take, args=(amount,), daemon=True))
            threads[-1].start()
            wait_until(lambda: len(budget._queue) == len(threads))
        assert order == []
        assert budget.take(1) is None
        first.release()
        for thread in threads:
            thread.join(240)
        assert order[0] == 10
        assert sorted(order) == [1, 2, 10]
        assert budget.in_flight == 0

    @given(st.integers(1, 50), st.lists(st.lists(st.integers(1, 60), max_size=8), min_size=1, max_size=6))
    @settings(max_examples=40, deadline=None)
    def test_it_is_never_exceeded_and_nobody_waits_forever(self, limit: int, amounts: list[list[int]]) -> None:
        budget = Budget(limit)
        peak = watch_peak(budget)
        lock, held, worst = threading.Lock(), [], 0

        def worker(number: int) -> None:
            nonlocal worst
            for amount in amounts[number]:
                loan = None if amount % 3 else budget.take(amount)
                loan = loan or budget.wait_for(amount)
                with lock:
                    held.append(amount)
                    if len(held) > 1:
                        worst = max(worst, sum(held))
                time.sleep(0)
                with lock:
                    held.remove(amount)
                loan.release()

        run_threads(len(amounts), worker)
        assert worst <= limit
        assert budget.in_flight == 0
        assert peak() <= max([limit, *[amount for row in amounts for amount in row]])

    def test_a_loan_gives_back_what_it_took_and_no_more(self) -> None:
        budget = Budget(10)
        first = loan_of(budget, 8)
        assert budget.take(8) is None
        assert (first.amount, budget.in_flight) == (8, 8)
        first.release()
        first.release()
        assert (first.amount, budget.in_flight) == (0, 0)

    def test_a_loan_that_shrinks_gives_back_the_rest(self) -> None:
        budget = Budget(10)
        loan = loan_of(budget, 8)
        loan.shrink(3)
        loan.shrink(5)
        assert (loan.amount, budget.in_flight) == (3, 3)
        other = loan_of(budget, 7)
        loan.release()
        loan.shrink(1)
        other.release()
        assert budget.in_flight == 0

    def test_a_loan_that_nothing_refers_to_is_given_back(self) -> None:
        """So an interrupt between borrowing and storing it loses nothing; also if another thread waits."""
        budget = Budget(10)
        loan = loan_of(budget, 8)
        assert budget.in_flight == 8
        del loan
        assert budget.in_flight == 0
        loan = loan_of(budget, 10)
        served = threading.Event()
        threading.Thread(target=lambda: [budget.wait_for(10), served.set()], daemon=True).start()
        wait_until(lambda: len(budget._queue) == 1)
        with taking():
            del loan
            assert served.wait(60)

    def test_an_interrupted_wait_leaves_no_trace(self) -> None:
        budget = Budget(1)
        loan = budget.wait_for(1)

        with pytest.raises(KeyboardInterrupt), interrupted_once(lambda: len(budget._queue) == 1):
            budget.wait_for(1)
        loan.release()
        assert budget.in_flight == 0
        assert budget.take(1) is not None


def loan_of(budget: Budget, amount: int) -> Loan:
    loan = budget.take(amount)
    assert loan is not None
    return loan


@dataclass(eq=False)
class Turn:
    """A thread that waits for *amount* bytes, and what it got."""

    amount: int
    thread: threading.Thread
    loans: list[Loan]


class BudgetMachine(RuleBasedStateMachine):
    """Any order of calls: never above the limit except for a single loan, first come first served, no lost wake-up."""

    held = Bundle("held")

    @initialize(limit=st.integers(1, 20))
    def begin(self, limit: int) -> None:
        self.budget = Budget(limit)
        self.taken: list[int] = []  # bytes in flight, according to the rules
        self.waiting: deque[Turn] = deque()
        self.loans: list[Loan] = []
        self.served: list[Turn] = []  # in the order in which the rules admit them

    def fits(self, amount: int) -> bool:
        return not self.taken or sum(self.taken) + amount <= self.budget.limit

    @rule(target=held, amount=st.integers(1, 30))
    def try_to_take(self, amount: int) -> Loan | None:
        may = not self.waiting and self.fits(amount)
        loan = self.budget.take(amount)
        assert (loan is not None) is may
        if loan is not None:
            self.taken.append(amount)
            self.loans.append(loan)
        return loan

    @rule(amount=st.integers(1, 30))
    def borrow_and_give_back(self, amount: int) -> None:
        loan = self.budget.take(amount)
        assert (loan is not None) is (not self.waiting and self.fits(amount))
        if loan is not None:
            loan.release()

    @rule(amount=st.integers(1, 30))
    def wait_for(self, amount: int) -> None:
        loans: list[Loan] = []
        thread = threading.Thread(target=lambda: loans.append(self.budget.wait_for(amount)), daemon=True)
        turn = Turn(amount, thread, loans)
        queued = len(self.budget._queue)
        thread.start()
        if not self.waiting and self.fits(amount):
            self.taken.append(amount)
            self.served.append(turn)
            thread.join(240)
        else:
            self.waiting.append(turn)
            wait_until(lambda: len(self.budget._queue) == queued + 1)

    @rule(loan=consumes(held))
    def give_back(self, loan: Loan | None) -> None:
        if loan is not None:
            self.release(loan)

    @rule()
    def the_first_that_waited_gives_back(self) -> None:
        if self.served:
            turn = self.served.pop(0)
            turn.thread.join(240)
            self.release(turn.loans.pop())

    def release(self, loan: Loan) -> None:
        self.taken.remove(loan.amount)
        loan.release()
        while self.waiting and self.fits(self.waiting[0].amount):
            self.taken.append(self.waiting[0].amount)
            self.served.append(self.waiting.popleft())

    @invariant()
    def those_whose_turn_it_is_have_theirs(self) -> None:
        if hasattr(self, "budget"):
            for turn in self.served:
                turn.thread.join(240)
                assert not turn.thread.is_alive()
            assert all(turn.thread.is_alive() for turn in self.waiting)
            # A thread that waits looks again now and then, and for that moment its loan counts.
            wait_until(lambda: self.budget.in_flight == sum(self.taken))
            assert sum(self.taken) <= self.budget.limit or len(self.taken) == 1

    def teardown(self) -> None:
        if hasattr(self, "budget"):
            for loan in self.loans:
                if loan.amount:
                    self.release(loan)
            while self.served:
                self.the_first_that_waited_gives_back()
            assert not self.waiting
            assert self.budget.in_flight == 0


TestBudgetMachine = BudgetMachine.TestCase
TestBudgetMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


class TestBuffers:
    def test_a_returned_buffer_is_used_again(self) -> None:
        pool = BufferPool(64 * MiB)
        first = pool.take(4 * MiB)
        first[:5] = b"hello"
        pool.give_back(first)
        assert pool.take(4 * MiB)[:5] == b"hello"
        assert pool.take(4 * MiB)[:5] != b"hello"

    def test_sizes_are_exact(self) -> None:
        pool = BufferPool(64 * MiB)
        for size in (1, 100, 2 * MiB, 3 * MiB + 1):
            buffer = pool.take(size)
            assert (buffer.nbytes, buffer.format, buffer.readonly) == (size, "B", False)

    def test_no_more_is_kept_than_may_be_in_flight(self) -> None:
        """Idle buffers use memory too."""
        engine = Engine(1, 8 * MiB)
        views = [engine.buffers.take(4 * MiB) for _ in range(5)]
        alive = [weakref.ref(view) for view in views]
        while views:
            engine.buffers.give_back(views.pop())
        collect_garbage()
        assert sum(view() is not None for view in alive) == 2


PROGRAM = """
import random, signal, sys, threading, time
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import Engine

engine = Engine(4, 1 << 20)
running = set()

def task(scope):
    if threading.current_thread() is threading.main_thread():
        time.sleep(0.001)
        return
    running.add(threading.get_ident())
    try:
        for _ in range(3):
            time.sleep(0.0003)
            scope.check()
    finally:
        running.discard(threading.get_ident())

def interrupt(_signal, frame):
    while frame is not None and frame.f_code is not Engine.map.__code__:
        frame = frame.f_back
    if frame is not None:
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
randomness = random.Random(int(sys.argv[1]))
interrupted = 0
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    signal.setitimer(signal.ITIMER_REAL, randomness.uniform(0.0001, 0.004), randomness.uniform(0.0001, 0.001))
    try:
        engine.map(lambda task, scope: task(scope), [task] * 8, 4)
    except KeyboardInterrupt:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not running, "tasks still run in memory that the caller may free"
together = threading.Barrier(5)
for _ in range(4):
    engine.submit(lambda: together.wait(60))
together.wait(60)
print(interrupted)
"""


@pytest.mark.untraced
def test_interrupts_at_any_moment_leave_no_task_running_and_no_thread_stuck() -> None:
    """The calling thread gets many signals; each `map` returns or raises, and then none of its tasks runs."""
    assert int(run_python(PROGRAM, str(random.randrange(1 << 30)), "2", timeout=240)) > 20


@pytest.mark.skipif(not hasattr(sys, "setswitchinterval"), reason="CPython only")
def test_a_storm_of_small_transfers_from_many_threads() -> None:
    """No wake-up is lost if threads are switched at every opportunity."""
    engine = Engine(4, MiB)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        counts = run_threads(6, lambda _: [run_all(engine, [lambda _: None] * 5, 3) for _ in range(100)], 60)
    finally:
        sys.setswitchinterval(interval)
    assert [len(count) for count in counts] == [100] * 6
