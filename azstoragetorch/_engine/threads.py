"""The only module that creates threads: an engine starts a few when there is work, and runs work on them.

`submit` takes no lock, so a signal handler can call it inside any other code, even inside `submit`. Tasks are in a
queue that allows this. Two things decide whether to start a thread. Each thread holds a permit, and ``_permits`` has
as many as there are threads. ``_resting`` has a token for each thread that waits for a task, minus one for each queued
task that counts on such a thread. Every task is run because of the order of steps: a thread that exits first returns
its permit and then looks for tasks once more, and a submitter enqueues its task before it looks whether one more thread
is permitted. So at least one of the two sees the other.

A waiting thread that gets a task which did not count on it takes a token back. There may be none: another task has
counted on this thread since it got its own. It then starts a thread in its place, and the token that it could not take
is a debt. The next token is not added, but pays the debt. So ``_resting`` minus ``_owed`` is always the number of
waiting threads minus that of the tasks that count on them, and no task counts on a thread that does not exist. If no
thread was permitted when a debt was entered, a waiting thread that would exit stays for it.

An interrupt between any two steps loses no task of another caller. The table has permits under weak references, so one
that an interrupted frame drops is not in it any more. A resting token that is lost keeps one waiting thread from
exiting, and lets one more start, if one is permitted. Only threads of the engine enter debts, and nothing interrupts
those.

Threads are started with ``_thread.start_new_thread``. `threading.Thread.start` holds a lock of its module while it
waits for the new thread, and a handler that runs at that moment would wait forever. The threads are like daemon
threads: the interpreter does not wait for them at exit, because only closing a writer commits.
"""

from __future__ import annotations

import _thread
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Generic, TypeVar

from azstoragetorch._engine.budget import Budget, BufferPool
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.growth import Growth
from azstoragetorch._engine.job import Bell
from azstoragetorch._engine.metrics import progress
from azstoragetorch._engine.process import PerProcess, here
from azstoragetorch._engine.scope import Cancelled, Scope

T = TypeVar("T")
R = TypeVar("R")

_IDLE_BUFFER_BYTES = 256 << 20  # kept for reuse over all sizes; the rest goes back to the system
_IDLE_THREAD_SECONDS = 30.0


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_thread(work: Callable[[], None]) -> bool:
    """Run *work* on a new thread; False where none can be made, at interpreter exit for example. Never waits."""
    try:
        _thread.start_new_thread(_run_traced, (work,))
    except RuntimeError:
        return False
    return True


def _run_traced(work: Callable[[], None]) -> None:
    # Coverage and debuggers install these through `threading`, which knows only the threads that it makes.
    if (trace := threading.gettrace()) is not None:
        sys.settrace(trace)
    if (profile := threading.getprofile()) is not None:
        sys.setprofile(profile)
    work()


def one_at_a_time() -> AbstractContextManager[bool]:
    """A context manager for code that the calls of one `Engine.map` enter one at a time.

    It is a lock, and cannot stop anything else: only those calls wait for it, nothing else waits for them, and what is
    inside waits for no other of them. A signal handler that interrupts one of them, and transfers, makes other calls,
    which its own thread makes if no other does. It is not for state that a handler or a finalizer needs as well.
    """
    return threading.Lock()


class _Permit:
    """Lets one thread exist. Whoever drops it gives it back."""

    __slots__ = ("__weakref__",)


