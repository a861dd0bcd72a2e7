"""Work that is done once, by the thread that comes first, and waited for by every thread that needs it.

The one protocol of the package for "this is being fetched". A `Job` is in one of three states:

    open      nothing has begun
    claimed   a thread does the work, or it was handed to something that reports back, such as the multiplexer
    over      there is an outcome: a result, an error, or that it was given up

* open -> claimed: the first to enter its token as ``claim`` of the job's state (``dict.setdefault``, one step). A
  thread of an engine does it when its turn comes; a thread that needs the result does it at once. So a job needs no
  free thread, and work that waits for work cannot starve.
* claimed -> open: only by the claimant, if it handed the work over and that did not succeed, or if it was interrupted.
* claimed -> over: the first to enter an ``outcome``. A claimant that is interrupted at any line leaves through the
  ``except`` of `run`, which knows by its token whether the work was its own.
* open -> over: by `give_up`.

No thread holds a lock while it waits, and a signal handler or a finalizer, which run inside this code, cannot find
any lock taken: states change by single steps on dicts and lists, which the interpreter does not divide. A thread that
waits sleeps on a lock that only a `Bell` knows. It enters the lock there, then looks at the state, then sleeps; the
thread that changes the state does so first and rings after. So either the sleeper sees the change or the bell finds the
sleeper. Most jobs are over before anybody waits, so a job gets its bell from the first thread that waits. The order is
the same: the bell is entered before the waiting thread looks at the state, and looked up after the change.

Three claimants may never finish, and the token shows it: a signal handler that needs a job which the interrupted
code below it has claimed would wait for itself, a forked child would wait for a thread of its parent, and any caller
for a thread that was handed the work and is stuck in a finalizer, which the collector runs on any thread. Such a
caller does the work once more instead.

An error's traceback refers to the frames that it passed through, those to the owner of the job, and the owner to the
job. So the owner of a job that failed calls `give_up` when it has dealt with the error: a reference cycle would keep
the memory of everything around it until a garbage collection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypedDict, TypeVar

from azstoragetorch._engine.process import Process, here
from azstoragetorch._engine.scope import Cancelled

R = TypeVar("R")
T = TypeVar("T")

IsStuck = Callable[[], bool]
"""Says whether work that was handed over has to wait for the calling thread, or is stuck for another reason."""

_LOOK_AGAIN = 1.0  # seconds until a sleeper looks again: an interrupt may have ended the thread that was to ring


class Bell:
    """Wakes threads that wait for something to become true. Ringing never waits."""

    __slots__ = ("_sleepers",)

    def __init__(self) -> None:
        self._sleepers: list[threading.Lock] = []

    def ring(self) -> None:
        """Make every thread that waits look again. Call it after the change, from anywhere."""
        while self._sleepers:
            with suppress(IndexError, RuntimeError):  # another thread has rung for it
                self._sleepers.pop().release()

    def wait_until(self, condition: Callable[[], T]) -> T:
        """Return what *condition*, which is cheap and does not wait, returns once that is true."""
        while not (found := condition()):
            sleeper = threading.Lock()
            sleeper.acquire()
            self._sleepers.append(sleeper)
            try:
                if found := condition():
                    return found
                sleeper.acquire(timeout=_LOOK_AGAIN)
            finally:
                with suppress(ValueError):  # the bell has rung for it
                    self._sleepers.remove(sleeper)
        return found


class _Token:
    """A claim: of which thread (0 if the work was handed to something else) in which process."""

    __slots__ = ("is_stuck", "process", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.process: Process = here()
        self.is_stuck: IsStuck = _never

    @property
    def is_lost(self) -> bool:
        """Whether the claimant cannot finish before the caller continues."""
        return self.thread == threading.get_ident() or self.process is not here() or self.is_stuck()


def _never() -> bool:
    return False


class _Outcome(Generic[R]):
    """How a job ended; neither a result nor an error if it was given up."""

    __slots__ = ("error", "result")

    def __init__(self, result: R | None = None, error: BaseException | None = None) -> None:
        self.result = result
        self.error = error


class _State(TypedDict, total=False):
    """What is known of a job: each entry is made in one step, and the first one stays unless the job is given up."""

    claim: _Token
    outcome: _Outcome[Any]
    bell: Bell


class Job(Generic[R]):
    """Work that is done at most once.

    Args:
        work: Does it. The job forgets it, and with it what it refers to, when it is over.
        bell: Rung when the job is over, or open again; several jobs may share one.
    """

    __slots__ = ("__weakref__", "_state", "_work")

    def __init__(self, work: Callable[[], R], bell: Bell | None = None) -> None:
        self._work: Callable[[], R] | None = work
        self._state: _State = {} if bell is None else {"bell": bell}

    @property
    def is_over(self) -> bool:
        """Whether there is an outcome."""
        return "outcome" in self._state

    @property
    def is_open(self) -> bool:
        """Whether nothing has begun."""
        return "claim" not in self._state and "outcome" not in self._state

    @property
    def has_result(self) -> bool:
        """Whether the work was done, and well."""
        outcome = self._state.get("outcome")
        return outcome is not None and outcome.error is None and outcome is not _GIVEN_UP

    @property
    def error(self) -> BaseException | None:
        """What the work raised, if it did."""
        outcome = self._state.get("outcome")
        return outcome.error if outcome is not None else None

    def run(self) -> bool:
        """Do the work here if nothing has begun; whether that was so.

        What the work raises is kept for `result`. An interrupt belongs to the thread that it came to: it is raised
        here, and the job is open again.
        """
        token = _Token(threading.get_ident())
        try:
            if self._state.setdefault("claim", token) is not token:
                return False
            work = self._work
            if work is not None:
                self._end(_Outcome(work()))
        except BaseException as error:
            if self._state.get("claim") is not token or not isinstance(error, (Exception, Cancelled)):
                self._reopen(token)
                raise
            self._end(_Outcome(error=error))
        return True

    def hand_over(self, start: Callable[[Callable[[R], None], Callable[[], None]], IsStuck | None]) -> bool:
        """Have *start* begin the work without a thread that waits for it; False if it cannot, and the job stays open.

        *start* gets two functions, of which one is to be called later, from any thread: the first with the result, the
        second to open the job again. It returns None if neither will be, else a function that says whether it is stuck:
        a thread that needs the result then does the work itself.
        """
        token = _Token(threading.get_ident())
        reopen = partial(self._reopen, token)
        try:
            if self._state.setdefault("claim", token) is not token:
                return True
            is_stuck = start(self._succeed, reopen)
            if is_stuck is not None:
                token.is_stuck = is_stuck
                token.thread = 0  # from here on this thread may wait for it
                return True
        except BaseException:
            reopen()
            raise
        reopen()
        return False

    def result(self) -> R:
        """The result. The work is done here if nothing has begun, else waited for.

        Raises:
            BaseException: what the work raised.
            RuntimeError: the job was given up.
        """
        state = self._state
        while "outcome" not in state:
            work, claim = self._work, state.get("claim")
            if claim is None:
                self.run()
            elif work is not None and claim.is_lost:
                return work()
            else:
                state.setdefault("bell", Bell()).wait_until(partial(self._needs_look, claim))
        outcome: _Outcome[R] = state["outcome"]
        if outcome.error is None and outcome is not _GIVEN_UP:
            return outcome.result  # type: ignore[return-value]  # there is one
        del outcome  # the traceback of the error refers to this frame
        raise self.error or RuntimeError("the work was given up")

    def give_up(self) -> bool:
        """Never begin if nothing has; forget the outcome if there is one. Work in progress is not stopped.

        Whether nothing had begun, so that what the work would have used is the caller's to clean up.
        """
        token = _Token(0)
        is_unused = self._state.setdefault("claim", token) is token
        self._state["outcome"] = _GIVEN_UP
        self._work = None
        self._ring()
        return is_unused

    def _succeed(self, result: R) -> None:
        self._end(_Outcome(result))

    def _reopen(self, token: _Token) -> None:
        if self._state.get("claim") is token:
            self._state.pop("claim", None)
        self._ring()

    def _needs_look(self, claim: _Token) -> bool:
        return "outcome" in self._state or self._state.get("claim") is not claim or claim.is_stuck()

    def _end(self, outcome: _Outcome[R]) -> None:
        self._state.setdefault("outcome", outcome)
        self._work = None
        self._ring()

    def _ring(self) -> None:
        bell = self._state.get("bell")
        if bell is not None:
            bell.ring()


_GIVEN_UP: _Outcome[Any] = _Outcome()
