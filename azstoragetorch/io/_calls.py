"""Order the calls of one `BlobIO`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from azstoragetorch._engine.scope import Cancelled
from azstoragetorch._engine.turns import getframe

M = TypeVar("M", bound=Callable[..., Any])


def in_turn(method: M) -> M:
    """Let calls of a `BlobIO` from several threads take turns; refuse one that interrupts another on its own thread.

    If a handler or a finalizer has closed the object meanwhile, the call fails as on a closed file, and cleans up.
    """

    @wraps(method)
    def call(self: Any, /, *arguments: Any) -> Any:
        me = getframe()
        holders = self._turns.holders
        try:
            if holders.setdefault("now", me) is not me:
                holders = self._turns.wait(me)
            result = method(self, *arguments)
            if self._was_given_up:
                self._raise_closed()
            return result
        except (Exception, Cancelled):
            if self._was_given_up:
                self._raise_closed()
            raise
        finally:
            self._turns.give_back(holders, me)
            del me
            if self._was_given_up:
                self._clean_up()

    return cast("M", call)
