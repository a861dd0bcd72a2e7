"""Serve reads at any position of one blob from a window that adapts to how it is read.

Sequential reading grows the window until many parts are in flight; jumping about shrinks it to what is asked for;
the end of a blob, where archives keep their directory, is kept once read. Large reads go straight into the
caller's memory. All reads see the version of the blob that the first one saw.
"""

from __future__ import annotations

import bisect
import os
import queue
import threading
from typing import TYPE_CHECKING

from azstoragetorch._blob.download import BlobVersion, RangeRead, fetch_parallel, open_range
from azstoragetorch._blob.ranges import ByteRange, gaps, split
from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch._engine.engine import Engine, Reservation, Scope, engine_for, running_engine
from azstoragetorch._engine.memory import copy, expect_filling, filled_bytes
from azstoragetorch._engine.metrics import timed

if TYPE_CHECKING:
    from azstoragetorch._blob.service import Service
    from azstoragetorch._blob.url import BlobURL

_DIRECT = 1 * MiB  # a gap this large is fetched into the caller's memory; a smaller one joins the window
_RANDOM = 128 * KiB  # fetched around a small read at an unforeseen place: the cost of one round trip at 6 MB/s
_WINDOW_REQUESTS = 16  # a window is cut into about this many requests, so that a small blob also comes in parallel
_MIN_SEGMENT = 4 * MiB
_LARGE_READ_WINDOW = 4  # parts; large reads bring their own parallelism and need to hide only one round trip
_ARCHIVE_STREAK = 4  # reads in sequence that opening an archive counts for


class _Segment:
    """A piece of the blob that is here or on its way. ``filled`` bytes have arrived."""

    def __init__(self, span: ByteRange, reservation: Reservation | None, *, keep: bool = False) -> None:
        self.span = span
        self.keep = keep
        self.reservation = reservation
        self.buffer: memoryview | None = None
        self.filled = 0
        self.is_claimed = False
        self.is_done = False
        self.is_dropped = False
        self.error: BaseException | None = None
        self.scope = Scope()

    @property
    def reserved(self) -> int:
        """Bytes of the budget that it holds."""
        return self.reservation.amount if self.reservation is not None else 0

    @classmethod
    def of(cls, data: bytes) -> _Segment:
        """The beginning of the blob, which is here already and costs no budget."""
        segment = cls(ByteRange(0, len(data)), None, keep=True)
        segment.buffer = memoryview(data)
        segment.filled = len(data)
        segment.is_claimed = segment.is_done = True
        return segment


