"""The writing half of `BlobIO`: bytes are only ever appended, and what would be misplaced is never committed.

**Going back.** A blob is written from start to end. Some libraries go back to fill in a header (WAV, TIFF), and some of
those ignore that `seek` is refused and write on, so that the header ends up behind the data. Other libraries seek only
to find out whether they can, and then do without. The two differ in where they believe to be when they write next:

* A seek to where the writer is anyway can do no harm, refused or not. Libraries that ask (zipfile) seek to what `tell`
  has just returned, or to 0 before anything is written: they get the answer that is true, a refusal. Every other seek
  to the current place works.
* A seek to elsewhere is refused, but remembered: a library that ignores the refusal believes to be there. If it writes
  before it has gone back to the end, those bytes are misplaced, and nothing is committed any more.
* A seek to 0 works, since some libraries end with it (`torch.export.save`). What is written there is misplaced, too.

Misplaced bytes are counted and dropped, because the libraries in question would ignore an error as well. `commit` says
what happened.

**Dropped wrappers.** A finalizer must not wait for uploads, so it only leaves its bytes here: the next call that may
wait takes them, in order, or they are dropped with the writer.
"""

from __future__ import annotations

import errno
import io
from collections import deque
from typing import TYPE_CHECKING, NoReturn

from azstoragetorch._engine.scope import on_error
from azstoragetorch.exceptions import FatalBlobIOWriteError
from azstoragetorch.io._arguments import InvalidSeekError

if TYPE_CHECKING:
    from azstoragetorch._blob.client import BlockWriter

_ADVICE = (
    "a blob is written from start to end; write a format that goes back, such as WAV, TIFF or HDF5, to io.BytesIO or "
    "a temporary file, and copy that into the blob"
)


class Writer:
    """What is written to one blob. One call at a time, except for `leave` and `cancel`."""

    __slots__ = ("_asks", "_believed", "_blocks", "_left", "_lost", "_name", "_problem")

    def __init__(self, blocks: BlockWriter, name: str) -> None:
        self._blocks = blocks
        self._name = name
        self._asks = True  # whether a seek to the current place could be meant as a question
        self._believed: int | None = None  # where the caller believes to be, if that is not the end
        self._lost = 0  # misplaced bytes, and those that came after them
        self._left: deque[bytes] = deque()  # by finalizers
        self._problem: str | None = None  # why nothing will be committed

    @property
    def written(self) -> int:
        """Bytes taken so far."""
        return self._blocks.written

    def tell(self) -> int:
        """The position, as far as the caller can know."""
        self._asks = True
        return self._end if self._believed is None else self._believed

    def write(self, data: memoryview) -> None:
        """Append *data*."""
        if self._left:
            self._take_what_was_left()
        self._asks = False
        if self._believed is None and self._problem is None:
            self._blocks.write(data)
        elif data.nbytes:
            self._problem = self._problem or f"bytes were written after a seek to {self._believed}: {_ADVICE}"
            self._believed = None
            self._lost += data.nbytes

    def seek(self, offset: int, whence: int) -> int:
        """Go to the current place or to 0; see the module for what else is understood."""
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        end = self._end
        target = offset + (0, end if self._believed is None else self._believed, end)[whence]
        if target < 0:
            raise InvalidSeekError(errno.EINVAL, f"cannot seek to the negative position {target}")
        is_question, self._asks = self._asks and whence == io.SEEK_SET and self._believed is None, False
        self._believed = target if target != end else None
        if target in (0, end) and not (target == end and is_question):
            return target
        place = f"cannot go to byte {target} of {end}" if target != end else "is not seekable"
        raise io.UnsupportedOperation(f"seek: {self._name} {place}: {_ADVICE}")

    def truncate(self, size: int) -> NoReturn:
        """Refused; a caller that ignores this does not get the longer blob."""
        if size != self._end:
            self._problem = self._problem or f"it was truncated to {size} bytes: {_ADVICE}"
        raise io.UnsupportedOperation(f"truncate: {self._name} cannot be truncated: {_ADVICE}")

    def flush(self) -> None:
        """Wait for the uploads that are in progress."""
        self._take_what_was_left()
        self._check()
        self._blocks.flush()

    def commit(self) -> None:
        """Make everything written the content of the blob; raise, and give up, if that cannot be done."""
        with on_error(self._blocks.abort):
            self._take_what_was_left()
            self._check()
            self._blocks.commit()

    def leave(self, data: memoryview) -> None:
        """Append *data* later: for finalizers."""
        self._left.append(bytes(data))

    def abort(self) -> None:
        """Commit nothing."""
        self._blocks.abort()

    def cancel(self) -> None:
        """Stop the uploads that are in progress; never waits."""
        self._blocks.cancel()

    @property
    def _end(self) -> int:
        return self._blocks.written + self._lost

    def _take_what_was_left(self) -> None:
        if not self._left or self._problem is not None:
            return
        self._problem = "writing what a dropped wrapper had left was interrupted"
        while self._left:
            self._blocks.write(memoryview(self._left.popleft()))
        self._problem = None

    def _check(self) -> None:
        if self._problem is not None:
            raise FatalBlobIOWriteError(f"{self._name}: nothing was committed: {self._problem}")
