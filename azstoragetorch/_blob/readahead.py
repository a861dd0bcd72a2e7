"""Serve reads at any position of one blob: `window` decides what is fetched and kept, this carries it out.

Large reads go straight into the caller's memory. All reads see the version of the blob that the first one saw.
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


class _Content:
    """The bytes of a segment as they arrive: ``filled`` of them are in ``buffer``.

    Its loan ends, and its buffer returns to the pool, when nothing refers to it any more: neither the reader's list of
    segments, nor a thread that still receives into it, nor a read that copies from it.
    """

    _pool: BufferPool | None = None
    buffer: memoryview | None = None

    def __init__(self, span: ByteRange, loan: Loan | None, pool: BufferPool | None) -> None:
        self.span = span
        self.loan = loan
        self._pool = pool
        self.scope = Scope()
        self.filled = 0
        self.opened: RangeRead | None = None  # its request, where that was sent already

    def receive(self, open_it: Callable[[Scope], RangeRead], bell: Bell) -> None:
        """Receive all of it; *bell* rings whenever some bytes have arrived."""
        assert self._pool is not None
        assert self.loan is not None
        with on_error(self.loan.release):  # now, even if the error's traceback still refers to this
            self.scope.check()
            opened, self.opened = self.opened or open_it(self.scope), None
            with closing(opened):
                # After an interrupt there is a buffer already, and the same bytes come once more.
                self.buffer = self.buffer or self._pool.take(max(self.loan.amount, len(self.span)))
                opened.receive([self.buffer[: len(self.span)]], partial(self._arrived, bell))

    def _arrived(self, bell: Bell, count: int) -> None:
        self.filled = max(self.filled, count)
        bell.ring()

    def __del__(self) -> None:
        if self._pool is not None and self.buffer is not None and self.buffer.nbytes >= window.MIN_SEGMENT:
            self._pool.give_back(self.buffer)


class _Segment:
    """A piece of the blob that is here or in flight."""

    def __init__(self, content: _Content, job: Job[None] | None, *, is_kept: bool) -> None:
        self.content = content
        self.job = job
        self.is_kept = is_kept

    @property
    def span(self) -> ByteRange:
        """Where it lies."""
        return self.content.span

    @property
    def reserved(self) -> int:
        """Bytes of the budget that it holds."""
        return self.content.loan.amount if self.content.loan is not None else 0

    @classmethod
    def of(cls, data: bytes) -> _Segment:
        """The beginning of the blob, which is here already and costs no budget."""
        content = _Content(ByteRange(0, len(data)), None, None)
        content.buffer = memoryview(data)
        content.filled = len(data)
        return cls(content, None, is_kept=True)

    def drop(self) -> None:
        """Give up what is in flight. Never waits."""
        content = self.content
        if self.job is None:
            return
        if not self.job.give_up():
            content.scope.cancel()
        elif content.opened is not None:
            content.opened.close()


class ReadAhead:
    """Random access to one blob, made fast for sequential readers.

    One reader at a time: the caller serialises. Closing, or fork, drops what is in flight.
    """

    def __init__(self, service: Service, url: BlobURL, version: BlobVersion | None = None, head: bytes = b"") -> None:
        self._service = service
        self._url = url
        self._config = service.config
        self.version = version
        self._head = head  # given by the caller: bytes of the beginning that need not be fetched
        self._process = here()
        self._bell = Bell()  # something has arrived, or will not
        self._segments: list[_Segment] = [_Segment.of(head)] if head else []  # sorted and disjoint
        self._pattern = window.AccessPattern()

    def size(self) -> int:
        """The length of the blob in bytes; the first bytes are in flight after."""
        self._check_process()
        if self.version is None:
            self._open_first()
        assert self.version is not None
        return self.version.size

    @timed("blocked_seconds")
    def read(self, start: int, size: int | None = None) -> bytes:
        """Up to *size* bytes, or everything, from *start* on, as bytes that were never copied."""
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
        """Fill *target* from *start* on, up to the end of the blob; the number of bytes read."""
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
        """Give up what is in flight and free the memory. Never waits; a read in progress fails."""
        self._check_process()
        segments, self._segments = self._segments, []
        self._head = b""
        for segment in segments:
            segment.drop()

    def abandon(self) -> None:
        """`close` on a thread of the engine: for finalizers."""
        if self._segments and self._process is here():
            engine_for(self._config).retire(self.close)

    def _open(self, start: int, length: int, scope: Scope) -> RangeRead | None:
        span = ByteRange(start, start + length)
        opened = open_range(self._service, self._url, span, scope=scope)
        if opened.version.size and not opened.version.etag:
            # Beyond the end: the refusal has the size, but no version to which later reads could be pinned.
            opened.close()
            self._open_first()
            return None
        self.version = opened.version
        return opened

    def _open_first(self) -> None:
        """Learn the version from a request for the first part, whose body keeps arriving meanwhile."""
        engine = engine_for(self._config)
        span = ByteRange(0, self._config.effective_part_size)
        content = _Content(span, engine.budget.take(len(span)), engine.buffers)
        opened = self._open(0, len(span), content.scope)
        assert opened is not None
        content.span = opened.span
        if not len(opened.span) or content.loan is None:
            opened.close()  # without memory to read ahead into, what is asked for comes directly
            return
        content.loan.shrink(window.reserve_for(opened.span, self._config.effective_part_size))
        content.opened = opened
        self._add(engine, content, is_kept=False)

    def _start(self, engine: Engine, span: ByteRange, *, is_kept: bool) -> bool:
        """Have *span* fetched; False without memory for it now."""
        loan = engine.budget.take(window.reserve_for(span, self._config.effective_part_size))
        if loan is None:
            return False
        self._add(engine, _Content(span, loan, engine.buffers), is_kept=is_kept)
        return True

    def _add(self, engine: Engine, content: _Content, *, is_kept: bool) -> None:
        assert self.version is not None
        # The job refers to the content and not to the segment: nothing here refers back to the job.
        open_it = partial(_open_pinned, self._service, self._url, content.span, self.version.etag)
        job = Job(partial(content.receive, open_it, self._bell), self._bell)
        bisect.insort(self._segments, _Segment(content, job, is_kept=is_kept), key=lambda s: s.span.start)
        engine.submit(job.run)

    def _read(self, start: int, target: memoryview, opened: RangeRead | None, scope: Scope) -> None:
        """Fill *target*, all of which lies within the blob."""
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
                self._forget(segment)

    def _fetch_missing(self, span: ByteRange, end: ByteRange | None) -> list[ByteRange]:
        """Have fetched what of *span* is neither here nor in flight, but for what is returned: that comes directly."""
        assert self.version is not None
        engine = engine_for(self._config)
        direct = []
        for gap in gaps(span, self._spans()):
            if len(gap) < window.DIRECT_READ:
                wanted = window.widen(gap, self.version.size, self._spans(), end)
                if self._start(engine, wanted, is_kept=end is not None):
                    continue
            direct.append(gap)
        return direct

    def _fetch_ahead(self, span: ByteRange) -> None:
        """Have fetched what comes behind *span*, as far as there is memory for it."""
        assert self.version is not None
        engine = engine_for(self._config)
        streak, part = self._pattern.streak, self._config.effective_part_size
        for piece in window.segments_ahead(
            span, streak, self.version.size, self._spans(), part, self._config.read_ahead
        ):
            if not self._start(engine, piece, is_kept=False):
                return

    def _spans(self) -> list[ByteRange]:
        return [segment.span for segment in self._segments]

    def _wait(self, segment: _Segment, count: int) -> memoryview:
        """The segment's memory when its first *count* bytes are there."""
        content, job = segment.content, segment.job
        if job is not None and content.filled < count:
            with on_error(partial(self._forget, segment)):  # an interrupt may have ended its receiving
                while content.filled < count and not job.is_over:
                    job.run()  # if its turn has not come, ours has
                    self._bell.wait_until(lambda: content.filled >= count or job.is_over or job.is_open)
            if content.filled < count:
                raise self._failure(job)
        assert content.buffer is not None
        return content.buffer

    def _failure(self, job: Job[None]) -> BaseException:
        """What to raise for *job*. Segments that have failed are forgotten, so that another try begins without them."""
        error = job.error
        for segment in [s for s in self._segments if s.job is not None and s.job.error is not None]:
            self._forget(segment)
        return error or ValueError(f"{self._url} was closed while it was being read")

    def _overlapping(self, span: ByteRange) -> list[_Segment]:
        return [s for s in self._segments if s.span.start < span.stop and span.start < s.span.stop]

    def _forget(self, segment: _Segment) -> None:
        if segment in self._segments:
            self._segments.remove(segment)
        segment.drop()

    def _check_process(self) -> None:
        if self._process is not here():  # forked: the threads that filled our segments are the parent's
            self._process = here()
            self._bell = Bell()
            self._segments = [_Segment.of(self._head)] if self._head else []


def _open_pinned(service: Service, url: BlobURL, span: ByteRange, etag: str, scope: Scope) -> RangeRead:
    return open_range(service, url, span, etag=etag, scope=scope)
