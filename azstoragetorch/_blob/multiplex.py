"""Read many small blobs at once on one thread.

Sixty-four threads that each wait for one response spend more time passing the interpreter lock around than on the
responses. Here each request is sent at once on an idle connection, and one thread receives all responses. It handles
only the common case, a complete 206 response. In every other case it reports that the read failed, and the caller reads
the blob again with `open_range`, which retries, renews tokens and raises errors.
"""

from __future__ import annotations

import re
import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from ssl import SSLWantReadError

from azstoragetorch._blob.connection import Connection
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.service import Service
from azstoragetorch._blob.transport import give_back, parse_head, take_idle
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.memory import bytes_to_fill
from azstoragetorch._engine.metrics import THROTTLED, count, count_answer
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Cancelled, Hold, Scope, on_error
from azstoragetorch._engine.threads import Engine, start_thread

_CONTENT_RANGE = re.compile(r"bytes 0-(\d+)/(\d+)")
_MAX_HEAD_BYTES = 16 << 10  # of a response: status line and headers
_POLL_SECONDS = 0.25  # between two checks for stalled reads
_STUCK_SECONDS = 10.0  # without a step of the thread, after which others do not count on it
_IDLE_SECONDS = 0.5  # for which the thread waits for another read before it exits


class Multiplexer:
    """The reads of one engine that are in flight on one thread, which is not one of the engine's threads."""

    # `begin` runs on any thread, also in a signal handler that interrupts another `begin`, so neither side takes a
    # lock. They share four things: `_reads` (descriptor -> read), `_watched` (descriptor -> the connection for which
    # it was registered), the epoll set, and `_turns`, which says whether the thread runs. A connection is used by one
    # request at a time, so there is at most one read for a descriptor.
    #
    # A read ends once, by the call that removes it from `_reads` (`_claim`). The thread removes it after a complete
    # response, an error (a cancel of its scope shuts the socket down, which is an error here) or a stall, and calls
    # `done` or `failed`. An interrupted `begin` removes its own read, closes the connection and raises.
    #
    # Registration. A connection stays registered when it goes back to the pool, which saves two system calls for each
    # read. The price: it can become readable while another request uses it, or when the service closes it, and
    # level-triggered epoll reports that again and again. So the thread unregisters a descriptor that has no read. A
    # read that begins just then must not be lost:
    #
    #     begin:   1. enter the read in `_reads`        thread:  1. remove it from `_watched`, unregister
    #              2. look in `_watched`; register               2. look in `_reads`; register if there is a read now
    #                 if it is not there
    #
    # If `begin` finds the descriptor in `_watched`, it entered the read before the thread's step 1, so the thread's
    # step 2 finds the read. If it registers before the thread has unregistered, the same holds. Both may register: the
    # second call gets FileExistsError.
    #
    # The thread. `_turns` holds the turn of the one thread that runs. `begin` enters its read first and then a turn,
    # with `setdefault`, which keeps a turn that is there. A thread that has had no read for `_IDLE_SECONDS` removes its
    # turn first and then looks for reads. So at least one of the two sees the other. A thread that finds a read enters
    # its turn again, or exits if another `begin` was faster and has entered one. The same holds for a thread that dies,
    # after it has failed all reads. Only the thread that has taken a turn removes it.
    #
    # A `begin` that finds a turn for which no thread was started yet starts one too. The `begin` that entered the turn
    # may have been ended by an interrupt, or it waits below a signal handler that waits for a read of its own. Of the
    # threads that are started for one turn, the first one to `take` it runs, and the others exit. A `begin` that cannot
    # start a thread takes the turn as well, to fail all reads.
    #
    # The collector runs finalizers of the user on any thread, also on this one, and a finalizer may wait: for a read,
    # or for another thread that waits for one. So a thread that waits for a read asks `is_stuck`, and reads the blob
    # itself if it is the one that would receive the read, or if that one has not taken a step for long. `begin` then
    # begins nothing.

    def __init__(self) -> None:
        self._reads: dict[int, _Read] = {}  # by descriptor
        self._watched: dict[int, Connection] = {}  # registered, also while other requests use them
        self._epoll = select.epoll()
        self._turns: dict[None, _Turn] = {}  # the turn of the thread that runs, if one does
        self._last_active = self._last_sweep = self._last_step = 0.0

    def is_stuck(self) -> bool:
        """Whether the thread has to wait for the caller, or has not taken a step for long."""
        turn = self._turns.get(None)
        if turn is None:
            return False
        if turn.owner is not None and turn.owner.thread == threading.get_ident():
            return True
        return time.monotonic() - max(turn.began, self._last_step) > _STUCK_SECONDS

    def begin(
        self,
        service: Service,
        url: BlobURL,
        length: int,
        scope: Scope,
        done: Callable[[BlobVersion, bytes], None],
        failed: Callable[[], None],
    ) -> bool:
        """Start to read the first *length* bytes; return False if the request cannot be sent now.

        That is so if no connection is idle, or if the service throttles: then a thread waits for its turn.

        If it returns True, exactly one of *done* and *failed* is called: later on another thread, or before the return
        if no thread can be started.
        """
        entry = None if self.is_stuck() else service.admission.enter_now()
        connection = None if entry is None else take_idle(service.origin)
        if connection is None or entry is None:
            return False
        hold = scope.holding(connection.interrupt)
        try:
            hold.__enter__()
            target, headers = service.sign(url, {"x-ms-range": ByteRange(0, length).header})
            descriptor = connection.begin(target, headers).fileno()
        except BaseException as error:
            hold.leave()
            connection.close()
            if isinstance(error, (Cancelled, OSError)):
                return False
            raise
        note = partial(service.note_status, entry)
        read = _Read(connection, hold, length, headers["x-ms-client-request-id"], note, done, failed)
        try:
            self._reads[descriptor] = read
            self._watch(descriptor, connection)
            self._start()
        except BaseException:
            if self._claim(descriptor, read):
                hold.leave()
                connection.close()
            raise
        return True

    def _claim(self, descriptor: int, read: _Read) -> bool:
        """Remove *read*; return whether it was still there, so that the caller is the one that ends it."""
        return self._reads.get(descriptor) is read and self._reads.pop(descriptor, None) is read

    def _watch(self, descriptor: int, connection: Connection) -> None:
        if self._watched.get(descriptor) is not connection:
            self._register(descriptor, connection)

    def _register(self, descriptor: int, connection: Connection) -> None:
        self._watched[descriptor] = connection
        with suppress(FileExistsError):  # the thread has registered it
            self._epoll.register(descriptor, select.EPOLLIN)

    def _start(self) -> None:
        """Start the thread if it is not running."""
        turn, me = self._turns.setdefault(None, _Turn()), _Owner(0)
        if turn.is_started:
            return
        with on_error(partial(self._fail_all, turn, me)):
            if start_thread(partial(self._run, turn)):
                turn.is_started = True
            elif turn.take(me):
                self._fail_all(turn, me)

    def _fail_all(self, turn: _Turn, me: _Owner) -> None:
        """Fail all reads and end *turn*, if *me* has taken it. After an interrupt, call it again."""
        while turn.owner is me and self._turns.setdefault(None, turn) is turn:
            for descriptor, read in list(self._reads.items()):
                self._end(descriptor, read, is_good=False)
            self._turns.pop(None, None)
            if not self._reads:
                return

    def _has_ended(self, turn: _Turn) -> bool:
        self._turns.pop(None, None)
        return not self._reads or self._turns.setdefault(None, turn) is not turn

    def _run(self, turn: _Turn) -> None:
        me = _Owner(threading.get_ident())
        with on_error(partial(self._fail_all, turn, me)):
            if not turn.take(me):
                return
            scratch = memoryview(bytearray(_MAX_HEAD_BYTES))
            self._last_active = time.monotonic()
            while self._is_wanted() or not self._has_ended(turn):
                for descriptor, _ in self._epoll.poll(_POLL_SECONDS):
                    self._advance(descriptor, scratch)
                self._drop_stalled()

    def _is_wanted(self) -> bool:
        return bool(self._reads) or time.monotonic() - self._last_active < _IDLE_SECONDS

    def _advance(self, descriptor: int, scratch: memoryview) -> None:
        read = self._reads.get(descriptor)
        if read is None:  # another request uses the connection, or the service has closed it
            self._unwatch(descriptor)
            read = self._reads.get(descriptor)
            if read is not None:  # `begin` may have found it still watched: see above
                self._register(descriptor, read.connection)
            return
        self._last_step = self._last_active = read.last_active = time.monotonic()
        try:
            if read.advance(scratch):
                self._end(descriptor, read, is_good=True)
        except (OSError, HTTPException, _UnexpectedResponseError):
            self._end(descriptor, read, is_good=False)

    def _drop_stalled(self) -> None:
        now = self._last_step = time.monotonic()
        if now - self._last_sweep < _POLL_SECONDS:
            return
        self._last_sweep = now
        for descriptor, read in list(self._reads.items()):
            if now - read.last_active > read.connection.origin.read_timeout:
                self._end(descriptor, read, is_good=False)

    def _end(self, descriptor: int, read: _Read, *, is_good: bool) -> None:
        if self._claim(descriptor, read):
            if not is_good:
                self._unwatch(descriptor)
            read.end(is_good)

    def _unwatch(self, descriptor: int) -> None:
        self._watched.pop(descriptor, None)
        with suppress(OSError):  # it is closed, or an interrupt came before it was registered
            self._epoll.unregister(descriptor)


