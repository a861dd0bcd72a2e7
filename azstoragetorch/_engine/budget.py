"""Bytes in flight: what may be held in memory at once, and buffers that are reused.

A `Loan` counts from the moment it is in the budget's table until it is released or nothing refers to it any more. The
table has it under a weak reference, whose callback is the table's own ``pop``: no Python code runs when a loan is
dropped, so neither a finalizer nor an interrupt in one can lose bytes. Neither borrowing nor giving back takes a lock.
Each is one step on a dict, and whether a loan fits is decided after it was entered: of two borrowers at the same time
at least one sees the other, so the limit holds. Both may be refused, which is harmless. Adding up
all loans is often unnecessary, thanks to a bound: the number of loans times a power of two above the largest amount.
It keeps the same order: the width of an amount, which is never removed, is entered before the loan.
"""

from __future__ import annotations

import operator
import weakref
from collections import deque
from contextlib import suppress

from azstoragetorch._engine.job import Bell
from azstoragetorch._engine.memory import new_buffer

_amount_of = operator.itemgetter(0)


class Loan:
    """Bytes borrowed from a budget. Dropping it gives them back; so does leaving its ``with`` block."""

    __slots__ = ("__weakref__", "_budget", "_cell")

    def __init__(self, budget: Budget, amount: int) -> None:
        self._budget = budget
        self._cell = [amount]  # shared with the budget's table

    @property
    def amount(self) -> int:
        """Bytes on loan."""
        return self._cell[0]

    def shrink(self, to: int) -> None:
        """Give back what exceeds *to* bytes."""
        self._cell[0] = min(self._cell[0], to)
        self._budget._given_back()  # noqa: SLF001 - two parts of one protocol

    def release(self) -> None:
        """Give everything back; once is enough."""
        self._cell[0] = 0
        self._budget._loans.pop(weakref.ref(self), None)  # noqa: SLF001 - the one entered is equal to it
        self._budget._given_back()  # noqa: SLF001

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()


class Budget:
    """Bytes that may be in flight. One oversized piece is always admitted alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._widths: set[int] = set()  # bits of the amounts lent so far
        self._loans: dict[weakref.ref[Loan], list[int]] = {}
        self._queue: deque[object] = deque()  # tickets of threads that wait, first come first
        self._freed = Bell()

    @property
    def in_flight(self) -> int:
        """Bytes on loan now."""
        return sum(map(_amount_of, list(self._loans.values())))

    def take(self, amount: int) -> Loan | None:
        """Borrow *amount* bytes if that is possible without waiting; else None."""
        loan = None if self._queue else self._lend(amount)
        if loan is None:
            self._given_back()  # it was in the table for a moment, and may have kept another one out
        return loan

    def wait_for(self, amount: int) -> Loan:
        """Borrow *amount* bytes, waiting for others to give theirs back; first come, first served.

        Only for borrowers that hold nothing that those others need.
        """
        ticket = object()
        try:
            try:
                self._queue.append(ticket)
                return self._freed.wait_until(lambda: self._lend(amount) if self._queue[0] is ticket else None)  # type: ignore[return-value]
            finally:
                self._leave(ticket)
        except BaseException:
            self._leave(ticket)  # the interrupt may have come in the line that does it
            raise

    def _leave(self, ticket: object) -> None:
        with suppress(ValueError):  # it was not in the queue yet, or is not any more
            self._queue.remove(ticket)
        self._freed.ring()

    def _lend(self, amount: int) -> Loan | None:
        loan = Loan(self, amount)
        self._widths.add(amount.bit_length())
        self._loans[weakref.ref(loan, self._loans.pop)] = loan._cell  # noqa: SLF001 - two parts of one protocol
        if len(self._loans) << max(self._widths) <= self.limit:
            return loan  # many small ones: no need to add them up
        total = self.in_flight
        if total > amount and total > self.limit:
            self._loans.pop(weakref.ref(loan), None)
            return None
        return loan

    def _given_back(self) -> None:
        if self._queue:
            self._freed.ring()


class BufferPool:
    """Buffers that are reused, which saves their page faults. Idle ones hold about *limit* bytes at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: dict[int, deque[memoryview]] = {}  # by size

    def take(self, size: int) -> memoryview:
        """A buffer of *size* bytes with arbitrary contents."""
        try:
            return self._idle[size].pop()
        except (KeyError, IndexError):
            return new_buffer(size)

    def give_back(self, buffer: memoryview) -> None:
        """Hand a buffer back; the caller keeps no view of it. Never waits."""
        size = buffer.nbytes
        if size + sum(each * len(buffers) for each, buffers in list(self._idle.items())) <= self._limit:
            self._idle.setdefault(size, deque()).append(buffer)
