"""Run actors one request at a time, in every order, with a fault at any request.

What an actor does next depends on nothing but the answers that it has received: it has its own clock, ids and caches,
or shares them with the other actors of its `Program`. So a program is a tree, or a graph where two of its actors share
what they know: in each `Node` some actors are about to send a request, and each answer leads to another node. A node is
found by running the actors once from the beginning, on threads that stop at each request; after that it costs nothing.

The state of everything is the node of each program and what the service stores. Two orders that lead to one state have
the same future, so it is explored once, and all checks are made in each state. The number of orders is that of the
paths through the graph of states.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from azstoragetorch._blob import transport

from .memory import LOST, Memory, Reply, Wire, wire

PATIENCE = 120.0  # seconds for an actor to reach its next request
FAULTS = ("lost before", "lost after", "killed")


class Killed(BaseException):
    """The process of the actor was killed."""


@dataclass(frozen=True)
class Fault:
    """What happens to the request number *nth* (from 0) of an actor: ``lost before``, ``lost after`` or ``killed``."""

    actor: int
    nth: int
    kind: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of an actor."""

    result: Any = None
    error: BaseException | None = None

    @property
    def is_killed(self) -> bool:
        return isinstance(self.error, Killed)


class Actor:
    """Runs on a thread that stops before each request."""

    def __init__(self, number: int, work: Callable[[], Any]) -> None:
        self.number = number
        self.work = work
        self.request: Wire | None = None
        self.outcome: Outcome | None = None
        self.ids = 0  # that it has made
        self._reply: Reply | None = None
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        _current.actor = self
        try:
            self.outcome = Outcome(self.work())
        except BaseException as error:  # noqa: BLE001 - checked by the rules
            error.__traceback__ = error.__context__ = None  # they refer to all that the actor had
            self.outcome = Outcome(error=error)
        self._stopped.release()

    def ask(self, request: Wire) -> Any:
        """On the thread of the actor: wait for the reply."""
        self.request = request
        self._stopped.release()
        self._go.acquire()
        self.request = None
        if self._reply is None:
            raise Killed
        return self._reply.answer()

    def start(self) -> None:
        self._thread.start()
        self._wait()

    def proceed(self, reply: Reply | None) -> None:
        """Give the actor its reply, or kill it without one, and wait until it stops again."""
        self._reply = reply
        self._go.release()
        self._wait()

    def end(self) -> None:
        while self.outcome is None:
            self.proceed(None)
        self._thread.join()

    def _wait(self) -> None:
        if not self._stopped.acquire(timeout=PATIENCE):
            raise TimeoutError(f"actor {self.number} neither asks nor ends")


class _Current(threading.local):
    actor: Actor | None = None


_current = _Current()


def current_actor() -> Actor:
    """The actor of the current thread."""
    assert _current.actor is not None, "a thread that belongs to no actor"
    return _current.actor


def _send(origin: Any, method: str, target: str, headers: Any, *, body: Any = None, **_options: Any) -> Any:
    return current_actor().ask(wire(method, target, headers, body))


@contextmanager
def replaced_transport() -> Iterator[None]:
    original = transport.send
    transport.send = _send  # type: ignore[assignment]
    try:
        yield
    finally:
        transport.send = original


class Node:
    """A program at one moment: the requests that its actors are about to send, and how the others have ended."""

    __slots__ = ("_event", "_next", "_parent", "outcomes", "pending")

    def __init__(
        self,
        pending: dict[int, Wire],
        outcomes: dict[int, Outcome],
        parent: Node | None = None,
        event: tuple[int, Reply] | None = None,
    ) -> None:
        self.pending = pending
        self.outcomes = outcomes
        self._parent = parent
        self._event = event
        self._next: dict[tuple[int, Reply] | None, Node] = {}

    def history(self) -> list[tuple[int, Reply]]:
        """The replies that led here, in order."""
        found = []
        node: Node | None = self
        while node is not None and node._event is not None:
            found.append(node._event)
            node = node._parent
        return found[::-1]

    def after(self, program: Program, number: int, reply: Reply) -> Node:
        """The node after the actor *number* has received *reply*."""
        event = (number, reply)
        if event not in self._next:
            self._next[event] = program.run([*self.history(), event], self)
        return self._next[event]

    def killed(self) -> Node:
        """The node after the process was killed."""
        if None not in self._next:
            outcomes = {**dict.fromkeys(self.pending, Outcome(error=Killed())), **self.outcomes}
            self._next[None] = Node({}, outcomes)
        return self._next[None]


class Program:
    """One process: *make* makes its actors, and *known* returns what they share, in any form that can be compared."""

    def __init__(self, make: Callable[[], list[Actor]], known: Callable[[], object]) -> None:
        self._make = make
        self._known = known
        self._nodes: dict[object, Node] = {}
        self._start: Node | None = None

    @property
    def start(self) -> Node:
        if self._start is None:
            self._start = self.run([], None)
        return self._start

    def run(self, history: Sequence[tuple[int, Reply]], parent: Node | None) -> Node:
        """The node that *history* leads to."""
        actors = {actor.number: actor for actor in self._make()}
        for actor in actors.values():
            actor.start()
        try:
            for number, reply in history:
                actors[number].proceed(reply)
            pending = {number: actor.request for number, actor in actors.items() if actor.request is not None}
            outcomes = {number: actor.outcome for number, actor in actors.items() if actor.outcome is not None}
            known = self._known()
        finally:
            for actor in actors.values():
                actor.end()
        node = Node(pending, outcomes, parent, history[-1] if history else None)
        if len(actors) == 1:
            return node
        # What an actor does next depends on its own replies and what it shares with the others, not on their order.
        received = tuple(tuple(reply for who, reply in history if who == number) for number in actors)
        return self._nodes.setdefault((received, known), node)