class _Owner:
    """Who has a turn: *thread*, or 0 for a call that fails all reads."""

    __slots__ = ("thread",)

    def __init__(self, thread: int) -> None:
        self.thread = thread


class _Turn:
    """The turn of one thread. Several may be started for it; the first one to take it has it for good."""

    __slots__ = ("_owners", "began", "is_started")

    def __init__(self) -> None:
        self._owners: dict[None, _Owner] = {}
        self.began = time.monotonic()
        self.is_started = False  # at least one thread was

    def take(self, me: _Owner) -> bool:
        """Take it for *me*; return False if it was taken before."""
        return self._owners.setdefault(None, me) is me

    @property
    def owner(self) -> _Owner | None:
        """Who has taken it."""
        return self._owners.get(None)


class _UnexpectedResponseError(Exception):
    """The response is not one that this module handles."""


class _Read:
    """One response in flight."""

    def __init__(
        self,
        connection: Connection,
        hold: Hold,
        length: int,
        request_id: str,
        note: Callable[[int, str, Mapping[str, str]], None],
        done: Callable[[BlobVersion, bytes], None],
        failed: Callable[[], None],
    ) -> None:
        self.connection = connection
        self._socket = connection.socket
        self.last_active = time.monotonic()
        self._hold = hold
        self._length = length
        self._request_id = request_id
        self._note = note  # the status, for the admission
        self._done = done
        self._failed = failed
        self._began = time.perf_counter()
        self._head = b""
        self._version: BlobVersion | None = None
        self._data = b""
        self._missing = memoryview(b"")

    def advance(self, scratch: memoryview) -> bool:
        """Receive what has arrived; return whether the response is complete."""
        sock = self._socket
        try:
            while self._version is None:
                self._take_head(scratch[: self._receive(sock.recv_into(scratch))])
            while self._missing:
                self._missing = self._missing[self._receive(sock.recv_into(self._missing)) :]
        except (BlockingIOError, SSLWantReadError):
            return False
        return True

    def end(self, is_good: bool) -> None:
        """Call *done* or *failed*. The connection goes back to the pool only after a complete response."""
        self._hold.leave()
        if is_good and self._version is not None and not self._hold.was_woken:
            count("bytes_received", len(self._data))
            give_back(self.connection)
            self._done(self._version, self._data)
        else:
            self.connection.close()
            self._failed()

    @staticmethod
    def _receive(received: int) -> int:
        if not received:
            raise _UnexpectedResponseError  # the connection was closed
        return received

    def _take_head(self, arrived: memoryview) -> None:
        self._head += arrived
        head, end, body = self._head.partition(b"\r\n\r\n")
        if not end:
            if len(self._head) > _MAX_HEAD_BYTES:
                raise _UnexpectedResponseError
            return
        self._version = self._check(head)
        count_answer(time.perf_counter() - self._began, 206, 0)
        size = min(self._length, self._version.size)
        if len(body) > size or size == 1 > len(body):
            raise _UnexpectedResponseError
        self._head = b""
        if len(body) == size:
            self._data = body
            return
        self._data, view = bytes_to_fill(size)
        view[: len(body)] = body
        self._missing = view[len(body) :]

    def _check(self, head: bytes) -> BlobVersion:
        """The version of the blob, from the headers of a response to exactly this request."""
        status, fields, stays_open = parse_head(head)
        self._note(status, fields.get("", ""), fields)
        if status in THROTTLED:
            count_answer(time.perf_counter() - self._began, status, 0)
        found = _CONTENT_RANGE.fullmatch(fields.get("content-range", ""))
        if status != 206 or found is None or not stays_open or "transfer-encoding" in fields:
            raise _UnexpectedResponseError
        stop, size = int(found.group(1)) + 1, int(found.group(2))
        if stop != min(self._length, size) or fields.get("content-length") != str(stop):
            raise _UnexpectedResponseError
        if fields.get("x-ms-client-request-id") != self._request_id or not fields.get("etag"):
            raise _UnexpectedResponseError  # possibly the response to another request
        return BlobVersion(size, fields["etag"])


_multiplexers: PerProcess[dict[Engine, Multiplexer]] = PerProcess(dict)


def multiplexer_for(engine: Engine) -> Multiplexer | None:
    """The multiplexer of *engine*; None on systems without epoll."""
    if not hasattr(select, "epoll"):
        return None
    multiplexers = _multiplexers.get()
    return multiplexers.get(engine) or multiplexers.setdefault(engine, Multiplexer())
