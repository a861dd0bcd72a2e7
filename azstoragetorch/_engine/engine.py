"""Names of the ground floor as they were; gone when nothing uses them any more."""

from __future__ import annotations

from azstoragetorch._engine.budget import Budget, BufferPool, Loan
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch._engine.threads import Engine, engine_for, start_thread

__all__ = [
    "Budget",
    "BufferPool",
    "Cancelled",
    "Engine",
    "Reservation",
    "Scope",
    "engine_for",
    "start_thread",
]


class Reservation:
    """A loan that is taken later."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._loan: Loan | None = None

    def take(self, amount: int) -> bool:
        """Borrow *amount* bytes if that needs no waiting."""
        self._loan = self._budget.take(amount)
        return self._loan is not None

    def release(self) -> None:
        """Give the bytes back."""
        if self._loan is not None:
            self._loan.release()
