"""Work that is done once, by the first thread; others wait for it, and any thread can give it up."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from azstoragetorch._engine.job import Bell, IsStuck, Job
from azstoragetorch._engine.process import PerProcess, here
from azstoragetorch._engine.scope import Cancelled, Scope
from tests.support import collect_garbage, in_time, run_python, run_threads


class TestJob:
    def test_it_is_done_once_and_every_thread_has_the_result(self) -> None:
        for _ in range(200):
            done: list[int] = []
            job = Job(lambda done=done: [done.append(1), time.sleep(0), object()][-1])  # type: ignore[misc]
            results = run_threads(6, lambda number, job=job: job.result() if number else (job.run(), job.result())[1])  # type: ignore[misc]
            assert len(set(map(id, results))) == 1
            assert done == [1]

    def test_an_error_reaches_every_thread_that_asks(self) -> None:
        def fail() -> None:
            raise ValueError("broken")

        job = Job(fail)
        assert job.run()
        assert str(job.error) == "broken"
        for _ in range(2):
            with pytest.raises(ValueError, match="broken"):
                job.result()

    def test_what_was_given_up_never_begins(self) -> None:
        job: Job[None] = Job(lambda: pytest.fail("began"))
        assert job.give_up()
        assert not job.run()
        assert job.is_over
        with pytest.raises(RuntimeError, match="given up"):
            job.result()

    def test_giving_up_wakes_those_who_wait(self) -> None:
        begun, may_end = threading.Event(), threading.Event()
        job = Job(lambda: [begun.set(), may_end.wait(60)])
        threading.Thread(target=job.run, daemon=True).start()
        begun.wait(60)

        def wait() -> None:
            with pytest.raises(RuntimeError, match="given up"):
                job.result()

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        assert not job.give_up()
        waiting.join(240)
        assert not waiting.is_alive()
        may_end.set()

    def test_it_forgets_its_work_when_it_is_over(self) -> None:
        class Memory:
            pass

        memory = Memory()
        gone = weakref.ref(memory)
        job = Job(lambda memory=memory: None)  # type: ignore[misc]
        del memory
        job.run()
        assert gone() is None

    def test_a_thread_that_needs_what_it_does_itself_does_it_again(self) -> None:
        """A signal handler that interrupts the work, or a transform that needs its own batch."""
        calls: list[int] = []

        def work() -> int:
            calls.append(1)
            return job.result() + 1 if len(calls) == 1 else 5

        job = Job(work)
        assert in_time(job.result) == 6

    def test_an_interrupt_belongs_to_the_thread_that_it_hit(self) -> None:
        """Another thread that waits for the job does the work."""
        begun, may_end = threading.Event(), threading.Event()
        calls: list[int] = []

        def work() -> int:
            calls.append(1)
            if len(calls) == 1:
                begun.set()
                may_end.wait(60)
                raise KeyboardInterrupt
            return 7

        def act(number: int) -> None:
            if number:
                begun.wait(60)
                threading.Timer(0.05, may_end.set).start()
                assert job.result() == 7
            else:
                with pytest.raises(KeyboardInterrupt):
                    job.run()

        job = Job(work)
        run_threads(2, act)
        assert job.result() == 7

    def test_a_cancelled_job_ends_without_noise(self) -> None:
        def cancel() -> None:
            raise Cancelled

        job = Job(cancel)
        assert job.run()
        with pytest.raises(Cancelled):
            job.result()
        assert not isinstance(Cancelled(), Exception)


def keep(
    kept: list[tuple[Callable[[int], None], Callable[[], None]]],
    done: Callable[[int], None],
    failed: Callable[[], None],
    is_stuck: IsStuck = lambda: False,
) -> IsStuck:
    """Begin work that ends with a call of what is added to *kept*."""
    kept.append((done, failed))
    return is_stuck


class TestHandedOver:
    def test_the_result_comes_from_elsewhere(self) -> None:
        kept: list[Any] = []
        job: Job[int] = Job(lambda: pytest.fail("done here"))
        assert job.hand_over(partial(keep, kept))
        assert not job.run()
        threading.Timer(0.05, lambda: kept[0][0](7)).start()
        assert in_time(job.result) == 7

    def test_what_could_not_be_begun_stays_open(self) -> None:
        job = Job(lambda: 7)
        assert not job.hand_over(lambda _done, _failed: None)
        assert job.is_open
        assert job.result() == 7

    def test_what_failed_elsewhere_is_done_by_the_thread_that_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept: list[Any] = []
        job = Job(lambda: 7)
        assert job.hand_over(partial(keep, kept))
        threading.Timer(0.05, lambda: kept[0][1]()).start()
        monkeypatch.setattr("azstoragetorch._engine.job._LOOK_AGAIN", 600.0)  # it is told
        assert in_time(job.result) == 7

    def test_what_is_stuck_elsewhere_is_done_by_the_thread_that_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether it is stuck at the beginning or later; the result that comes after all changes nothing."""
        monkeypatch.setattr("azstoragetorch._engine.job._LOOK_AGAIN", 0.01)
        for states in ([True], [False, False, True]):
            kept: list[Any] = []
            later = iter(states)
            job = Job(lambda: 7)
            assert job.hand_over(partial(keep, kept, is_stuck=lambda later=later: next(later, True)))  # type: ignore[misc]
            assert in_time(job.result) == 7
            assert not job.run(), "it may still end where it was handed to"
            kept[0][0](8)
            assert job.result() == 8

    def test_one_report_counts(self) -> None:
        kept: list[Any] = []
        job = Job(lambda: 7)
        job.hand_over(partial(keep, kept))
        kept[0][1]()
        assert job.result() == 7
        kept[0][0](8)
        kept[0][1]()
        assert job.result() == 7
        assert not job.run()


