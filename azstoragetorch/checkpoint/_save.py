"""The state of one save, and which one a call of torch belongs to.

torch calls a writer several times for a save, all on the thread that the save runs on, and passes nothing along that
says which save it is. Several saves may use one writer at once: `async_save` runs each on a thread, and a signal
handler may save in the middle of another save on the same thread. That one may fail at any point, which the writer is
not told. So a save remembers the calls that were running when it began: see `Saves`.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from azstoragetorch._engine.job import Job
from azstoragetorch.checkpoint._base import Digesting
from azstoragetorch.checkpoint._folder import Folder, Seen
from azstoragetorch.checkpoint._format import new_save_id

_MOST_OPEN = 8  # saves of one thread that have not ended; older ones have failed


Stack = tuple[tuple[int, CodeType], ...]
"""The calls that are running on a thread, the outermost first. Not their frames, which keep alive what is saved."""


def _present_stack() -> Stack:
    """The stack of this thread, down to the caller."""
    found = []
    here = inspect.currentframe()
    frame = here.f_back if here is not None else None
    while frame is not None:
        found.append((id(frame), frame.f_code))
        frame = frame.f_back
    return tuple(reversed(found))


@dataclass(eq=False)
class Save:
    """One save on this rank. *seen* is the metadata that it is to replace, on the rank that will.

    *seeing* reads that, in the background until any rank writes data. *digesting* finds the base, in the background
    until the data is written. It is None if items get no digests.
    """

    folder: Folder
    begun: Stack = field(repr=False)
    save_id: str = field(default_factory=new_save_id)
    rank: int = 0
    metadata_rank: int | None = None  # of the metadata that is ours to write; None is that of all ranks
    seeing: Job[Seen] | None = field(default=None, repr=False)
    seen: Seen | None = None
    digesting: Job[Digesting] | None = None
    is_set_up: bool = False
    is_written: bool = False

    def returned(self, now: Stack) -> int:
        """How many of the calls that were running when it began are over in the stack *now*."""
        common = (one == other for one, other in zip(self.begun, now, strict=False))
        return len(self.begun) - sum(1 for _ in itertools.takewhile(bool, common))

    def see(self) -> None:
        """Have *seen*, on the rank that will replace it. What was seen once stays: see `_commit`."""
        if self.seen is None and self.seeing is not None:
            self.seen = self.seeing.result()

    @property
    def is_own(self) -> bool:
        """Whether this rank saves for itself, without the others."""
        return self.metadata_rank is not None


# A signal handler may run a whole save with the same writer between any two steps here. It leaves the list with the
# same saves as before, so each change of the list is one assignment, computed from what the list held.
class Saves(threading.local):
    """The saves of one writer that are in progress on this thread, the innermost last. Pickles empty."""

    def __init__(self) -> None:
        self._open: list[Save] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Saves, ()

    def begin(self, folder: Folder) -> Save:
        """Begin a save into *folder*."""
        save = Save(folder, _present_stack())
        # A save that is not set up may have failed before that, or may be the one that a handler has interrupted.
        self._open = [*self._open, save][-_MOST_OPEN:]
        return save

    def begin_again(self, prepared: Save) -> Save:
        """Begin the save *prepared* again: with another id, so that it begins now."""
        save = Save(prepared.folder, prepared.begun)
        self._open = [save if other is prepared else other for other in self._open]
        return save

    def prepared(self) -> Save | None:
        """The save that was begun and is not set up yet, if that is the innermost."""
        save = self.innermost()
        return save if save is not None and not save.is_set_up else None

    def innermost(self) -> Save | None:
        """The save in progress that was begun last."""
        return next(iter(self._likeliest_first()), None)

    def _likeliest_first(self) -> list[Save]:
        """The saves, the one first to which the present call of torch belongs.

        That is the innermost one whose `dcp.save` is running. When another save has failed inside of it, more of the
        calls that were running when that one began are over: its `dcp.save`, and the handler that called this.
        """
        now = _present_stack()
        # One whose `begin` is still running was interrupted there, by what calls this.
        found = [save for save in reversed(self._open) if save.returned(now)]
        found.sort(key=lambda save: save.returned(now))  # of equals, the innermost stays first
        return found

    def to_write(self) -> Save | None:
        """The innermost save that is set up and has written nothing."""
        return next((save for save in self._likeliest_first() if save.is_set_up and not save.is_written), None)

    def to_finish(self, paths: Collection[str]) -> Save | None:
        """The save that wrote one of *paths*, else the innermost that wrote."""
        ours = (save for save in reversed(self._open) if any(save.save_id in path for path in paths))
        written = (save for save in self._likeliest_first() if save.is_written)
        return next(ours, None) or next(written, None)

    def end(self, save: Save) -> None:
        """*save* has ended, well or not."""
        self._open = [other for other in self._open if other is not save]