class Engine:
    """Threads, budget and buffers for transfers with one set of limits."""

    def __init__(self, threads: int, memory_limit: int) -> None:
        self._process = here()
        self._memory_limit = memory_limit
        self.budget = Budget(memory_limit)
        self.buffers = BufferPool(min(memory_limit, _IDLE_BUFFER_BYTES))
        self._limit = threads
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], bool]] = queue.SimpleQueue()
        self._retired: deque[Callable[[], object]] = deque()
        self._permits: dict[weakref.ref[_Permit], None] = {}
        self._resting: deque[None] = deque()
        self._owed: deque[None] = deque()
        self._growth = Growth(threads, _usable_cores(), time.monotonic, progress)

    def concurrency(self, config: TransferConfig) -> int | Growth:
        """What `map` is to take as *at_most* for the requests of one transfer."""
        return self._growth if isinstance(config.max_concurrency, str) else config.max_concurrency

    def current(self) -> Engine:
        """This engine, or in a forked child the one of that process with the same limits."""
        return self if self._process is here() else _engine_with(self._limit, self._memory_limit)

    def submit(self, task: Callable[[], object]) -> None:
        """Run *task*, which handles its own errors, on a thread of the engine.

        Where no thread can be made it runs here.
        """
        if not self._put(task) and not self._permits:
            self._run_here()

    def retire(self, cleanup: Callable[[], object]) -> None:
        """Run *cleanup* soon on a thread of the engine. For finalizers: it never waits and runs nothing here."""
        self._retired.append(cleanup)
        self._put(self._clean_up)

    def map(
        self, function: Callable[[T, Scope], R], items: Iterable[T], at_most: int | Growth, scope: Scope | None = None
    ) -> list[R]:
        """Call *function* with each of *items* and a scope, at most *at_most* at once; the results, in order.

        With a `Growth`, the number changes meanwhile. A lazy iterable is drawn from as threads become free, by one
        thread at a time. The calling thread takes part.
        The first error, or an interrupt of the caller, cancels *scope*, which the calls get, and is raised when no call
        runs any more: the memory that they use is free then.

        Raises:
            Cancelled: *scope* was cancelled.
            BaseException: what a call, or *items*, raised first.
        """
        self._clean_up()
        limit = at_most if isinstance(at_most, int) else at_most.limit
        count = len(items) if isinstance(items, Sized) else limit
        growth = None if isinstance(at_most, int) or count <= limit else at_most  # as long as it always has an item
        return _Map(self, function, items, scope or Scope(), growth).run(min(limit, count))

    def _put(self, task: Callable[[], object]) -> bool:
        """Put *task* into the queue; False if it needs another thread, and none could be made."""
        is_counted_on = _took_one(self._resting)
        self._tasks.put((task, is_counted_on))
        return is_counted_on or self._start_thread()

    def _start_thread(self) -> bool:
        """Make a thread if one more is permitted; False if that failed."""
        permit = self._permit()
        return permit is None or start_thread(partial(self._work, permit))

    def _permit(self) -> _Permit | None:
        """A permit for one more thread; None if there are as many as are allowed."""
        while len(self._permits) < self._limit:
            permit = _Permit()
            self._permits[weakref.ref(permit, self._permits.pop)] = None
            if len(self._permits) <= self._limit:
                return permit
            del permit  # others have entered theirs at the same time: try again
        return None

    def _run_here(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._next(is_resting=False)()

    def _clean_up(self) -> None:
        with suppress(IndexError):
            while self._retired:
                self._retired.popleft()()

    def _next(self, *, is_resting: bool) -> Callable[[], object]:
        """The next task, waited for if this thread is resting."""
        if is_resting:
            task, is_counted_on = self._tasks.get(timeout=_IDLE_THREAD_SECONDS)
        else:
            task, is_counted_on = self._tasks.get_nowait()
        if is_counted_on and not is_resting:
            self._add_resting()  # the thread that it counted on keeps resting
        elif is_resting and not is_counted_on:
            if not _took_one(self._resting):
                self._owed.append(None)
                self._start_thread()
            elif not self._tasks.empty():  # the token may have been that of the thread that one of them counts on
                self._start_thread()
        return task

    def _add_resting(self) -> None:
        if not _took_one(self._owed):
            self._resting.append(None)

    def _work(self, permit: _Permit) -> None:
        """What a thread of the engine does: tasks, until none has come for a while."""
        held: _Permit | None = permit
        is_resting = False
        while held is not None:
            try:
                task = self._next(is_resting=is_resting)
            except queue.Empty:
                if is_resting:
                    held = self._renewed(held)
                else:
                    self._add_resting()
                is_resting = True
                continue
            is_resting = False
            task()
            del task  # it refers to memory that must not stay until the next one

    def _renewed(self, permit: _Permit) -> _Permit | None:
        """The permit of a thread that has rested for long; None if the thread goes away."""
        if not _took_one(self._resting):
            return permit  # a task that counts on it is about to be there
        self._permits.pop(weakref.ref(permit), None)
        another = None if self._tasks.empty() and not self._owed else self._permit()
        if another is not None:
            self._add_resting()
        return another


def _took_one(heap: deque[None]) -> bool:
    try:
        heap.pop()
    except IndexError:
        return False
    return True


class _Map(Generic[T, R]):
    """One `Engine.map`: calls that several threads take from one list.

    Every thread that takes part enters itself in ``_helpers`` before it looks whether the list is closed, and the
    caller closes the list before it looks whether somebody is left in there. So no call runs when the caller continues,
    and a helper whose turn comes too late takes nothing.

    One thread at a time draws from the list, since a generator cannot be entered twice.

    Interrupts may come one after the other. So a handler of one only remembers it: an interrupt that comes in a handler
    would skip the rest of it. The loop around it then does what is to be done, where the next interrupt is handled. The
    jump back of a loop is all that remains, and no handler covers it: an interrupt at exactly that instruction leaves
    the inner loop for that of `run`, a second one for its ``finally``, which waits once more.
    """

    def __init__(
        self,
        engine: Engine,
        function: Callable[[T, Scope], R],
        items: Iterable[T],
        scope: Scope,
        growth: Growth | None,
    ) -> None:
        self._engine = engine
        self._growth = growth
        self._wanted = 0  # threads that take part, the caller included
        self._function: Callable[[T, Scope], R] | None = function
        self._items: Iterator[tuple[int, T]] = enumerate(items)
        self._scope = scope
        self._drawing = one_at_a_time()
        self._is_closed = False
        self._helpers: set[object] = set()
        self._bell = Bell()
        self._results: dict[int, R] = {}
        self._errors: list[BaseException] = []

    def run(self, wanted: int) -> list[R]:
        """The caller's share, and the wait for the rest."""
        me, interrupt = object(), None
        self._wanted = wanted
        try:
            while True:
                try:
                    if interrupt is None:
                        self._begin(wanted, me)
                    else:
                        self._fail(interrupt)
                    interrupt = None  # its traceback refers to this frame
                    self._wait(me)
                    break
                except BaseException as error:  # noqa: BLE001 - an interrupt between two lines of these
                    interrupt = error
            if self._errors:
                raise self._first_error()  # in no variable: its traceback refers to this frame
            self._scope.check()  # cancelled from outside: what is left was not done
            return [self._results[number] for number in range(len(self._results))]
        finally:
            self._is_closed, interrupt = True, None
            if self._helpers:  # an interrupt came at the jump back of the loop, which no `try` covers
                self._scope.cancel()
                self._wait(me)
            if self._growth is not None:
                self._growth.end(self)  # which would go on measuring this while the traceback of an error is kept
            self._errors.clear()
            self._results = {}
            self._function = None
            self._items = iter(())  # a helper whose turn has not come refers to this, but not to the caller's memory

    def _begin(self, wanted: int, me: object) -> None:
        if self._growth is not None:
            self._growth.begin(self)
        for _ in range(wanted - 1):
            self._engine.submit(self._help)
        self._help(me)

    def _wait(self, me: object) -> None:
        """Return when no call runs, whatever interrupts the wait."""
        interrupt = None
        while True:
            try:
                if interrupt is not None:
                    self._fail(interrupt)
                    interrupt = None  # its traceback refers to this frame
                self._is_closed = True
                self._helpers.discard(me)
                self._bell.wait_until(lambda: not self._helpers)
                return
            except BaseException as error:  # noqa: BLE001, PERF203 - raised when no call runs any more
                interrupt = error

    def _first_error(self) -> BaseException:
        return next((error for error in self._errors if not isinstance(error, Cancelled)), self._errors[0])

    def _help(self, caller: object = None) -> None:
        """Make calls until none is left. A helper also leaves when too many take part; the *caller* stays."""
        me = caller or object()
        self._helpers.add(me)
        try:
            while (drawn := self._draw(None if caller else me)) is not None:
                number, item = drawn
                function = self._function
                assert function is not None
                self._results[number] = function(item, self._scope)
                del drawn, item
                if self._growth is not None:
                    self._grow(self._growth)
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            self._fail(error)
        finally:
            self._helpers.discard(me)
            self._bell.ring()

    def _draw(self, helper: object) -> tuple[int, T] | None:
        with self._drawing:
            if self._is_closed or self._scope.is_cancelled:
                return None
            if helper is not None and len(self._helpers) > self._wanted:
                self._helpers.discard(helper)
                return None
            drawn = next(self._items, None)
            if drawn is None and self._growth is not None:
                self._growth.end(self)
            return drawn

    def _grow(self, growth: Growth) -> None:
        """Have as many threads take part as `Growth` has found."""
        with self._drawing:
            added = growth.called(self) - self._wanted
            self._wanted += added
        for _ in range(added):
            self._engine.submit(self._help)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._is_closed = True
        self._scope.cancel()


_engines: PerProcess[dict[tuple[int, int], Engine]] = PerProcess(dict)


def engine_for(config: TransferConfig) -> Engine:
    """The engine of this process for the limits of *config*."""
    return _engine_with(config.max_connections, config.memory_limit)


def _engine_with(threads: int, memory_limit: int) -> Engine:
    engines = _engines.get()
    key = (threads, memory_limit)
    return engines.get(key) or engines.setdefault(key, Engine(threads, memory_limit))
