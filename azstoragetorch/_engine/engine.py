"""The one place that owns threads and memory in flight.

An engine has a few lazily started daemon threads, a byte budget and a pool of reusable buffers; all transfers of
a process with the same limits share one. Whoever waits for work also does work, so a transfer that is started
from within a transfer cannot starve. A child made by fork starts with none of its parent's engines.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import Protocol

from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.memory import new_buffer

_IDLE_BUFFER_BYTES = 256 << 20  # kept for reuse over all sizes; the rest goes back to the system
_IDLE_THREAD_SECONDS = 30.0


class Interruptible(Protocol):
    """Something that blocks and can be woken from another thread, such as a connection."""

    def interrupt(self) -> None:
        """Make whoever blocks on this fail at once."""
        ...


class Cancelled(Exception):  # noqa: N818 - control flow, never shown
    """Raised inside a transfer whose scope was cancelled."""


class _Nap(threading.Event):
    """A wait that can be cut short."""

    interrupt = threading.Event.set


class Scope:
    """Transfers that are given up together: cancelling wakes every one that is blocked on its connection."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may cancel, and run where this thread holds the lock
        self._active: set[Interruptible] = set()
        self.is_cancelled = False

    @contextmanager
    def holding(self, resource: Interruptible) -> Iterator[None]:
        """While inside, `cancel` interrupts *resource*."""
        with self._lock:
            self.check()
            self._active.add(resource)
        try:
            yield
        finally:
            with self._lock:
                self._active.discard(resource)

    def check(self) -> None:
        """Raise `Cancelled` if the scope was cancelled."""
        if self.is_cancelled:
            raise Cancelled

    def pause(self, seconds: float) -> None:
        """Wait, unless the scope is cancelled.

        Raises:
            Cancelled: it was.
        """
        nap = _Nap()
        with self.holding(nap):
            nap.wait(seconds)
        self.check()

    def cancel(self) -> None:
        """Give up: what is blocked fails at once, what has not begun never begins."""
        if sys.is_finalizing():
            return  # threads that stand still for ever may hold the lock
        with self._lock:
            self.is_cancelled = True
            for resource in self._active:  # under the lock: after it they may serve another transfer
                resource.interrupt()


class Budget:
    """Bytes that may be in flight. First come, first served; one oversized piece is always admitted alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.peak = 0
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()

    def try_acquire(self, amount: int) -> bool:
        """Take *amount* bytes if that needs no waiting."""
        with self._lock:
            if self._waiting or not self._fits(amount):
                return False
            self._take(amount)
            return True

    def lend(self, amount: int, reservation: Reservation) -> bool:
        """Take *amount* bytes for *reservation* if that needs no waiting."""
        with self._lock:
            if self._waiting or not self._fits(amount):
                return False
            # No call between the two, so that no interrupt comes between them either.
            self.in_flight += amount
            reservation.amount = amount
            self.peak = max(self.peak, self.in_flight)
            return True

    def settle(self, reservation: Reservation) -> None:
        """Give back what *reservation* has."""
        with self._lock:
            amount = reservation.amount
            reservation.amount = 0
            self.in_flight -= amount
            self._admit()

    def acquire(self, amount: int) -> None:
        """Take *amount* bytes, waiting for others to give theirs back."""
        with self._lock:
            if not self._waiting and self._fits(amount):
                self._take(amount)
                return
            admitted = threading.Event()
            ticket = (amount, admitted)
            self._waiting.append(ticket)
        try:
            admitted.wait()
        except BaseException:
            with self._lock:
                if admitted.is_set():
                    self._give(amount)
                else:
                    self._waiting.remove(ticket)
                    self._admit()
            raise

    def release(self, amount: int) -> None:
        """Give *amount* bytes back."""
        with self._lock:
            self._give(amount)

    def _fits(self, amount: int) -> bool:
        return self.in_flight == 0 or self.in_flight + amount <= self.limit

    def _take(self, amount: int) -> None:
        self.in_flight += amount
        self.peak = max(self.peak, self.in_flight)

    def _give(self, amount: int) -> None:
        self.in_flight -= amount
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            amount, admitted = self._waiting.popleft()
            self._take(amount)
            admitted.set()


class Reservation:
    """Bytes of *budget* on loan: none at first, then what `take` got, until they are released."""

    __slots__ = ("_budget", "amount")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.amount = 0

    def take(self, amount: int) -> bool:
        """Borrow *amount* bytes if that needs no waiting. An interrupt leaves them taken and noted, or neither."""
        return self._budget.lend(amount, self)

    def release(self) -> None:
        """Give the bytes back; once is enough."""
        self._budget.settle(self)


class BufferPool:
    """Buffers that were paid for once: reusing one saves its page faults. Idle ones hold at most *limit* bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: dict[int, list[memoryview]] = {}
        self._idle_bytes = 0

    def take(self, size: int) -> memoryview:
        """A buffer of *size* bytes with arbitrary contents."""
        with self._lock:
            idle = self._idle.get(size)
            if idle:
                self._idle_bytes -= size
                return idle.pop()
        return new_buffer(size)

    def give_back(self, buffer: memoryview) -> None:
        """Hand a buffer back; the caller keeps no view of it."""
        size = buffer.nbytes
        with self._lock:
            if self._idle_bytes + size <= self._limit:
                self._idle_bytes += size
                self._idle.setdefault(size, []).append(buffer)


