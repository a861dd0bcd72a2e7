"""Read one blob at any position, with read-ahead. `window` plans what is fetched and evicted; this module does it.

Large reads are received directly into the caller's memory. Every read sees the version of the blob that the first one
saw.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from azstoragetorch._blob import window
from azstoragetorch._blob.download import BlobVersion, RangeRead, fetch_parallel, open_range
from azstoragetorch._engine.job import Bell, Job
from azstoragetorch._engine.memory import copy, expect_filling, filled_bytes
from azstoragetorch._engine.metrics import timed
from azstoragetorch._engine.process import here
from azstoragetorch._engine.ranges import ByteRange, gaps
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import Engine, engine_for

if TYPE_CHECKING:
    from azstoragetorch._blob.service import Service
    from azstoragetorch._blob.url import BlobURL
    from azstoragetorch._engine.budget import BufferPool, Loan


# The life of a segment
# ---------------------
# A segment is a range of the blob with the bytes that have arrived so far. Three parties refer to it: the reader's list
# (`_segments`), the thread that receives it, and a read that waits for its bytes and copies them.
#
#     planned     `window` names a range. The segment is created only if the memory budget lends its bytes at once: a
#                 reader never waits for memory here, since other readers may hold it until this thread reads further.
#                 Without memory a requested range is fetched into the caller's memory, and read-ahead is skipped.
#     in flight   its `Job` was submitted to the engine. If no thread has claimed it when a read needs it, the reading
#                 thread claims it and receives it itself, so a reader makes progress with every engine thread busy.
#                 `filled` only grows, and the bell rings when it does, so a read takes its bytes as they arrive.
#     complete    the job is over without an error; `filled` is the length.
#     failed      the job is over with an error. The read that needs the bytes raises it, and all segments that are not
#                 complete are removed: the next read starts again, and does not raise an error of a request that was
#                 sent before. Errors of segments that nobody reads are never raised.
#     evicted     removed from the list: its job is given up and its request, if one is in flight, is cancelled.
#
# A buffer goes back to the pool when the last of the three parties drops its reference (`_Content.__del__`), not when
# the segment is evicted: the receiving thread may write into it until it notices the cancel. For the same reason the
# job refers to the content, never to the segment: in a reference cycle the memory would be freed only by a garbage
# collection.
#
# An interrupt (Ctrl-C, or an exception from a signal handler) can end `receive` on the reading thread, or its wait for
# another thread. Either way the segments that are not complete are removed while the interrupt propagates, and the next
# read fetches the bytes again. An interrupt between entering a segment in the list and submitting its job leaves an
# open job, which the read that needs it runs. `_pattern` may have been updated already, which costs at most some
# read-ahead.


class _Content:
    """The bytes of a segment: ``buffer`` holds the first ``filled`` of them.

    The loan ends and the buffer returns to the pool when the last reference to this object is dropped: by the reader's
    list of segments, by the thread that receives, and by a read that copies.
    """

    _pool: BufferPool | None = None
    buffer: memoryview | None = None

    def __init__(self, span: ByteRange, loan: Loan | None, pool: BufferPool | None) -> None:
        self.span = span
        self.loan = loan
        self._pool = pool
        self.scope = Scope()
        self.filled = 0
        self.opened: RangeRead | None = None  # its request, if that was already sent

    def receive(self, open_it: Callable[[Scope], RangeRead], bell: Bell) -> None:
        """Receive all bytes of the segment; ring *bell* whenever some have arrived."""
        assert self._pool is not None
        assert self.loan is not None
        with on_error(self.loan.release):  # at once: the traceback of the error can keep this object alive
            self.scope.check()
            opened, self.opened = self.opened or open_it(self.scope), None
            with closing(opened):
                # After an interrupt the buffer exists already, and the same bytes are received again.
                self.buffer = self.buffer or self._pool.take(max(self.loan.amount, len(self.span)))
                opened.receive([self.buffer[: len(self.span)]], partial(self._arrived, bell))

    def _arrived(self, bell: Bell, count: int) -> None:
        self.filled = max(self.filled, count)
        bell.ring()

    def __del__(self) -> None:
        if self._pool is not None and self.buffer is not None and self.buffer.nbytes >= window.MIN_SEGMENT:
            self._pool.give_back(self.buffer)


class _Segment:
    """A range of the blob that is in memory or in flight."""

    def __init__(self, content: _Content, job: Job[None] | None, *, is_kept: bool) -> None:
        self.content = content
        self.span = content.span
        self.job = job
        self.is_kept = is_kept

    @property
    def reserved(self) -> int:
        """Bytes of the memory budget that it holds."""
        return self.content.loan.amount if self.content.loan is not None else 0

    @classmethod
    def of(cls, data: bytes) -> _Segment:
        """A segment for *data*, the beginning of the blob, which the caller holds; it needs no loan."""
        content = _Content(ByteRange(0, len(data)), None, None)
        content.buffer = memoryview(data)
        content.filled = len(data)
        return cls(content, None, is_kept=True)

    def cancel(self) -> None:
        """Cancel the request if it is in flight. Never waits."""
        content = self.content
        if self.job is None:
            return
        if not self.job.give_up():
            content.scope.cancel()
        elif content.opened is not None:
            content.opened.close()


class ReadAhead:
    """Random access to one blob, with read-ahead for sequential readers.

    Not thread-safe: the caller serializes the calls. `close` cancels what is in flight; a forked child forgets it.
    """

    def __init__(self, service: Service, url: BlobURL, version: BlobVersion | None = None, head: bytes = b"") -> None:
        self._service = service
        self._url = url
        self._config = service.config
        self.version = version
        self._head = head  # the beginning of the blob, which the caller already has
        self._process = here()
        self._bell = Bell()  # rings when bytes have arrived, or a segment has failed
        self._segments: list[_Segment] = [_Segment.of(head)] if head else []  # sorted and disjoint
        self._pattern = window.AccessPattern()

    def size(self) -> int:
        """The length of the blob in bytes. If it is not known, this requests the first part, which stays in flight."""
        self._check_process()
        if self.version is None:
            self._open_first()
        assert self.version is not None
        return self.version.size

    @timed("blocked_seconds")
    def read(self, start: int, size: int | None = None) -> bytes:
        """Read up to *size* bytes, or all, from *start*. Large reads are received into the result without a copy."""
        self._check_process()
        opened: RangeRead | None = None
        scope = Scope()
        try:
            if self.version is None and (start or size is None):
                part = self._config.effective_part_size
                opened = self._open(start, part if size is None else min(size, part), scope)
            length = max(0, self.size() - start)
            length = length if size is None else min(size, length)
            if start == 0 and length == len(self._head):
                return self._head
            return filled_bytes(length, lambda view: self._read(start, view, opened, scope))
        finally:
            if opened is not None:
                opened.close()

    @timed("blocked_seconds")
    def readinto(self, start: int, target: memoryview) -> int:
        """Read from *start* into *target*; return the number of bytes, which is smaller only at the end of the blob."""
        self._check_process()
        if not target.nbytes:
            return 0
        opened: RangeRead | None = None
        scope = Scope()
        try:
            if self.version is None:
                if start == 0 and target.nbytes < window.DIRECT_READ:
                    self._open_first()
                else:
                    opened = self._open(start, min(target.nbytes, self._config.effective_part_size), scope)
            length = min(target.nbytes, max(0, self.size() - start))
            expect_filling(target[:length])
            self._read(start, target[:length], opened, scope)
            return length
        finally:
            if opened is not None:
                opened.close()

    def close(self) -> None:
        """Cancel what is in flight and free the memory. Never waits; a read in progress raises an error."""
        self._check_process()
        segments, self._segments = self._segments, []
        self._head = b""
        for segment in segments:
            segment.cancel()

    def abandon(self) -> None:
        """Close on a thread of the engine. For finalizers, which must not run `close` themselves."""
        if self._segments and self._process is here():
            engine_for(self._config).retire(self.close)

    def _open(self, start: int, length: int, scope: Scope) -> RangeRead | None:
        span = ByteRange(start, start + length)
        opened = open_range(self._service, self._url, span, scope=scope)
        if opened.version.size and not opened.version.etag:
            # Beyond the end: the response has the size of the blob, but not the ETag to pin later reads to.
            opened.close()
            self._open_first()
            return None
        self.version = opened.version
        return opened

    def _open_first(self) -> None:
        """Request the first part, whose headers have the version. Its body is received in the background."""
        engine = engine_for(self._config)
        span = ByteRange(0, self._config.effective_part_size)
        content = _Content(span, engine.budget.take(len(span)), engine.buffers)
        opened = self._open(0, len(span), content.scope)
        assert opened is not None
        content.span = opened.span
        if not len(opened.span) or content.loan is None:
            opened.close()  # no memory for a segment: receive the read directly
            return
        content.loan.shrink(window.reserve_for(opened.span, self._config.effective_part_size))
        content.opened = opened
        self._add(engine, content, is_kept=False)

    def _start(self, span: ByteRange, *, is_kept: bool) -> bool:
        """Start to fetch *span*; return False if the budget has no memory for it now."""
        engine = engine_for(self._config)
        loan = engine.budget.take(window.reserve_for(span, self._config.effective_part_size))
        if loan is None:
            return False
        self._add(engine, _Content(span, loan, engine.buffers), is_kept=is_kept)
        return True

    def _add(self, engine: Engine, content: _Content, *, is_kept: bool) -> None:
        assert self.version is not None
        # The job refers to the content, not to the segment, which refers to the job: no reference cycle.
        open_it = partial(_open_pinned, self._service, self._url, content.span, self.version.etag)
        job = Job(partial(content.receive, open_it, self._bell), self._bell)
        bisect.insort(self._segments, _Segment(content, job, is_kept=is_kept), key=lambda s: s.span.start)
        engine.submit(job.run)

    def _read(self, start: int, target: memoryview, opened: RangeRead | None, scope: Scope) -> None:
        """Fill *target*, which must lie within the blob. *opened* is a request for its first bytes, if one was sent."""
        assert self.version is not None
        if not target.nbytes:
            return
        span = ByteRange(start, start + target.nbytes)
        part = self._config.effective_part_size
        end = window.tail(self.version.size)
        is_tail = start >= end.start and start > 0
        self._pattern = self._pattern.after_tail() if is_tail else self._pattern.after(span, part)
        received = opened.span if opened is not None else ByteRange(start, start)
        direct = self._fetch_missing(ByteRange(received.stop, span.stop), end if is_tail else None)
        if not is_tail and self._pattern.streak and opened is None:
            self._fetch_ahead(span)
        elif is_tail and self._pattern.previous.start == 0 < self._pattern.previous.stop:
            self._fetch_ahead(self._pattern.previous)
        with on_error(self._remove_unfinished):
            if direct or opened is not None:
                jobs = [(gap, target[gap.start - start : gap.stop - start]) for gap in direct]
                first = (opened, target[: len(received)]) if opened is not None else None
                fetch_parallel(self._service, self._url, jobs, etag=self.version.etag, scope=scope, opened=first)
            for segment in self._overlapping(span):
                low, high = max(span.start, segment.span.start), min(span.stop, segment.span.stop)
                buffer = self._wait(segment, high - segment.span.start)
                copy(target[low - start : high - start], buffer[low - segment.span.start : high - segment.span.start])
        if not is_tail:
            limit = max(self._config.read_ahead, part)
            for segment in window.to_evict(self._segments, span, self._pattern.streak, limit):
                self._remove(segment)

    def _fetch_missing(self, span: ByteRange, end: ByteRange | None) -> list[ByteRange]:
        """Start to fetch the gaps of *span* as segments; return those that are to be received directly."""
        assert self.version is not None
        direct = []
        for gap in gaps(span, self._spans()):
            if len(gap) < window.DIRECT_READ:
                wanted = window.extend(gap, self.version.size, self._spans(), end)
                if self._start(wanted, is_kept=end is not None):
                    continue
            direct.append(gap)
        return direct

    def _fetch_ahead(self, span: ByteRange) -> None:
        """Start to read ahead after *span*, as far as the budget has memory."""
        assert self.version is not None
        streak, part = self._pattern.streak, self._config.effective_part_size
        for piece in window.segments_ahead(
            span, streak, self.version.size, self._spans(), part, self._config.read_ahead
        ):
            if not self._start(piece, is_kept=False):
                return

    def _spans(self) -> list[ByteRange]:
        return [segment.span for segment in self._segments]

    def _wait(self, segment: _Segment, count: int) -> memoryview:
        """Wait until the first *count* bytes of *segment* have arrived; return its buffer."""
        content, job = segment.content, segment.job
        if job is not None and content.filled < count:
            while content.filled < count and not job.is_over:
                job.run()  # receive it here if no thread has started
                self._bell.wait_until(lambda: content.filled >= count or job.is_over or job.is_open)
            if content.filled < count:
                raise job.error or ValueError(f"{self._url} was closed while it was being read")
        assert content.buffer is not None
        return content.buffer

    def _remove_unfinished(self) -> None:
        """After an error or interrupt: the next read fetches these again, and raises no error that is older than it."""
        for segment in [s for s in self._segments if s.job is not None and not s.job.has_result]:
            self._remove(segment)

    def _overlapping(self, span: ByteRange) -> list[_Segment]:
        return [s for s in self._segments if s.span.start < span.stop and span.start < s.span.stop]

    def _remove(self, segment: _Segment) -> None:
        if segment in self._segments:
            self._segments.remove(segment)
        segment.cancel()

    def _check_process(self) -> None:
        if self._process is not here():  # forked: the threads that fill these segments exist only in the parent
            self._process = here()
            self._bell = Bell()
            self._segments = [_Segment.of(self._head)] if self._head else []


def _open_pinned(service: Service, url: BlobURL, span: ByteRange, etag: str, scope: Scope) -> RangeRead:
    return open_range(service, url, span, etag=etag, scope=scope)
