"""Interrupt an operation at every line of chosen modules: by an exception, by another operation, by the collector.

A signal handler and a finalizer run between any two steps of the code that they interrupt. `sweep` makes this happen
at each step, one at a time and in a fixed order, in this process and without signals:

    def set_up() -> State: ...                     # a fresh state, undisturbed
    def act(state: State) -> object: ...           # what is interrupted
    def check(state: State, run: Run) -> None: ... # what must hold after; asserts

    sweep(set_up, act, check, files=[azstoragetorch.io], do=interrupt)
    sweep(set_up, act, check, files=[azstoragetorch.io], do=lambda: other.read())
    sweep(set_up, act, check, files=[azstoragetorch.io], do=collecting(make_garbage))

One undisturbed run finds the places: each line of *files* that the calling thread reaches, and with ``after_calls`` the
moment after each call that such a line makes, where a signal that arrived during the call is handled. Then the
operation runs once for each place, with *do* carried out there. *do* is not traced itself. Other threads are never
interrupted, as by real signals. All places are visited before the failures are raised, with the first ones by name.

A sweep over many places takes minutes. Unless the environment variable ``SWEEP`` is ``all`` (`make exhaustive` sets
it), only every fifth one of them is visited, beginning with one that depends on the test's name: always the same ones.

An exception that *do* raises comes out of the interrupted line, like KeyboardInterrupt from a handler; `Run.error` is
what came out of *act*. A visit that takes over `limit` seconds fails as a hang, with the stack at that moment.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, TypeVar

import pytest

from tests.support import collect_garbage

S = TypeVar("S")
_SHOWN = 3  # failures that are shown in full
_FEW, _SHARE = 60, 5  # places of which all are visited; of more every fifth one is


@dataclass(frozen=True, slots=True)
class Place:
    """The *turn*-th time that *line* is reached (event ``line``), or that a call in it returns (``return``)."""

    code: CodeType
    line: int
    event: str
    turn: int

    def __str__(self) -> str:
        when = "before" if self.event == "line" else "after a call in"
        name = Path(self.code.co_filename).name
        return f"{when} {name}:{self.line} ({self.code.co_name}), time {self.turn}"


@dataclass(slots=True)
class Run:
    """One visit: whether the place was reached outside a finalizer, and what came out of *act*."""

    place: Place
    was_reached: bool = False
    result: Any = None
    error: BaseException | None = None


class Hang(BaseException):
    """Raised if a visit takes too long."""


def interrupt() -> None:
    """Interrupt as Ctrl-C does."""
    raise KeyboardInterrupt


def collecting(make_garbage: Callable[[], object]) -> Callable[[], None]:
    """Drop what *make_garbage* returns as part of a reference cycle, and run the collector."""

    def collect() -> None:
        cycle: list[object] = [make_garbage()]
        cycle.append(cycle)
        del cycle
        collect_garbage()

    return collect


def sweep(
    set_up: Callable[[], S],
    act: Callable[[S], object],
    check: Callable[[S, Run], None],
    *,
    files: Iterable[ModuleType | str | Path],
    do: Callable[[], object],
    turns: int = 2,
    after_calls: bool = True,
    limit: float = 120.0,  # a busy machine may take 20 s for what takes 0.1 s
) -> list[Run]:
    """Visit every place, the first *turns* times that it is reached; the runs, if *check* passed for all.

    Raises:
        AssertionError: *check* failed, *do* failed, or a visit took over *limit* seconds; names the places.
    """
    names = {str(file.__file__ if isinstance(file, ModuleType) else file) for file in files}
    tracer = _Tracer(names, turns, after_calls)
    collect_garbage()  # what other tests have dropped, so that no finalizer of it runs in a visit
    state = set_up()
    with tracer.on():
        act(state)
    del state
    assert tracer.found, f"no line of {sorted(names)} is reached by this thread"
    runs: list[Run] = []
    failures: list[tuple[Run, BaseException]] = []
    collect_garbage()
    gc.freeze()  # a collection at each place then visits only new objects
    try:
        for place in _chosen(tracer.found):
            run = Run(place)
            runs.append(run)
            try:
                _visit(set_up, act, check, _Tracer(names, turns, after_calls, run, do), limit)
            except (Exception, Hang, KeyboardInterrupt, pytest.fail.Exception) as error:  # noqa: BLE001 - raised below
                failures.append((run, error))
                if isinstance(error, Hang):
                    break  # the other places would hang as well
    finally:
        gc.unfreeze()
    assert not failures, _report(failures, len(runs))
    return runs


def _chosen(places: list[Place]) -> list[Place]:
    """The places to visit: all, or a share that does not change from run to run."""
    if len(places) <= _FEW or os.environ.get("SWEEP") == "all":
        return places
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    return places[zlib.crc32(test.encode()) % _SHARE :: _SHARE]


def _visit(
    set_up: Callable[[], S],
    act: Callable[[S], object],
    check: Callable[[S, Run], None],
    tracer: _Tracer,
    limit: float,
) -> None:
    state = set_up()
    run = tracer.run
    assert run is not None
    with _alarm(limit), _Unraisable(tracer) as unraisable:
        with tracer.on():
            next(_apart(act, state, run))
        if tracer.failure is not None:
            raise tracer.failure
        if tracer.raised is not None:
            # The error was handled: clear its frames, and those that it interrupted.
            tracer.raised.__traceback__ = tracer.raised.__context__ = None
        check(state, run)
        del state
    run.result = None
    if run.error is not None:
        run.error = run.error.with_traceback(None)
    assert not unraisable.seen, f"exceptions were ignored: {unraisable.seen}"


def _apart(act: Callable[[S], object], state: S, run: Run) -> Iterator[None]:
    """Run *act* in a generator, which has a record of its own of the exceptions that are being handled.

    Where a trace function raises at the first or last line of a handler, CPython 3.11 never takes the handled exception
    off that record: without this, every exception that a later test raises would have it as its context.
    """
    try:
        run.result = act(state)
    except Hang:
        raise
    except BaseException as error:  # noqa: BLE001 - looked at by check
        run.error = error
    yield


class _Tracer:
    """Counts the places of this thread, and acts at the one of *run*."""

    def __init__(
        self,
        files: set[str],
        turns: int,
        after_calls: bool,
        run: Run | None = None,
        do: Callable[[], object] | None = None,
    ) -> None:
        self.found: list[Place] = []
        self.run = run
        self.raised: BaseException | None = None  # what `do` raised on purpose
        self.failure: BaseException | None = None  # what `do` raised because it failed
        self._files = files
        self._turns = turns
        self._after_calls = after_calls
        self._do = do
        self._counts: Counter[tuple[CodeType, int, str]] = Counter()
        self._is_on = False
        # Kept here, since the interpreter goes on calling a function that it is told to drop during the call.
        self._callbacks = self._trace, self._line, self._profile

    def on(self) -> _Tracing:
        return _Tracing(self)

    def start(self) -> None:
        self._is_on = True
        if self._after_calls:
            sys.setprofile(self._callbacks[2])
        sys.settrace(self._callbacks[0])

    def stop(self) -> None:
        self._is_on = False
        sys.settrace(None)
        sys.setprofile(None)

    def _trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        return self._callbacks[1] if self._is_on and frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line" and self._is_on:
            self._reached(frame, "line")
        return self._callbacks[1]

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        # The return of a Python function counts for the line that called it; that of C is seen in the calling frame.
        caller = frame.f_back if event == "return" else frame if event == "c_return" else None
        if self._is_on and caller is not None and caller.f_code.co_filename in self._files:
            self._reached(caller, "return")

    def _reached(self, frame: FrameType, event: str) -> None:
        key = (frame.f_code, frame.f_lineno, event)
        self._counts[key] += 1
        place = Place(*key, self._counts[key])
        if self.run is None:
            if place.turn <= self._turns:
                self.found.append(place)
        elif place == self.run.place:
            self.run.was_reached = True
            self.stop()
            assert self._do is not None
            try:
                self._do()
            except (KeyboardInterrupt, SystemExit) as error:
                self.raised = error
                raise
            except Exception as error:
                self.failure = error
                raise


class _Tracing:
    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer

    def __enter__(self) -> None:
        self._before = sys.gettrace(), sys.getprofile()
        self._tracer.start()

    def __exit__(self, *_: object) -> None:
        self._tracer.stop()
        sys.settrace(self._before[0])
        sys.setprofile(self._before[1])


class _Unraisable:
    """Collects exceptions that finalizers raise, except the injected one."""

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer
        self.seen: list[str] = []

    def __enter__(self) -> _Unraisable:
        self._before = sys.unraisablehook
        sys.unraisablehook = self._note
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._before

    def _note(self, what: sys.UnraisableHookArgs) -> None:
        run = self._tracer.run
        if run is not None and what.exc_value is not None and what.exc_value is self._tracer.raised:
            run.was_reached = False  # it interrupted the finalizer, and nothing else
        else:
            self.seen.append(f"{what.err_msg or 'in'} {what.object!r}: {what.exc_value!r}")


class _alarm:  # noqa: N801 - used as a function
    """Raise `Hang` in the main thread after *seconds*; restore a timer that is already running."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        assert threading.current_thread() is threading.main_thread(), "interrupts come to the main thread"
        self._handler = signal.signal(signal.SIGALRM, self._ring)
        self._timer = signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, *self._timer)
        signal.signal(signal.SIGALRM, self._handler)

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        raise Hang(f"over {self._seconds:g} s; meanwhile in other threads:\n{_others()}")


def _others() -> str:
    """The innermost frames of the other threads, except those of test services, which wait for requests."""
    me = threading.get_ident()
    stacks = [traceback.format_stack(frame, limit=3) for key, frame in sys._current_frames().items() if key != me]
    return "\n".join("".join(stack) for stack in stacks if "/tests/" not in stack[-1])


def _report(failures: list[tuple[Run, BaseException]], count: int) -> str:
    lines = [f"{len(failures)} of {count} places failed:"]
    lines += [f"  {run.place}: {type(error).__name__}: {error}"[:300] for run, error in failures]
    for run, error in failures[:_SHOWN]:
        lines += ["", f"---- {run.place}; out of the operation came {run.error!r}"]
        lines += ["".join(traceback.format_exception(type(error), error, error.__traceback__))]
    return "\n".join(lines)
