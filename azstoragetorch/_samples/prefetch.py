"""Work on many blobs at the same time, with results in order, for datasets, pipes, and nodes.

Work in flight is bounded by the engine's byte budget and by a count. It cannot get stuck, even if others hold the whole
budget: the thread that needs a result does the work itself if it has not started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

from azstoragetorch._engine.budget import Loan
from azstoragetorch._engine.job import IsStuck, Job
from azstoragetorch._engine.metrics import timed
from azstoragetorch._engine.process import here
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import Engine

T = TypeVar("T")
R = TypeVar("R")

Start = Callable[[T, Scope, Callable[[R], None], Callable[[], None]], IsStuck | None]


class Prefetched(Generic[T, R]):
    """One item and the work on it, which has not begun, is in progress, or is done.

    The bytes that its result holds are borrowed as long as both this item and its work refer to the loan: the work
    until it ends, the item until the consumer is through with it.
    """

    __slots__ = ("_job", "_prefetch", "item", "loan")

    def __init__(self, prefetch: OrderedPrefetch[T, R], item: T, job: Job[R] | None, loan: Loan | None) -> None:
        self.item = item
        self.loan = loan
        self._prefetch = prefetch
        self._job = job

    def result(self) -> R:
        """The result; the work is done here if nothing has begun. After an error another call does it again.

        Raises:
            BaseException: whatever the work raised.
        """
        self._prefetch._on_use()  # noqa: SLF001 - of this module
        job = self._job
        if job is None:
            with timed("blocked_seconds"):
                return self._prefetch._do(self.item)  # noqa: SLF001
        if job.has_result:
            return job.result()
        with on_error(self.give_up), timed("blocked_seconds"):
            return job.result()

    def give_up(self) -> None:
        """Do not begin the work ahead, if it has not begun, and keep no result of it."""
        job, self._job = self._job, None
        if job is not None:
            job.give_up()


class _Beginning(Generic[T, R]):
    """Work that *start* begins without a thread that waits for it. This refers to the loan until it ends."""

    __slots__ = ("_done", "_failed", "_item", "_job", "_loan", "_prefetch", "_start")

    def __init__(self, prefetch: OrderedPrefetch[T, R], start: Start[T, R], item: T, job: Job[R], loan: Loan) -> None:
        self._prefetch = prefetch
        self._start = start
        self._item = item
        self._job = job
        self._loan = loan

    def __call__(self, done: Callable[[R], None], failed: Callable[[], None]) -> IsStuck | None:
        """Begin; None if that is not possible."""
        self._done = done
        self._failed = failed
        return self._start(self._item, self._prefetch._scope, self._succeed, self._fail)  # noqa: SLF001 - of this module

    def _succeed(self, result: R) -> None:
        self._loan.shrink(self._prefetch._size(result))  # noqa: SLF001 - of this module
        self._done(result)

    def _fail(self) -> None:
        self._failed()
        self._prefetch._engine.current().submit(self._job.run)  # noqa: SLF001


class OrderedPrefetch(Generic[T, R]):
    """Iterates over *items* in order, with the work on the next ones in progress.

    Yields each item as a `Prefetched`, whose ``result()`` returns or raises: what to do about an error is the
    consumer's. An error of *items* itself is raised after what came before it. Close it to give up what is in flight.

    Args:
        engine: Runs the work and lends the bytes.
        items: Pulled lazily, in the consumer's thread.
        work: Called with an item and the scope of all, on a thread of the engine or of the consumer.
        cost: Bytes that the result of an item will hold, at most.
        size: Bytes that a result does hold.
        depth: Items in flight at once, at most.
        is_eager: Begin at once with all. Otherwise what is in flight grows with the results that are asked for and
            shrinks with those that are not: a consumer that never asks costs nothing.
        start: Tries to do the work of an item without a thread that waits; calls the first function with the result,
            or the second to have the work done in the ordinary way. Returns None if it cannot, else a function that
            says whether it is stuck; see `Job.hand_over`.
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
        start: Start[T, R] | None = None,
    ) -> None:
        self._process = here()
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
        self._queue: deque[Prefetched[T, R]] = deque()
        self._pulled: deque[T] = deque()  # at most one: pulled, but without room for it
        self._handed_out: Prefetched[T, R] | None = None
        self._is_unused = False  # what was handed out last
        self._source_error: Exception | None = None
        self._is_exhausted = False

    def __iter__(self) -> OrderedPrefetch[T, R]:
        return self

    def __next__(self) -> Prefetched[T, R]:
        self._finish_last()
        self._fill()
        if not self._queue:
            if self._source_error is not None:
                raise self._take_source_error()
            raise StopIteration
        self._handed_out = self._queue.popleft()
        self._is_unused = True
        return self._handed_out

    def interrupt(self) -> None:
        """Make work in flight fail with `Cancelled`, now and from now on. May be called from any thread."""
        self._scope.cancel()

    def close(self) -> None:
        """Give up what is in flight and give its bytes back. Never waits."""
        self._is_exhausted = True
        self._pulled.clear()
        self._scope.cancel()
        self._finish_last()
        while self._queue:
            self._queue.popleft().give_up()

    def abandon(self) -> None:
        """`close` on a thread of the engine: for finalizers."""
        if self._process is here():
            self._engine.retire(self.close)

    def _finish_last(self) -> None:
        """The consumer is through with what it was handed last."""
        last, self._handed_out = self._handed_out, None
        if last is not None:
            last.loan = None  # the work, if it is in progress, still holds it
        if self._is_unused and not self._is_eager:
            self._window //= 4
        self._is_unused = False

    def _on_use(self) -> None:
        self._is_unused = False
        if self._window < self._depth:
            self._window = min(self._depth, max(4, self._window * 4))
            self._fill()

    def _fill(self) -> None:
        engine = self._engine.current()
        depth = max(1, self._window)
        while len(self._queue) < depth and (self._pulled or self._pull()):
            item = self._pulled[0]
            loan = engine.budget.take(self._cost(item)) if self._window else None
            if loan is None and self._window and self._queue:
                return  # room comes when the items before are through
            job = Job(partial(self._do_on_loan, item, loan)) if loan is not None else None
            self._queue.append(Prefetched(self, item, job, loan))
            self._pulled.popleft()
            if job is not None and loan is not None:
                self._begin(engine, item, job, loan)

    def _begin(self, engine: Engine, item: T, job: Job[R], loan: Loan) -> None:
        start = self._start
        try:
            is_begun = start is not None and job.hand_over(_Beginning(self, start, item, job, loan))
        except Exception:  # noqa: BLE001 - the thread meets it again, and `result` raises it
            is_begun = False
        if not is_begun:
            engine.submit(job.run)

    def _do(self, item: T) -> R:
        return self._work(item, self._scope)

    def _do_on_loan(self, item: T, loan: Loan) -> R:
        with on_error(loan.release):  # now, even if the error's traceback still refers to it
            result = self._work(item, self._scope)
        loan.shrink(self._size(result))
        return result

    def _pull(self) -> bool:
        if self._is_exhausted:
            return False
        try:
            self._pulled.append(next(self._items))
        except StopIteration:
            self._is_exhausted = True
        except Exception as error:  # noqa: BLE001 - raised in its turn; an interrupt is raised at once
            self._is_exhausted = True
            self._source_error = error
        return bool(self._pulled)

    def _take_source_error(self) -> Exception:
        error, self._source_error = self._source_error, None
        assert error is not None
        return error
