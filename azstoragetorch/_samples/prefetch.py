"""Work on many blobs at once, results in order: what keeps datasets, pipes and nodes fed.

What is under way is bounded by the engine's byte budget and by a count, and never stuck: the next item always goes
ahead, even while others hold the whole budget.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from azstoragetorch._engine.engine import Budget, Engine, Scope
from azstoragetorch._engine.metrics import timed

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """One item and the work on it, which may be to come, under way, or done.

    There are many and they are short-lived, so it is locks that say how far it is: a Future costs more than its read.
    """

    def __init__(
        self, item: T, work: Callable[[T], R], on_use: Callable[[], None], loan: Loan[R] | None = None
    ) -> None:
        self.item = item
        self.loan = loan
        self._work = work
        self._on_use = on_use
        self._pid = os.getpid()
        self._claim = threading.Lock()  # held for good by whoever does the work
        self._end = threading.Lock()  # held for good by whoever says how it ended
        self._under_way = threading.Lock()
        self._under_way.acquire()
        self._is_given_up = False
        self._result: R | None = None
        self._error: BaseException | None = None

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
            self._give_up()
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
        # After fork the thread that was at it is the parent's.
        if self._pid != os.getpid() or self._claim.acquire(blocking=False) or self._is_given_up:
            self._give_up()
            with timed("blocked_seconds"):
                return self._work(self.item)
        if self._under_way.locked():
            with timed("blocked_seconds"), self._under_way:
                pass
        if self._error is not None:
            self._is_given_up = True  # whoever asks again has it tried again
            try:
                raise self._error
            finally:
                self._error = None  # its traceback may refer to this, and a circle would keep the bytes of all items
        return self._result  # type: ignore[return-value]  # there is one

    def give_up(self) -> None:
        """Do not begin the work ahead, if it has not begun."""
        if self._claim.acquire(blocking=False):
            self._give_up()

    def _give_up(self) -> None:
        self._is_given_up = True
        if self._end.acquire(blocking=False) and self.loan is not None:
            self.loan.settle(None)

    def _run(self) -> None:
        try:
            result = self._work(self.item)
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            if self._end.acquire(blocking=False):
                self._error = error
                self._settle()
        else:
            self._done(result)

    def _done(self, result: R) -> None:
        if self._end.acquire(blocking=False):  # else of no use any more
            self._result = result
            self._settle()

    def _settle(self) -> None:
        try:
            if self.loan is not None:
                self.loan.settle(self._result)
        finally:
            self._under_way.release()


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
        self._queue: deque[Ahead[T, R]] = deque()
        self._pulled: deque[T] = deque()  # at most one: pulled, but there was no room for it
        self._handed_out: Ahead[T, R] | None = None
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
        ahead = self._handed_out = self._queue.popleft()
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
            ahead = self._handed_out = self._queue.popleft()
            ahead.give_up()
            self._settle()

    def abandon(self) -> None:
        """`close` on a thread of the engine: for finalizers, which may run where this thread holds any lock."""
        if self._pid == os.getpid():
            self._engine.retire(self.close)

    def _settle(self) -> None:
        """The consumer is through with what it was handed last."""
        ahead, self._handed_out = self._handed_out, None
        if ahead is not None and ahead.loan is not None:
            ahead.loan.end()
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
                    loan = Loan(self._engine.budget, cost, self._size)
                elif self._queue:
                    return  # room comes when the items before are through
            self._pulled.popleft()
            ahead = Ahead(item, self._do, self._on_use, loan)
            self._queue.append(ahead)
            if loan is not None:
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


class Loan(Generic[R]):
    """Bytes of the budget, held from the beginning of the work until the consumer is through with the result."""

    def __init__(self, budget: Budget, amount: int, size: Callable[[R], int]) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._amount = amount
        self._size = size
        self._is_settled = False
        self._is_ended = False

    def settle(self, result: R | None) -> None:
        """The work has ended: keep no more than *result* holds, nothing without one."""
        keep = 0 if result is None else self._size(result)
        with self._lock:
            self._is_settled = True
            surplus = self._amount if self._is_ended else max(0, self._amount - keep)
            self._amount -= surplus
        if surplus:
            self._budget.release(surplus)

    def end(self) -> None:
        """The consumer is through: give back what is held, as soon as the work is settled."""
        with self._lock:
            self._is_ended = True
            amount = self._amount if self._is_settled else 0
            self._amount -= amount
        if amount:
            self._budget.release(amount)
