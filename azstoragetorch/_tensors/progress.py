"""Report how far a save or load is."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

ProgressCallback = Callable[[int, int], None]
"""Called with the bytes done and the bytes planned on this rank, from any thread but one call at a time."""

log = logging.getLogger("azstoragetorch")


class ProgressCounter:
    """Counts bytes and reports them. An error of the callback ends the reports with a warning, and nothing else.

    A thread that counts while another one reports leaves its count to that one, so no thread waits for the callback.
    """

    def __init__(self, report: ProgressCallback | None, planned: int) -> None:
        self._report = report
        self._planned = planned
        self._done = 0
        self._counts: deque[int] = deque()
        self._turn: deque[None] = deque([None])  # held by the thread that reports
        self.add(0)

    def add(self, count: int) -> None:
        """*count* bytes more are done."""
        if self._report is None:
            return
        self._counts.append(count)
        # The thread that gives the turn back looks at the counts after that, so none is left behind.
        while self._counts:
            try:
                self._turn.pop()
            except IndexError:
                return
            try:
                self._report_counts()
            finally:
                self._turn.append(None)

    def _report_counts(self) -> None:
        while self._counts and self._report is not None:
            self._done += self._counts.popleft()
            try:
                self._report(self._done, self._planned)
            except Exception:
                self._report = None
                log.warning(
                    "the progress callback failed, so it is not called again; the transfer continues", exc_info=True
                )
        if self._report is None:
            self._counts.clear()


class TqdmProgress:
    """A ``progress=`` callback that shows a tqdm bar; keyword arguments are passed to :class:`tqdm.tqdm`.

    Use one object for one save or load at a time. It can be pickled; the pickle does not contain the bar.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, **options: Any) -> None:
        _tqdm()
        self._options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, **options}
        self._bar: Any = None

    def __call__(self, done: int, planned: int) -> None:
        """Draw *done* of *planned* bytes; the bar is closed when all are done."""
        if self._bar is None:
            self._bar = _tqdm()(total=planned, **self._options)
        self._bar.update(done - self._bar.n)
        if done >= planned:
            self._bar.close()
            self._bar = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bar": None}


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("TqdmProgress needs tqdm: pip install tqdm") from error
    return tqdm
