"""Work on many blobs at once, results in order: what keeps datasets, pipes and nodes fed.

What is under way is bounded by the engine's byte budget and by a count, and never stuck: the next item always goes
ahead, even while others hold the whole budget.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Generic, TypeVar

from azstoragetorch._blob.engine import Budget, Engine, Scope
from azstoragetorch._blob.metrics import timed

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """One item and the work on it, which may be to come, under way, or done."""

    def __init__(self, item: T, work: Callable[[T], R], on_use: Callable[[], None]) -> None:
        self.item = item
        self._work = work
        self._on_use = on_use
        self._pid = os.getpid()
        self._claim = threading.Lock()  # held for good by whoever does the work
        self._future: Future[R] = Future()

    def run(self) -> None:
        """Do the work, unless somebody else does."""
        if self._claim.acquire(blocking=False):
            self._run()

    def begin(self, start: Callable[[T, Callable[[R], None], Callable[[], None]], bool], engine: Engine) -> None:
        """Have *start* do the work with nobody waiting for it; a thread of *engine* does it where that fails."""
        self._claim.acquire()
        try:
            is_begun = start(self.item, self._done, lambda: engine.submit(self._run))
        except Exception:  # noqa: BLE001 - the thread meets it again, and `result` raises it
            is_begun = False
        except BaseException:
            self._future.cancel()
            raise
        if not is_begun:
            self._claim.release()
            engine.submit(self.run)

    def result(self) -> R:
        """The result; the work is done here if it has not begun.

        Raises:
            BaseException: whatever the work raised.
        """
        self._on_use()
        with timed("blocked_seconds"):
            # After fork the thread that was at it is the parent's.
            if self._pid != os.getpid() or self._claim.acquire(blocking=False) or self._future.cancelled():
                self._future.cancel()
                return self._work(self.item)
            return self._future.result()

    def when_settled(self, action: Callable[[Future[R]], None]) -> None:
        """Call *action* when the work is done, or when it is sure that it will not be done ahead."""
        self._future.add_done_callback(action)

    def give_up(self) -> None:
        """Do not begin the work ahead, if it has not begun."""
        if self._claim.acquire(blocking=False):
            self._future.cancel()

    def _run(self) -> None:
        try:
            self._done(self._work(self.item))
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            with suppress(InvalidStateError):
                self._future.set_exception(error)

    def _done(self, result: R) -> None:
        with suppress(InvalidStateError):  # of no use any more: an interrupt has cancelled it
            self._future.set_result(result)


class OrderedPrefetch(Generic[T, R]):
    """Iterates over *items* in order, with the work on the next ones under way.

    Yields each item as an `Ahead`, whose ``result()`` returns or raises: what to do about an error is the consumer's.
    An error of *items* itself is raised after what came before it. Close it to give up what is under way.

    Args:
        engine: Runs the work and lends the bytes.
        items: Pulled lazily, in the consumer's thread.
        work: Called with an item and the scope of all, on a thread of the engine or of the consumer.
        cost: Bytes that the result of an item will hold, at most.
        size: Bytes that a result does hold.
        depth: Items under way at once, at most.
        is_eager: Begin at once with all. Otherwise what is under way grows with the results that are asked for and
            shrinks with those that are not: a consumer that never asks costs nothing.
        start: Tries to do the work of an item without a thread that waits; calls the first function with the result,
            or the second to have the work done in the ordinary way. False if it cannot.
    """

    def __init__(
        self,
        engine: Engine,
        items: Iterator[T],
        work: Callable[[T, Scope], R],
        *,
        cost: Callable[[T], int],
        size: Callable[[R], int],
        depth: int,
        is_eager: bool = True,
        start: Callable[[T, Scope, Callable[[R], None], Callable[[], None]], bool] | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._start = start
        self._engine = engine
        self._items = items
        self._work = work
        self._cost = cost
        self._size = size
        self._depth = depth
        self._is_eager = is_eager
        self._window = depth if is_eager else 0
        self._scope = Scope()
        self._queue: deque[tuple[Ahead[T, R], _Loan | None]] = deque()
        self._pulled: deque[T] = deque()  # at most one: pulled, but there was no room for it
        self._handed_out: _Loan | None = None
        self._is_unused = False  # what was handed out last
        self._source_error: BaseException | None = None
        self._is_exhausted = False

    def __iter__(self) -> OrderedPrefetch[T, R]:
        return self

    def __next__(self) -> Ahead[T, R]:
        self._settle()
        self._fill()
        if not self._queue:
            error, self._source_error = self._source_error, None
            if error is not None:
                raise error
            raise StopIteration
        ahead, self._handed_out = self._queue.popleft()
        self._is_unused = True
        return ahead

    def interrupt(self) -> None:
        """Make work under way fail with `Cancelled`, now and from now on. May be called from any thread."""
        self._scope.cancel()

    def close(self) -> None:
        """Give up what is under way and give its bytes back."""
        self._is_exhausted = True
        self._pulled.clear()
        self._scope.cancel()
        self._settle()
        while self._queue:
            ahead, self._handed_out = self._queue.popleft()
            ahead.give_up()
            self._settle()

    def abandon(self) -> None:
        """`close` on a thread of the engine: for finalizers, which may run where this thread holds any lock."""
        if self._pid == os.getpid():
            self._engine.retire(self.close)

    def _settle(self) -> None:
        """The consumer is through with what it was handed last."""
        loan, self._handed_out = self._handed_out, None
        if loan is not None:
            loan.end()
        if self._is_unused and not self._is_eager:
            self._window //= 4
        self._is_unused = False

    def _on_use(self) -> None:
        self._is_unused = False
        if self._window < self._depth:
            self._window = min(self._depth, max(4, self._window * 4))
            self._fill()

    def _fill(self) -> None:
        depth = max(1, self._window)
        while len(self._queue) < depth and (self._pulled or self._pull()):
            item = self._pulled[0]
            loan = None
            if self._window:
                cost = self._cost(item)
                if self._engine.budget.try_acquire(cost):
                    loan = _Loan(self._engine.budget, cost)
                elif self._queue:
                    return  # room comes when the items before are through
            self._pulled.popleft()
            ahead = Ahead(item, self._do, self._on_use)
            self._queue.append((ahead, loan))
            if loan is not None:
                ahead.when_settled(loan.shrink(self._size))
                if self._start is None:
                    self._engine.submit(ahead.run)
                else:
                    ahead.begin(self._begin, self._engine)

    def _begin(self, item: T, done: Callable[[R], None], failed: Callable[[], None]) -> bool:
        assert self._start is not None
        return self._start(item, self._scope, done, failed)

    def _do(self, item: T) -> R:
        return self._work(item, self._scope)

    def _pull(self) -> bool:
        if self._is_exhausted:
            return False
        try:
            self._pulled.append(next(self._items))
        except StopIteration:
            self._is_exhausted = True
        except BaseException as error:  # noqa: BLE001 - raised in its turn
            self._is_exhausted = True
            self._source_error = error
        return bool(self._pulled)


class _Loan:
    """Bytes of the budget, held from the beginning of the work until the consumer is through with the result."""

    def __init__(self, budget: Budget, amount: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._amount = amount
        self._is_settled = False
        self._is_ended = False

    def shrink(self, size: Callable[[R], int]) -> Callable[[Future[R]], None]:
        """What to call when the work is settled: keeps no more than the result holds."""

        def settle(future: Future[R]) -> None:
            has_result = not future.cancelled() and future.exception() is None
            keep = min(self._amount, size(future.result())) if has_result else 0
            with self._lock:
                self._is_settled = True
                surplus = self._amount - (0 if self._is_ended else keep)
                self._amount -= surplus
            self._budget.release(surplus)

        return settle

    def end(self) -> None:
        """The consumer is through: give back what is held, as soon as the work is settled."""
        with self._lock:
            self._is_ended = True
            amount = self._amount if self._is_settled else 0
            self._amount -= amount
        self._budget.release(amount)