class ReadAhead:
    """Random access to one blob, made fast for those who read on.

    One reader at a time: the caller serialises. Closing, or fork, drops what is in flight.
    """

    def __init__(self, service: Service, url: BlobURL, version: BlobVersion | None = None, head: bytes = b"") -> None:
        self._service = service
        self._url = url
        self._config = service.config
        self.version = version
        self._pid = os.getpid()
        self._reset()
        self._head = head  # given by the caller: bytes of the beginning that need not be fetched
        self._segments: list[_Segment] = []  # sorted and disjoint
        if head:
            self._segments.append(_Segment.of(head))
        self._previous = ByteRange(0, 0)
        self._streak = 0

    def size(self) -> int:
        """The length of the blob in bytes; the first bytes are on their way after."""
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
        if self.version is None and (start or size is None):
            part = self._config.effective_part_size
            opened = self._open(start, part if size is None else min(size, part), scope)
        try:
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
        if self.version is None:
            if start == 0 and target.nbytes < _DIRECT:
                self._open_first()
            else:
                opened = self._open(start, min(target.nbytes, self._config.effective_part_size), scope)
        try:
            length = min(target.nbytes, max(0, self.size() - start))
            expect_filling(target[:length])
            self._read(start, target[:length], opened, scope)
            return length
        finally:
            if opened is not None:
                opened.close()

    def close(self) -> None:
        """Give up what is in flight and free the memory."""
        self._check_process()
        for segment in self._segments:
            self._drop(segment)
        self._segments = []
        self._head = b""

    def abandon(self) -> None:
        """`close` on a thread of the engine: for finalizers, which may run where this thread holds any lock."""
        engine = running_engine(self._config)
        if engine is not None and self._segments and self._pid == os.getpid():
            engine.retire(self.close)

    def _open(self, start: int, length: int, scope: Scope) -> RangeRead | None:
        span = ByteRange(start, start + length)
        opened = open_range(self._service, self._url, span, scope=scope)
        if opened.version.size and not opened.version.etag:
            # Beyond the end: the refusal tells the size, but no version to which later reads could be pinned.
            opened.close()
            self._open_first()
            return None
        self.version = opened.version
        return opened

    def _open_first(self) -> None:
        """Learn the version from a request for the first part, whose body goes on arriving behind our back."""
        engine = engine_for(self._config)
        span = ByteRange(0, self._config.effective_part_size)
        segment = _Segment(span, Reservation(engine.budget))
        opened = self._open(0, len(span), segment.scope)
        assert opened is not None
        segment.span = opened.span
        segment.is_claimed = True
        if not len(opened.span):
            opened.close()
            return
        try:
            if not self._reserve(segment):
                opened.close()  # no memory to read ahead into: what is asked for comes directly
                return
            self._segments.append(segment)
            engine.submit(lambda: self._fill(engine, segment, opened))
        except BaseException:
            self._forget(segment)  # interrupted: perhaps nobody fills it
            raise

    def _read(self, start: int, target: memoryview, opened: RangeRead | None, scope: Scope) -> None:
        """Fill *target*, all of which lies within the blob."""
        assert self.version is not None
        if not target.nbytes:
            return
        span = ByteRange(start, start + target.nbytes)
        size = self.version.size
        engine = engine_for(self._config)
        tail = ByteRange(max(0, size - min(max(size >> 9, 256 * KiB), 4 * MiB)), size)
        is_tail = start >= tail.start and start > 0
        if not is_tail:
            self._note_access(span)
        received = opened.span if opened is not None else ByteRange(start, start)
        direct = [
            (gap, target[gap.start - start : gap.stop - start])
            for gap in gaps(ByteRange(received.stop, span.stop), [s.span for s in self._segments])
            if len(gap) >= _DIRECT or not self._start(engine, self._around(gap, tail if is_tail else None), is_tail)
        ]
        if is_tail and self._previous.start == 0 < self._previous.stop:
            # The first bytes, then the directory at the end: who opens an archive like that is about to read it.
            self._streak = max(self._streak, _ARCHIVE_STREAK)
            self._advance(engine, self._previous)
        elif self._streak and opened is None:
            self._advance(engine, span)
        if direct or opened is not None:
            first = (opened, target[: len(received)]) if opened is not None else None
            fetch_parallel(self._service, self._url, direct, etag=self.version.etag, scope=scope, opened=first)
        for segment in self._overlapping(span):
            low, high = max(span.start, segment.span.start), min(span.stop, segment.span.stop)
            buffer = self._wait(engine, segment, high - segment.span.start)
            copy(target[low - start : high - start], buffer[low - segment.span.start : high - segment.span.start])
        if not is_tail:
            self._evict(span)

    def _note_access(self, span: ByteRange) -> None:
        previous, self._previous = self._previous, span
        is_next = previous.start <= span.start <= previous.stop + self._config.effective_part_size
        self._streak = min(self._streak + 1, 8) if is_next and previous.stop else 0

    def _around(self, gap: ByteRange, tail: ByteRange | None) -> ByteRange:
        """What to fetch for a small *gap*: the whole tail, or some bytes more up to the next segment."""
        assert self.version is not None
        wanted = tail or ByteRange(gap.start, min(max(gap.stop, gap.start + _RANDOM), self.version.size))
        for piece in gaps(wanted, [s.span for s in self._segments]):
            if piece.start <= gap.start and gap.stop <= piece.stop:
                return piece
        return gap

    def _advance(self, engine: Engine, span: ByteRange) -> None:
        """Have the window behind *span* on its way."""
        assert self.version is not None
        part = self._config.effective_part_size
        window = min(self._config.read_ahead, part << self._streak)
        if len(span) >= part:
            window = min(window, part * _LARGE_READ_WINDOW)
        size = self.version.size
        limit = min(part, max(_MIN_SEGMENT, -(-size // _WINDOW_REQUESTS // MiB) * MiB))
        ahead = ByteRange(min(span.stop, size), min(span.stop + window, size))
        for gap in gaps(ahead, [s.span for s in self._segments]):
            for piece in split(gap, limit):
                if len(piece) < limit and piece.stop == ahead.stop < size:
                    return  # too little to be worth a request; the next read will see more
                if not self._start(engine, piece, keep=False):
                    return

    def _start(self, engine: Engine, span: ByteRange, keep: bool) -> bool:
        """Put *span* on its way; False if there is no memory for it now."""
        segment = _Segment(span, Reservation(engine.budget), keep=keep)
        try:
            if not self._reserve(segment):
                return False
            bisect.insort(self._segments, segment, key=lambda s: s.span.start)
            engine.submit(lambda: self._fetch(engine, segment))
        except BaseException:
            self._forget(segment)
            raise
        return True

    def _reserve(self, segment: _Segment) -> bool:
        part = self._config.effective_part_size
        length = len(segment.span)
        amount = part if _MIN_SEGMENT <= length <= part else length  # buffers of one size can be reused
        return segment.reservation is not None and segment.reservation.take(amount)

    def _fetch(self, engine: Engine, segment: _Segment) -> None:
        with self._lock:
            if segment.is_claimed:
                return
            segment.is_claimed = True
        self._fill(engine, segment, None)

    def _fill(self, engine: Engine, segment: _Segment, opened: RangeRead | None) -> None:
        def arrived(count: int) -> None:
            segment.filled = count
            self._news.put(None)

        try:
            segment.scope.check()
            assert self.version is not None
            if opened is None:
                opened = open_range(self._service, self._url, segment.span, etag=self.version.etag, scope=segment.scope)
            segment.buffer = engine.buffers.take(segment.reserved)
            opened.receive([segment.buffer[: len(segment.span)]], arrived)
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for it
            segment.error = error
            if opened is not None:
                opened.close()
        finally:
            with self._lock:
                segment.is_done = True
                is_dropped = segment.is_dropped
            self._news.put(None)
            if is_dropped:
                _free(engine, segment)

    def _wait(self, engine: Engine, segment: _Segment, count: int) -> memoryview:
        """The segment's memory when its first *count* bytes are there."""
        try:
            with self._lock:
                must_fetch, segment.is_claimed = not segment.is_claimed, True
            if must_fetch:
                self._fill(engine, segment, None)  # its turn has not come; ours has
            while segment.filled < count and not segment.is_done:
                self._news.get()
        except BaseException:
            self._forget(segment)
            raise
        if segment.filled < count:
            for failed in [s for s in self._segments if s.error is not None]:
                self._forget(failed)  # another try begins anew, not with what failed before it
            assert segment.error is not None
            raise segment.error
        assert segment.buffer is not None
        return segment.buffer

    def _overlapping(self, span: ByteRange) -> list[_Segment]:
        return [s for s in self._segments if s.span.start < span.stop and span.start < s.span.stop]

    def _evict(self, span: ByteRange) -> None:
        """Free what a sequential reader has passed, and the oldest of what a random one collected."""
        passed = [s for s in self._segments if s.span.stop <= span.start and not s.keep]
        others = [s for s in self._segments if s.span.start >= span.stop and not s.keep]
        held = sum(s.reserved for s in self._segments)
        limit = max(self._config.read_ahead, self._config.effective_part_size)
        if self._streak:
            others = []
        while passed[:-1] if self._streak else held > limit and (passed or others):
            victim = passed.pop(0) if passed else others.pop()
            held -= victim.reserved
            self._forget(victim)

    def _forget(self, segment: _Segment) -> None:
        if segment in self._segments:
            self._segments.remove(segment)
        self._drop(segment)

    def _drop(self, segment: _Segment) -> None:
        engine = engine_for(self._config)
        with self._lock:
            is_idle = segment.is_done or not segment.is_claimed
            segment.is_claimed = segment.is_dropped = True
        if is_idle:
            _free(engine, segment)
        else:
            segment.scope.cancel()

    def _reset(self) -> None:
        # Not a Condition: an interrupt in its wait can come out as a RuntimeError.
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # something has arrived, or will not

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # forked: the threads that filled our segments are the parent's
            self._pid = os.getpid()
            self._reset()
            self._segments = [_Segment.of(self._head)] if self._head else []


def _free(engine: Engine, segment: _Segment) -> None:
    buffer, segment.buffer = segment.buffer, None
    if buffer is not None and segment.reserved >= _MIN_SEGMENT:
        engine.buffers.give_back(buffer)
    if segment.reservation is not None:
        segment.reservation.release()
