"""Read many small blobs at once on one thread.

Sixty-four threads that each wait for one response spend more time passing the interpreter lock around than on the
responses. Here each request is sent at once on an idle connection, and one thread receives all responses. It handles
only the common case, a complete 206 response. In every other case it reports that the read failed, and the caller reads
the blob again with `open_range`, which retries, renews tokens and raises errors.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from http.client import HTTPException
from types import MappingProxyType

from azstoragetorch._blob.connection import Connection
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.first_part import KIND, MAX_HEAD_BYTES, Attempt, FirstPart
from azstoragetorch._blob.service import Service
from azstoragetorch._blob.takeover import Takeover
from azstoragetorch._blob.transport import take_idle
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.metrics import count
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Cancelled, Scope, on_error
from azstoragetorch._engine.threads import Engine, start_thread

log = logging.getLogger("azstoragetorch")

_POLL_SECONDS = 0.25  # between two checks for stalled reads
_STUCK_SECONDS = 10.0  # without a step of the thread, after which others do not count on it
_HEDGE_SECONDS = 0.0125  # the same if silent ones are requested once more
_BRIEF_SECONDS = 1.0  # a read that has begun more recently, and is not silent, is not looked at
_IDLE_SECONDS = 0.5  # for which the thread waits for another read before it exits


class Multiplexer:
    """The reads of one engine that are in flight on one thread, which is not one of the engine's threads."""

    # `begin` runs on any thread, also in a signal handler that interrupts another `begin`, so neither side takes a
    # lock. They share four things: `_reads` (descriptor -> attempt), `_watched` (descriptor -> the connection for which
    # it was registered), the epoll set, and `_turns`, which says whether the thread runs. A connection is used by one
    # request at a time, so there is at most one attempt for a descriptor. A read has one attempt at first, and another
    # one if that is silent for too long (`_hedge`); `first_part` says which of them is received.
    #
    # An attempt ends once, by the call that removes it from `_reads` (`_claim`). The thread removes it after a complete
    # response, an error (a cancel of its scope shuts the socket down, which is an error here) or a stall. When the read
    # is complete, or its last attempt has ended, the thread calls `done` or `failed`. An interrupted `begin` removes
    # its own attempt, closes the connection and raises.
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
        self._reads: dict[int, Attempt] = {}  # by descriptor
        self._watched: dict[int, Connection] = {}  # registered, also while other requests use them
        self._epoll = select.epoll()
        self._turns: dict[None, _Turn] = {}  # the turn of the thread that runs, if one does
        self._last_active = self._last_sweep = self._last_step = 0.0
        self._interval = _POLL_SECONDS

    def is_stuck(self) -> bool:
        """Whether the thread has to wait for the caller, or has not taken a step for long."""
        turn = self._turns.get(None)
        if turn is None:
            return False
        owner = turn.owner()
        if owner is not None and owner.thread == threading.get_ident():
            return True
        limit = time.monotonic() - _STUCK_SECONDS
        return self._last_step < limit and turn.began < limit

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
        is_admitted = not self.is_stuck() and service.admission.enter_now()
        connection = take_idle(service.origin) if is_admitted else None
        if connection is None:
            return False
        hold = scope.holding(connection.wake)
        try:
            hold.__enter__()
            target, headers = service.sign(url, _headers_for(length))
            descriptor = connection.begin(target, headers).fileno()
        except BaseException as error:
            hold.leave()
            connection.close()
            if isinstance(error, (Cancelled, OSError)):
                return False
            raise
        hedging = service.hedging if service.admission.pacing.is_free else None
        takeover = Takeover(hedging, KIND, headers, self._drop)
        read = FirstPart(takeover, target, length, scope, service.note_status, done, failed)
        try:
            attempt = Attempt(read, connection, descriptor, hold, headers)
            self._reads[descriptor] = attempt
            self._watch(descriptor, connection)
            if hedging is not None:
                self._interval = _HEDGE_SECONDS
            self._start()
        except BaseException:
            self._withdraw(read)
            raise
        return True

    def _withdraw(self, read: FirstPart) -> None:
        """End *read* without a call of its functions, wherever `begin` was interrupted."""
        attempts = list(read.takeover.attempts)
        read.finish()
        for attempt in attempts:
            if self._claim(attempt):
                read.takeover.end(attempt)
            elif read.takeover.hedging is not None:  # it was not entered yet, or the thread has just ended it
                read.takeover.hedging.drop(attempt)

    def _claim(self, attempt: Attempt) -> bool:
        """Remove *attempt*; return whether it was still there, so that the caller is the one that ends it."""
        descriptor = attempt.descriptor
        return self._reads.get(descriptor) is attempt and self._reads.pop(descriptor, None) is attempt

    def _watch(self, descriptor: int, connection: Connection) -> None:
        if self._watched.get(descriptor) is not connection:
            self._register(descriptor, connection)

    def _register(self, descriptor: int, connection: Connection) -> None:
        self._watched[descriptor] = connection
        with suppress(FileExistsError):  # the thread has registered it
            self._epoll.register(descriptor, select.EPOLLIN)

    def _start(self) -> None:
        """Start the thread if it is not running."""
        turn = self._turns.get(None) or self._turns.setdefault(None, _Turn())
        if turn.is_started:
            return
        me = _Owner(0)
        with on_error(partial(self._fail_all, turn, me)):
            if start_thread(partial(self._run, turn)):
                turn.is_started = True
            elif turn.take(me):
                self._fail_all(turn, me)

    def _fail_all(self, turn: _Turn, me: _Owner) -> None:
        """Fail all reads and end *turn*, if *me* has taken it. After an interrupt, call it again."""
        while turn.owner() is me and self._turns.setdefault(None, turn) is turn:
            for attempt in list(self._reads.values()):
                self._end(attempt, is_good=False)
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
            scratch = memoryview(bytearray(MAX_HEAD_BYTES))
            self._last_active = time.monotonic()
            while self._is_wanted() or not self._has_ended(turn):
                for descriptor, _ in self._epoll.poll(self._interval):
                    self._advance(descriptor, scratch)
                self._drop_stalled()

    def _is_wanted(self) -> bool:
        return bool(self._reads) or time.monotonic() - self._last_active < _IDLE_SECONDS

    def _advance(self, descriptor: int, scratch: memoryview) -> None:
        attempt = self._reads.get(descriptor)
        if attempt is None:  # another request uses the connection, or the service has closed it
            self._unwatch(descriptor)
            attempt = self._reads.get(descriptor)
            if attempt is not None:  # `begin` may have found it still watched: see above
                self._register(descriptor, attempt.connection)
            return
        self._last_step = self._last_active = attempt.silent_since = time.monotonic()
        try:
            if attempt.advance(scratch):
                self._end(attempt, is_good=True)
        except (OSError, HTTPException):
            self._end(attempt, is_good=False)

    def _drop_stalled(self) -> None:
        now = self._last_step = time.monotonic()
        if now - self._last_sweep < self._interval:
            return
        self._last_sweep = now
        for attempt in list(self._reads.values()):
            silence = now - attempt.silent_since
            if silence < self._interval and now - attempt.since < _BRIEF_SECONDS:
                continue
            if silence > attempt.connection.origin.read_timeout or attempt.read.is_over:
                self._end(attempt, is_good=False)
            elif attempt.wants_hedge(now):
                self._hedge(attempt)

    def _hedge(self, silent: Attempt) -> None:
        """Request what is missing of the read of *silent* once more, on another connection."""
        read = silent.read
        headers, start = read.takeover.rest()
        _log_apart("GET %s: silent, sent once more from byte %d on", read.target.partition("?")[0], start)
        connection = take_idle(silent.connection.origin)
        if connection is None:  # a thread that has to read the blob itself opens one
            count("hedges_won")
            read.takeover.close()
            _, failed = read.finish()
            failed()
            return
        hold = read.scope.holding(connection.interrupt)
        try:
            hold.__enter__()
            descriptor = connection.begin(read.target, headers).fileno()
        except (Cancelled, OSError):
            hold.leave()
            connection.close()
            count("hedges_canceled")
            return
        attempt = Attempt(read, connection, descriptor, hold, headers, start)
        self._reads[descriptor] = attempt
        self._watch(descriptor, connection)

    def _end(self, attempt: Attempt, *, is_good: bool) -> None:
        if self._claim(attempt):
            if not is_good:
                self._unwatch(attempt.descriptor)
            attempt.read.end(attempt, is_good=is_good)

    def _drop(self, attempt: Attempt) -> None:
        """Give up an attempt of a read that has a better one."""
        if self._claim(attempt):
            self._unwatch(attempt.descriptor)
        attempt.close()

    def _unwatch(self, descriptor: int) -> None:
        self._watched.pop(descriptor, None)
        with suppress(OSError):  # it is closed, or an interrupt came before it was registered
            self._epoll.unregister(descriptor)


@lru_cache(maxsize=16)
def _headers_for(length: int) -> Mapping[str, str]:
    return MappingProxyType({"x-ms-range": ByteRange(0, length).header})


def _log_apart(message: str, *values: object) -> None:
    """Log on another thread: a logging handler can hold a lock, and the thread of the multiplexer must not wait."""
    if log.isEnabledFor(logging.DEBUG):
        start_thread(partial(log.debug, message, *values))


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

    def owner(self) -> _Owner | None:
        """Who has taken it."""
        return self._owners.get(None)


_multiplexers: PerProcess[dict[Engine, Multiplexer]] = PerProcess(dict)


def multiplexer_for(engine: Engine) -> Multiplexer | None:
    """The multiplexer of *engine*; None on systems without epoll."""
    if not hasattr(select, "epoll"):
        return None
    multiplexers = _multiplexers.get()
    return multiplexers.get(engine) or multiplexers.setdefault(engine, Multiplexer())
