"""Steps of an iteration that a reset, a signal handler, or an interrupt can hit at any line.

A step yields an item and advances the state, or does neither:

* The state of a run is replaced as the last thing that a step does, and never changed in place. So a handler that asks
  for it gets a true one, and what an interrupt leaves behind is known: the state from before.
* A `Plan` says what a run begins from, and has the run once it has begun. There is one present plan, and only replacing
  it changes which run counts: a run that begins late belongs to its plan and to no other.
* After an interrupt (a `BaseException` that is not an `Exception`) the run is not used again. There is a new plan, from
  the state before the step. A reset that is interrupted leaves its plan, which the next step carries out.
* A reset gives up the run, whose step in another thread leaves with nothing, and waits until it has. A step enters
  itself in ``_inside`` before it looks whether the run was given up, and a reset gives it up before it looks who is
  inside: one of the two sees the other. A step of the same thread, which a handler has interrupted, cannot leave: when
  the handler is through it finds another plan, ends with nothing, and has that run begin once more from where it is,
  since both draw from one source.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from azstoragetorch._engine.job import Bell
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.scope import Cancelled

State: TypeAlias = dict[str, Any]


class Run(Protocol):
    """One iteration: its state, which is replaced with each item, and what else it needs."""

    state: State

    def interrupt(self) -> None:
        """Make a step that blocks fail with `Cancelled`. May be called from any thread; never waits."""

    def close(self) -> None:
        """Give back what the run holds. Never waits."""


T = TypeVar("T")
R = TypeVar("R", bound=Run)


class Plan(Generic[R]):
    """What a run begins from (None is the beginning), and the run when it has begun."""

    def __init__(self, state: State | None) -> None:
        self.state = state
        self.run: R | None = None


class Steps(Generic[T, R]):
    """An iteration that begins from its beginning or from a state. A subclass says how to `_begin` and to `_step`."""

    def __init__(self) -> None:
        self._plan: Plan[R] = Plan(None)
        self._is_given_up = False
        self._inside: PerProcess[dict[object, int]] = PerProcess(dict)  # steps in progress, and their threads
        self._bell = Bell()

    def _begin(self, state: State | None) -> R:
        """A run from *state* on, or from the beginning."""
        raise NotImplementedError

    def _step(self, run: R) -> T:
        """The next item of *run*, whose state this moves on at its end."""
        raise NotImplementedError

    def give_up(self) -> None:
        """End the run for a step that is in progress. May be called from any thread."""
        self._is_given_up = True
        if self._plan.run is not None:
            self._plan.run.interrupt()

    def begin(self, state: State | None) -> None:
        """Begin a run when no step of another thread is in progress."""
        self.give_up()
        me = threading.get_ident()
        self._bell.wait_until(lambda: all(thread == me for thread in list(self._inside.get().values())))
        self._replace(Plan(state))
        self._is_given_up = False
        self._begun()

    def next(self) -> T:
        """The next item.

        Raises:
            StopIteration: the run is at its end, or was given up.
        """
        me = object()
        before: tuple[Plan[R], State] | None = None
        try:
            try:
                self._inside.get()[me] = threading.get_ident()
                if self._is_given_up:
                    raise StopIteration
                plan, run = self._begun()
                before = plan, run.state
                item = self._step(run)
                self._check_present(plan)
                return item
            finally:
                self._leave(me)
        except Exception:
            raise
        except BaseException as error:
            self._leave(me)  # the interrupt may have come in the line that does it
            if before is not None:
                if isinstance(error, Cancelled):
                    self._check_present(before[0])
                if self._plan is before[0]:
                    self._replace(Plan(before[1]))
            raise

    def state(self) -> State:
        """A copy of the state after the last item."""
        plan = self._plan
        if plan.run is None and plan.state is not None:
            return copy.deepcopy(plan.state)
        return copy.deepcopy(self._begun()[1].state)

    def restart(self, run: R) -> None:
        """Have the present run begin once more from its state, if it is *run*, before its next step."""
        if self._plan.run is run:
            self._replace(Plan(run.state))

    def _begun(self) -> tuple[Plan[R], R]:
        """The present plan and its run."""
        plan = self._plan
        while plan.run is None:
            plan.run = self._begin(plan.state)
            if plan is not self._plan:  # a handler has begun another run, from the same source
                plan = self._once_more()
        return plan, plan.run

    def _once_more(self) -> Plan[R]:
        other = self._plan
        self._replace(Plan(other.state if other.run is None else other.run.state))
        return self._plan

    def _check_present(self, plan: Plan[R]) -> None:
        """Raise StopIteration if the run of *plan* was given up."""
        if self._plan is not plan:
            self._once_more()
        elif not self._is_given_up:
            return
        raise StopIteration

    def _replace(self, plan: Plan[R]) -> None:
        old, self._plan = self._plan, plan
        if old.run is not None:
            old.run.close()

    def _leave(self, me: object) -> None:
        self._inside.get().pop(me, None)
        self._bell.ring()