def start_thread(work: Callable[[], None]) -> bool:
    """Run *work* on a thread of its own; False where none can be made, at interpreter exit for example."""
    try:
        # Daemon: at interpreter exit nothing here is worth waiting for, since only close() commits.
        threading.Thread(target=work, name="azstoragetorch", daemon=True).start()
    except RuntimeError:
        return False
    return True


class Engine:
    """Threads, budget and buffers for transfers with one set of limits."""

    def __init__(self, threads: int, memory_limit: int) -> None:
        self.budget = Budget(memory_limit)
        self.buffers = BufferPool(min(memory_limit, _IDLE_BUFFER_BYTES))
        self._limit = threads
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = 0
        self._unfinished = 0  # submitted tasks that have not ended

    def submit(self, task: Callable[[], None]) -> None:
        """Run *task*, which handles its own errors, on a thread of the engine.

        Where no thread can be made it runs here.
        """
        is_alone = False
        with self._lock:
            self._unfinished += 1
            self._tasks.put(lambda: self._run(task))
            if self._unfinished > self._threads and self._threads < self._limit:
                if start_thread(self._work):
                    self._threads += 1
                else:
                    is_alone = self._threads == 0
        with suppress(queue.Empty):
            while is_alone:
                self._tasks.get_nowait()()

    def retire(self, cleanup: Callable[[], None]) -> None:
        """Run *cleanup* on a thread of the engine as soon as there is one; for finalizers, since it takes no lock."""
        self._tasks.put(cleanup)

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        finally:
            with self._lock:
                self._unfinished -= 1

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=_IDLE_THREAD_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._unfinished < self._threads:  # otherwise a task is on its way to this thread
                        self._threads -= 1
                        return
                continue
            task()
            del task

    def run_all(self, tasks: Iterable[Callable[[Scope], None]], concurrency: int, scope: Scope | None = None) -> None:
        """Run *tasks*, about in order, at most *concurrency* at once; return when none runs any more.

        A lazy iterable is drawn from as threads become free, by one thread at a time; it must not raise.

        The calling thread takes part. The first error, or an interrupt of the caller, cancels the rest and is
        raised after every task that had begun has ended: memory that the tasks use is free then.
        """
        helpers = (min(concurrency, len(tasks)) if isinstance(tasks, Sized) else concurrency) - 1
        _Batch(tasks, scope or Scope()).run(self, helpers)


class _Batch:
    """Tasks that several threads take from one list.

    The caller's thread may be interrupted between any two steps, so what it does to the books can be done twice and
    is made up for in `_settle`.
    """

    def __init__(self, tasks: Iterable[Callable[[Scope], None]], scope: Scope) -> None:
        self._tasks = iter(tasks)
        self._scope = scope
        self._lock = threading.Lock()  # not a Condition, which an interrupt can leave locked
        self._at_work: set[int] = set()  # threads that run a task
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()  # a token for each task that has ended
        self._error: BaseException | None = None
        self._interrupt: BaseException | None = None

    def run(self, engine: Engine, helpers: int) -> None:
        """The caller's share, and the wait for the rest."""
        try:
            try:
                for _ in range(helpers):
                    engine.submit(self.help)
                self.help()
            except BaseException as error:  # noqa: BLE001 - raised below
                self._interrupt = error
            try:
                self._settle()
            except BaseException:  # noqa: BLE001 - one that came in the middle of handling another
                self._settle()
            if self._interrupt is not None:
                raise self._interrupt
            if self._error is not None:
                raise self._error
            self._scope.check()  # cancelled from outside: what is left was not done
        finally:
            self._error = self._interrupt = None  # a traceback that refers to itself would keep the tasks' memory

    def _settle(self) -> None:
        """Return when no task runs, whatever interrupts the wait."""
        while True:
            try:
                if self._interrupt is not None:
                    self._fail(self._interrupt)
                self._at_work.discard(threading.get_ident())
                while self._at_work:
                    self._ended.get()
                return
            except BaseException as error:  # noqa: BLE001, PERF203 - raised by run
                self._interrupt = error

    def help(self) -> None:
        """Take tasks until none is left."""
        while True:
            with self._lock:
                task = None if self._scope.is_cancelled else next(self._tasks, None)
                if task is None:
                    return
                self._at_work.add(threading.get_ident())
            try:
                task(self._scope)
            except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
                self._fail(error)
            finally:
                del task
                self._at_work.discard(threading.get_ident())
                self._ended.put(None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None or isinstance(self._error, Cancelled):
                self._error = error
            self._tasks = iter(())
        self._scope.cancel()


_engines: dict[tuple[int, int], Engine] = {}
_engines_lock = threading.Lock()


def engine_for(config: TransferConfig) -> Engine:
    """The engine of this process for the limits of *config*."""
    key = (config.max_connections, config.memory_limit)
    with _engines_lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = Engine(*key)
        return engine


def running_engine(config: TransferConfig) -> Engine | None:
    """The engine that `engine_for` has given out, if it has; takes no lock."""
    return _engines.get((config.max_connections, config.memory_limit))


def _forget_parent() -> None:
    global _engines_lock
    _engines.clear()
    _engines_lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