def test_a_forked_child_does_what_a_thread_of_its_parent_had_started() -> None:
    """That thread does not exist in the child; the job of the parent is not affected."""
    program = """
import os, threading
from azstoragetorch._engine.job import Job
begun, may_end = threading.Event(), threading.Event()
job = Job(lambda: [begun.set(), os.getpid() == child or may_end.wait(60), os.getpid()][-1])
child = 0
threading.Thread(target=job.run).start()
begun.wait(60)
pid = os.fork()
if not pid:
    child = os.getpid()
    os._exit(job.result() != os.getpid())
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
may_end.set()
print(job.result() == os.getpid())
"""
    assert run_python(program, timeout=240).split() == ["0", "True"]


class TestBell:
    @pytest.fixture(autouse=True)
    def nobody_looks_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("azstoragetorch._engine.job._LOOK_AGAIN", 600.0)

    def test_every_thread_that_waits_is_woken(self) -> None:
        bell, state = Bell(), []

        def act(number: int) -> None:
            if number:
                assert bell.wait_until(lambda: state) == [1]
            else:
                time.sleep(0.1)
                state.append(1)
                bell.ring()

        run_threads(6, act)

    def test_no_ring_is_missed(self) -> None:
        """However ringing and falling asleep interleave: a missed one would be waited for forever."""
        bell, count = Bell(), []

        def act(number: int) -> None:
            for turn in range(500):
                if number:
                    bell.wait_until(lambda turn=turn: len(count) > turn)  # type: ignore[misc]
                else:
                    count.append(turn)
                    bell.ring()

        run_threads(4, act)


class TestScope:
    def test_a_child_ends_with_its_parent_and_not_the_other_way_round(self) -> None:
        outer = Scope()
        with outer.child() as first:
            first.cancel()
            assert not outer.is_cancelled
        with outer.child() as second:
            outer.cancel()
            assert second.is_cancelled
        with pytest.raises(Cancelled), outer.child():
            pytest.fail("began")

    def test_a_resource_is_either_left_or_woken(self) -> None:
        """In any interleaving of leave and cancel, the holder knows which one came first."""
        for _ in range(500):
            scope, woken = Scope(), []
            hold = scope.holding(lambda woken=woken: woken.append(1))  # type: ignore[misc]
            hold.__enter__()
            run_threads(2, lambda number, scope=scope, hold=hold: scope.cancel() if number else hold.leave())  # type: ignore[misc]
            assert bool(woken) is hold.was_woken


class TestPerProcess:
    def test_it_is_made_on_first_use_and_once(self) -> None:
        made: list[int] = []
        values = PerProcess(lambda: made.append(1) or object())  # type: ignore[func-returns-value]
        assert values.peek() is None
        assert values.get() is values.get() is values.peek()
        assert made == [1]
        assert values.forget() is not values.get()

    def test_threads_that_need_it_at_once_share_one(self) -> None:
        for _ in range(100):
            values = PerProcess(object)
            assert len(set(run_threads(4, lambda _, values=values: values.get()))) == 1  # type: ignore[misc]

    def test_a_forked_child_makes_its_own_and_drops_the_inherited(self) -> None:
        dropped: list[int] = []
        values = PerProcess(os.getpid, dropped.append)
        process, parent = here(), values.get()
        pid = os.fork()
        if not pid:
            is_right = here() is not process and dropped == [parent] and values.get() == os.getpid()
            os._exit(not is_right)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (values.get(), dropped, here()) == (parent, [], process)

    def test_it_does_not_keep_the_value_of_the_parent(self) -> None:
        values = PerProcess(object)
        gone = weakref.ref(values)
        values.get()
        del values
        collect_garbage()
        assert gone() is None