@dataclass
class State:
    """The state of everything at one moment."""

    programs: Sequence[Program]
    nodes: tuple[Node, ...]
    memory: Memory
    has_struck: bool = False

    @property
    def key(self) -> object:
        return tuple(map(id, self.nodes)), self.memory.key, self.has_struck

    @property
    def enabled(self) -> list[tuple[int, int, Wire]]:
        """For each actor that is about to send a request: its program, its number, the request."""
        return [(at, who, wire) for at, node in enumerate(self.nodes) for who, wire in node.pending.items()]

    @property
    def outcomes(self) -> dict[int, Outcome]:
        return {number: outcome for node in self.nodes for number, outcome in node.outcomes.items()}

    def step(self, at: int, number: int, fault: str | None = None) -> State:
        """The state after the next request of an actor, with a fault or without."""
        node = self.nodes[at]
        request = node.pending[number]
        memory, reply = self.memory, LOST
        if fault != "lost before":
            memory = memory.copy() if request.is_write else memory
            reply = memory.serve(request)
        if fault == "killed":
            after = node.killed()
        else:
            after = node.after(self.programs[at], number, reply if fault is None else LOST)
        nodes = (*self.nodes[:at], after, *self.nodes[at + 1 :])
        return State(self.programs, nodes, memory, self.has_struck or fault is not None)


@dataclass
class Tally:
    """The counts of an exploration."""

    runs: int = 0  # orders
    states: int = 0
    steps: int = 0  # requests that were carried out
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the counts of *other*."""
        self.runs += other.runs
        self.states += other.states
        self.steps += other.steps
        self.violations += other.violations


Check = Callable[[State], list[str]]


def begin(programs: Sequence[Program], memory: Memory) -> State:
    return State(programs, tuple(program.start for program in programs), memory)


def advanced(state: State, first: Sequence[tuple[int, str]]) -> State:
    """The state after *first*: an actor sends requests until the next one is the named one, or it has ended."""
    for number, stop in first:
        while True:
            at, request = next(((at, request) for at, who, request in state.enabled if who == number), (0, None))
            if request is None or (stop and str(request).startswith(stop)):
                assert (request is None) == (not stop), f"actor {number} does not send {stop!r}"
                break
            state = state.step(at, number)
    return state


class _Search:
    def __init__(self, after_step: Check, at_end: Check, faults: Sequence[str], fault: Fault | None) -> None:
        self._after_step = after_step
        self._at_end = at_end
        self._faults = faults
        self._fault = fault
        self._orders: dict[object, int] = {}
        self._trace: list[str] = []
        self.tally = Tally()

    def visit(self, state: State, sent: tuple[int, ...]) -> int:
        """The number of orders from *state* on, after checking all of them; *sent* counts requests by actor."""
        key = state.key
        if key in self._orders:
            return self._orders[key]
        self.tally.states += 1
        enabled = state.enabled
        self._note(self._after_step(state) if enabled else self._after_step(state) + self._at_end(state))
        found = 0 if enabled else 1
        for at, number, request in enabled:
            for fault in self._faults_at(state, number, sent):
                if self.tally.violations:
                    return found
                self.tally.steps += 1
                self._trace.append(f"{number}: {request}" + (f" [{fault}]" if fault else ""))
                after = tuple(count + (who == number) for who, count in enumerate(sent))
                found += self.visit(state.step(at, number, fault), after)
                self._trace.pop()
        self._orders[key] = found
        return found

    def _faults_at(self, state: State, number: int, sent: tuple[int, ...]) -> Sequence[str | None]:
        if self._fault is not None:
            is_here = (self._fault.actor, self._fault.nth) == (number, sent[number])
            return [self._fault.kind if is_here else None]
        return [None] if state.has_struck else [None, *self._faults]

    def _note(self, wrong: list[str]) -> None:
        self.tally.violations += [f"{what}\n    " + "\n    ".join(self._trace) for what in wrong]


def explore(
    programs: Sequence[Program],
    memory: Memory,
    after_step: Check,
    at_end: Check,
    *,
    faults: Sequence[str] = (),
    fault: Fault | None = None,
    first: Sequence[tuple[int, str]] = (),
) -> Tally:
    """Run every order that begins with *first*, without a fault and with one of *faults* at any later request.

    With *fault*, only with that. Stops at the first violation.
    """
    search = _Search(after_step, at_end, faults, fault)
    state = begin(programs, memory)
    count = sum(len(node.pending) for node in state.nodes)
    search.tally.runs = search.visit(advanced(state, first), (0,) * count)
    return search.tally


def wander(
    programs: Sequence[Program], memory: Memory, after_step: Check, at_end: Check, randomness: random.Random
) -> Tally:
    """Run one random order, with a random fault half of the time."""
    tally = Tally(runs=1)
    state = begin(programs, memory)
    count = sum(len(node.pending) for node in state.nodes)
    fault = None
    if randomness.random() < 0.5:
        fault = Fault(randomness.randrange(count), randomness.randrange(12), randomness.choice(FAULTS))
    sent = [0] * count
    trace = []
    wrong: list[str] = []
    while not wrong and (enabled := state.enabled):
        at, number, request = randomness.choice(enabled)
        kind = fault.kind if fault is not None and (fault.actor, fault.nth) == (number, sent[number]) else None
        trace.append(f"{number}: {request}" + (f" [{kind}]" if kind else ""))
        state = state.step(at, number, kind)
        sent[number] += 1
        tally.steps += 1
        wrong = after_step(state)
    if not wrong:
        wrong = at_end(state)
    tally.violations = [f"{what}\n    " + "\n    ".join(trace) for what in wrong]
    return tally
