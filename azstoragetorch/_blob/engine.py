"""The one place that owns threads and memory in flight.

An engine has a few lazily started daemon threads, a byte budget and a pool of reusable buffers; all transfers of
a process with the same limits share one. Whoever waits for work also does work, so a transfer that is started
from within a transfer cannot starve. A child made by fork starts with none of its parent's engines.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol

from azstoragetorch._blob.config import TransferConfig
from azstoragetorch._blob.memory import new_buffer

_IDLE_BUFFER_BYTES = 256 << 20  # kept for reuse over all sizes; the rest goes back to the system
_IDLE_THREAD_SECONDS = 30.0


class Interruptible(Protocol):
    """Something that blocks and can be woken from another thread, such as a connection."""

    def interrupt(self) -> None:
        """Make whoever blocks on this fail at once."""
        ...


class Cancelled(Exception):  # noqa: N818 - control flow, never shown
    """Raised inside a transfer whose scope was cancelled."""


class Scope:
    """Transfers that are given up together: cancelling wakes every one that is blocked on its connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
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

    def cancel(self) -> None:
        """Give up: what is blocked fails at once, what has not begun never begins."""
        with self._lock:
            self.is_cancelled = True
            active = list(self._active)
        for resource in active:
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


class BufferPool:
    """Buffers that were paid for once: reusing one saves its page faults."""

    def __init__(self) -> None:
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
            if self._idle_bytes + size <= _IDLE_BUFFER_BYTES:
                self._idle_bytes += size
                self._idle.setdefault(size, []).append(buffer)


class Engine:
    """Threads, budget and buffers for transfers with one set of limits."""

    def __init__(self, threads: int, memory_limit: int) -> None:
        self.budget = Budget(memory_limit)
        self.buffers = BufferPool()
        self._limit = threads
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0

    def submit(self, task: Callable[[], None]) -> None:
        """Run *task*, which handles its own errors, on a thread of the engine."""
        with self._lock:
            self._tasks.put(task)
            if self._idle > 0:
                self._idle -= 1  # that thread will take it
            elif self._threads < self._limit:
                self._threads += 1
                # Daemon: at interpreter exit nothing here is worth waiting for, since only close() commits.
                threading.Thread(target=self._work, name="azstoragetorch", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                with self._lock:
                    self._idle += 1
                try:
                    task = self._tasks.get(timeout=_IDLE_THREAD_SECONDS)
                except queue.Empty:
                    with self._lock:
                        if self._idle > 0:  # otherwise a task was promised to an idle thread just now
                            self._idle -= 1
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
        batch = _Batch(tasks, scope or Scope())
        helpers = min(concurrency, len(tasks)) if isinstance(tasks, Sized) else concurrency
        for _ in range(helpers - 1):
            self.submit(batch.help)
        batch.run()


class _Batch:
    """Tasks that several threads take from one list."""

    def __init__(self, tasks: Iterable[Callable[[Scope], None]], scope: Scope) -> None:
        self._tasks = iter(tasks)
        self._scope = scope
        self._condition = threading.Condition()
        self._running = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        """The caller's share, and the wait for the rest."""
        try:
            self.help()
            with self._condition:
                while self._running:
                    self._condition.wait()
        except BaseException as error:
            self._fail(error)
            with self._condition:
                while self._running:
                    self._condition.wait()
            raise
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # a traceback that refers to itself would keep the memory of the tasks alive
        self._scope.check()  # cancelled from outside: what is left was not done

    def help(self) -> None:
        """Take tasks until none is left."""
        while True:
            with self._condition:
                task = None if self._scope.is_cancelled else next(self._tasks, None)
                if task is None:
                    return
                self._running += 1
            try:
                task(self._scope)
            except Cancelled as error:
                if self._error is None:
                    self._fail(error)
            except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
                self._fail(error)
            finally:
                del task
                with self._condition:
                    self._running -= 1
                    self._condition.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._condition:
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


def _forget_parent() -> None:
    global _engines_lock
    _engines.clear()
    _engines_lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
