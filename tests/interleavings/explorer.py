"""Run actors one request at a time, in every order that makes a difference.

An actor runs on a thread of its own and blocks in each request until it is chosen. The explorer runs everything from
the beginning again for each order (depth first). Two orders that differ only in requests that do not depend on each
other have the same effect: with sleep sets (Godefroid) of all those just one is run to its end.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from azstoragetorch._blob import transport

from .memory import Memory, Wire, wire

PATIENCE = 120.0  # seconds for an actor to get to its next request


class Killed(BaseException):
    """The actor's process is no more."""


@dataclass(frozen=True)
class Fault:
    """What befalls the request number *nth* (from 0) of an actor: ``lost before``, ``lost after`` or ``killed``."""

    actor: int
    nth: int
    kind: str


class Actor:
    """Work on a thread, which stops before each request."""

    def __init__(self, number: int, work: Callable[[], Any]) -> None:
        self.number = number
        self.work = work
        self.request: Wire | None = None
        self.is_over = False
        self.is_killed = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.sent = 0
        self.answer: Any = None
        self.go = threading.Semaphore(0)
        self.stopped = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        _current.actor = self
        try:
            self.result = self.work()
        except BaseException as error:  # noqa: BLE001 - looked at by the checks
            self.error = error
        self.is_over = True
        self.stopped.release()

    def ask(self, request: Wire) -> Any:
        """On the thread of the actor: wait to be chosen, and return the answer."""
        if self.is_killed:
            raise Killed
        self.request = request
        self.stopped.release()
        self.go.acquire()
        self.request = None
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def proceed(self, answer: Any) -> None:
        """Give the actor its answer, and wait until it stops again."""
        self.answer = answer
        self.go.release()
        self.wait()

    def wait(self) -> None:
        if not self.stopped.acquire(timeout=PATIENCE):
            raise TimeoutError(f"actor {self.number} neither asks nor ends")


class _Current(threading.local):
    actor: Actor | None = None


_current = _Current()


def _send(origin: Any, method: str, target: str, headers: Any, *, body: Any = None, scope: Any = None) -> Any:
    actor = _current.actor
    assert actor is not None, "a request on a thread that belongs to no actor"
    return actor.ask(wire(method, target, headers, body))


@contextmanager
def replaced_transport() -> Iterator[None]:
    original = transport.send
    transport.send = _send  # type: ignore[assignment]
    try:
        yield
    finally:
        transport.send = original


@dataclass
class Run:
    """One run of all actors: the state of the service, and who may do what next."""

    memory: Memory
    actors: list[Actor]
    fault: Fault | None = None
    trace: list[str] = field(default_factory=list)
    has_struck: bool = False

    def start(self) -> None:
        for actor in self.actors:
            actor.thread.start()
            actor.wait()

    def enabled(self) -> list[int]:
        return [actor.number for actor in self.actors if not actor.is_over]

    def step(self, number: int) -> None:
        """Carry out the next request of an actor, with the fault if it is due."""
        actor = self.actors[number]
        request = actor.request
        assert request is not None
        fault = self.fault
        is_due = fault is not None and (fault.actor, fault.nth) == (number, actor.sent)
        actor.sent += 1
        self.trace.append(f"{number}: {request}" + (f" [{fault.kind}]" if fault is not None and is_due else ""))
        self.has_struck |= is_due
        answer: Any = ConnectionResetError("the answer was lost")
        if not is_due or fault is None or fault.kind != "lost before":
            served = self.memory.serve(request)
            if not is_due:
                answer = served
        if is_due and fault is not None and fault.kind == "killed":
            actor.is_killed = True
            answer = Killed()
        actor.proceed(answer)

    def stop(self) -> None:
        """End what still runs."""
        for actor in self.actors:
            actor.is_killed = True
            while not actor.is_over:
                actor.proceed(Killed())
            actor.thread.join()


@dataclass
class Tally:
    """What an exploration came to."""

    runs: int = 0
    steps: int = 0
    violations: list[str] = field(default_factory=list)
    longest: dict[int, int] = field(default_factory=dict)  # most requests of each actor

    def add(self, other: Tally) -> None:
        """Count what *other* came to as well."""
        self.runs += other.runs
        self.steps += other.steps
        self.violations += other.violations


Make = Callable[[Fault | None], Run]
Check = Callable[[Run], list[str]]


def explore(make: Make, after_step: Check, at_end: Check, fault: Fault | None = None, most: int = 10**9) -> Tally:
    """Run every order that makes a difference; stops at *most* runs, or at the first violation."""
    tally = Tally()
    # For each depth: the requests that were pending, the choices still to make, and those that sleep.
    stack: list[_Node] = []
    while tally.runs < most and not tally.violations:
        run = make(fault)
        run.start()
        try:
            for node in stack:
                run.step(node.chosen)
            _extend(run, stack, tally, after_step, at_end)
        finally:
            run.stop()
        while stack and not stack[-1].advance():
            stack.pop()
        if not stack:
            break
    return tally


class _Node:
    """A choice in the search: which actor goes next."""

    def __init__(self, pending: dict[int, Wire], asleep: frozenset[int]) -> None:
        self.pending = pending
        self.asleep = asleep
        self.left = [number for number in pending if number not in asleep]
        self.chosen = self.left.pop(0) if self.left else -1

    def advance(self) -> bool:
        self.asleep |= {self.chosen}
        self.left = [number for number in self.left if number not in self.asleep]
        if not self.left:
            return False
        self.chosen = self.left.pop(0)
        return True

    def asleep_after(self) -> frozenset[int]:
        chosen = self.pending[self.chosen]
        return frozenset(n for n in self.asleep if n != self.chosen and not self.pending[n].depends_on(chosen))


def _extend(run: Run, stack: list[_Node], tally: Tally, after_step: Check, at_end: Check) -> None:
    if stack:
        tally.violations += after_step(run)
    while not tally.violations:
        pending = {number: request for number in run.enabled() if (request := run.actors[number].request) is not None}
        if not pending:
            tally.runs += 1
            tally.violations += at_end(run)
            break
        node = _Node(pending, stack[-1].asleep_after() if stack else frozenset())
        if node.chosen < 0:
            break  # every order from here on was run already, with independent requests in another order
        stack.append(node)
        run.step(node.chosen)
        tally.steps += 1
        tally.violations += after_step(run)
    for actor in run.actors:
        tally.longest[actor.number] = max(tally.longest.get(actor.number, 0), actor.sent)
    if tally.violations:
        tally.violations = [f"{what}\n    " + "\n    ".join(run.trace) for what in tally.violations]


def wander(make: Make, after_step: Check, at_end: Check, randomness: random.Random, faults: Sequence[str]) -> Tally:
    """Run one random order, with a random fault half of the time."""
    tally = Tally(runs=1)
    run = make(None)
    count = len(run.actors)
    if randomness.random() < 0.5:
        run.fault = Fault(randomness.randrange(count), randomness.randrange(12), randomness.choice(list(faults)))
    run.start()
    try:
        while enabled := run.enabled():
            run.step(randomness.choice(enabled))
            tally.steps += 1
            tally.violations += after_step(run)
            if tally.violations:
                break
        else:
            tally.violations += at_end(run)
    finally:
        run.stop()
    tally.violations = [f"{what}\n    " + "\n    ".join(run.trace) for what in tally.violations]
    return tally
