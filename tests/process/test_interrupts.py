"""`sweep` finds the defects that it is for."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.process.interrupts import Place, Run, collecting, interrupt, sweep
from tests.support import collect_garbage

ACCOUNTS = """
import threading

class Careless:
    def __init__(self):
        self.lock = threading.Lock()
        self.held = 0

    def use(self):
        self.lock.acquire()
        self.held += 1
        self.work()
        self.held -= 1
        self.lock.release()

    def work(self):
        for _ in range(5):
            pass

class Careful(Careless):
    def use(self):
        self.work()
        self.held += 0

    def enter_twice(self):
        raise RuntimeError("entered twice")

    def work_long(self):
        for _ in range(60):
            pass
"""


@pytest.fixture
def accounts(tmp_path: Path) -> Any:
    path = tmp_path / "accounts.py"
    path.write_text(ACCOUNTS)
    module = ModuleType("accounts")
    module.__file__ = str(path)
    exec(compile(ACCOUNTS, str(path), "exec"), vars(module))
    return module


def check_free(account: Any, run: Run) -> None:
    assert isinstance(run.error, KeyboardInterrupt)
    assert not account.lock.locked()
    assert account.held == 0


def test_what_an_interrupt_leaves_behind_is_found(accounts: Any) -> None:
    """The failure names the line, and whether a call in it had returned."""
    with pytest.raises(AssertionError, match=r"places failed(.|\n)*after a call in accounts.py:10 \(use\), time 1"):
        sweep(accounts.Careless, accounts.Careless.use, check_free, files=[accounts], do=interrupt)


def test_code_that_is_prepared_passes(accounts: Any) -> None:
    runs = sweep(accounts.Careful, accounts.Careful.use, check_free, files=[accounts], do=interrupt)
    assert {run.place.code.co_name for run in runs} == {"use", "work"}
    assert all(run.was_reached for run in runs)


def test_every_line_is_visited_as_often_as_asked(accounts: Any) -> None:
    for turns in (1, 3):
        runs = sweep(accounts.Careful, accounts.Careful.work, check_free, files=[accounts], do=interrupt, turns=turns)
        seen = [run.place.turn for run in runs if run.place.line == 18]
        assert seen == list(range(1, turns + 1))


def test_a_share_of_many_places_is_visited_or_all(accounts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def visited() -> list[Place]:
        runs = sweep(
            accounts.Careful, accounts.Careful.work_long, check_free, files=[accounts], do=interrupt, turns=100
        )
        return [run.place for run in runs]

    monkeypatch.setenv("SWEEP", "all")
    every = visited()
    assert len(every) > 120  # the loop has two lines
    monkeypatch.delenv("SWEEP")
    some = visited()
    assert some in [every[first::5] for first in range(5)]
    assert visited() == some


def test_a_hang_is_a_failure_with_its_place(accounts: Any) -> None:
    with pytest.raises(AssertionError, match=r"1 of 1 places failed(.|\n)*accounts.py:10(.|\n)*Hang"):
        sweep(
            accounts.Careless,
            accounts.Careless.use,
            lambda *_: None,
            files=[accounts],
            do=threading.Event().wait,
            limit=0.2,
        )


def test_what_a_nested_operation_or_a_finalizer_raises_is_a_failure(accounts: Any) -> None:
    class Loud:
        def __del__(self) -> None:
            raise ValueError("dropped")

    account = accounts.Careful()
    for do, message in ((account.enter_twice, "entered twice"), (collecting(Loud), "dropped")):
        with pytest.raises(AssertionError, match=message):
            sweep(lambda: account, accounts.Careful.use, lambda *_: None, files=[accounts], do=do)


def test_other_threads_run_undisturbed(accounts: Any) -> None:
    def act(account: Any) -> None:
        thread = threading.Thread(target=account.use)
        thread.start()
        thread.join()
        account.work()

    runs = sweep(accounts.Careful, act, check_free, files=[accounts], do=interrupt)
    assert {run.place.code.co_name for run in runs} == {"work"}


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


class _Slow:
    """Garbage with a finalizer that waits."""

    def __init__(self, inside: threading.Event, leave: threading.Event) -> None:
        self.itself = self
        self.inside = inside
        self.leave = leave

    def __del__(self) -> None:
        self.inside.set()
        self.leave.wait()


def test_garbage_is_collected_although_another_thread_is_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave = threading.Event(), threading.Event()
    original = gc.collect

    def other() -> None:
        _Slow(inside, leave)
        original()

    def collect() -> int:
        found = original()
        leave.set()  # not before the first attempt, which finds the other thread at work
        return found

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    cycle = _Cycle()
    monkeypatch.setattr(gc, "collect", collect)
    garbage = weakref.ref(cycle)
    del cycle
    collect_garbage()
    assert garbage() is None
    thread.join()
