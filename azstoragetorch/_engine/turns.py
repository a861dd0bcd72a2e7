"""Calls on one object that take turns.

Two threads that share a file read one after the other. But a signal handler or a finalizer runs inside the call that it
interrupts, on the same thread: if it waited for that call it would wait forever, so its own call is refused.

A turn belongs to the frame of the call, which is entered into a dict with ``dict.setdefault``: one step, so whenever
the turn is taken, it is known by which call. A frame that no thread executes any more has lost its turn: an interrupt
came before it could give the turn back, or the process is a forked child and the thread is its parent's.
Its dict is then given up with the frame in it, for a successor that the dict itself names (``setdefault`` again, so all
threads that notice the loss name the same one). Since the lost frame stays where it is, a thread that still looks at
the old dict finds the turn taken, and looks for the successor.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from azstoragetorch._engine.job import Bell

getframe = sys._getframe  # noqa: SLF001 - documented; inspect.currentframe costs another call


class Turns:
    """Whose turn it is.

    A call whose frame is *me* takes the turn by ``holders.setdefault("now", me)`` on `holders`, and by `wait` if that
    is another frame. It gives the turn back with `give_back` in a ``finally`` that also covers the taking, and forgets
    *me*, since a frame that refers to itself is a reference cycle.
    """

    __slots__ = ("_bell", "_is_waited_for", "holders")

    def __init__(self) -> None:
        self.holders: dict[str, Any] = {}
        self._bell = Bell()
        self._is_waited_for = False  # stays so: an object that is not shared needs no bell

    def wait(self, me: FrameType) -> dict[str, Any]:
        """Take the turn for *me* when the call of another thread is over; the dict that *me* is entered in.

        Raises:
            RuntimeError: *me* interrupts the call in progress.
        """
        return self._bell.wait_until(lambda: self._try(me))  # type: ignore[arg-type, return-value]  # not None

    def give_back(self, holders: dict[str, Any], me: FrameType) -> None:
        """End the turn of *me* in *holders*, if it has it there."""
        if holders.get("now") is me:
            del holders["now"]
        if self._is_waited_for:
            self._bell.ring()

    def _try(self, me: FrameType) -> dict[str, Any] | None:
        self._is_waited_for = True
        while True:
            holders = self.holders
            holder = holders.setdefault("now", me)
            if holder is me:
                return holders
            if _stands_below(getframe(), holder):
                raise RuntimeError("reentrant call: it interrupts another call on the same object and thread")
            if _is_running(holder):
                return None
            if holders.get("now") is holder:  # it had not just given the turn back
                successor = holders.setdefault("next", {})
                if self.holders is holders:
                    self.holders = successor

    def is_taken(self) -> bool:
        """Whether a call is in progress."""
        holder = self.holders.get("now")
        return holder is not None and _is_running(holder)

    def is_interrupted(self) -> bool:
        """Whether the caller interrupts a call on its own thread."""
        holder = self.holders.get("now")
        return holder is not None and _stands_below(getframe(), holder)


def _is_running(frame: FrameType) -> bool:
    """Whether a thread of this process executes *frame*, or something that it called."""
    return any(_stands_below(top, frame) for top in sys._current_frames().values())  # noqa: SLF001 - documented


def _stands_below(top: FrameType | None, frame: FrameType) -> bool:
    while top is not None and top is not frame:
        top = top.f_back
    return top is not None
