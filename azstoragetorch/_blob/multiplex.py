"""Read many small blobs at once on one thread: the good case of `open_range`, without a thread for each request.

Sixty-four threads that each wait for one answer spend more time handing the interpreter lock around than on their
answers. Here a request is sent at once on an idle connection, and one thread takes whichever answers arrive. Only a
plain, complete answer is taken. Whatever else happens, the read is handed back, to be made again by a thread that can
retry, renew a token, and say what is wrong.
"""

from __future__ import annotations

import re
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from ssl import SSLWantReadError

from azstoragetorch._blob.connection import Connection
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.service import Service
from azstoragetorch._blob.transport import give_back, parse_head, take_idle
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.memory import bytes_to_fill
from azstoragetorch._engine.metrics import count, count_answer
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Cancelled, Hold, Scope, on_error
from azstoragetorch._engine.threads import Engine, start_thread

_CONTENT_RANGE = re.compile(r"bytes 0-(\d+)/(\d+)")
_MAX_HEAD_BYTES = 16 << 10
_POLL_SECONDS = 0.25  # seconds between two looks at what has stalled
_IDLE_SECONDS = 0.5  # seconds for which the thread waits for another read before it ends


class Multiplexer:
    """The reads of one engine that are in flight on one thread, which is not one of the engine's.

    Reads begin on any thread and take no lock, since a signal handler may begin one inside another. So both sides keep
    to an order of single steps:

    * `begin` first enters the read under its descriptor, then looks whether the poller watches that connection, and
      registers it if not. The thread, when something arrives on a descriptor without a read (another request of the
      same connection, or its end), first stops watching and then looks once more for a read. So a read that is entered
      meanwhile is seen by one of the two.
    * `begin` takes the one token of ``_thread_token`` after that, and with it starts the thread. That gives the token
      back when there was nothing to do for a while, and then looks once more for reads.

    A connection belongs to one request at a time, and so does its descriptor: nothing else writes these entries.
    """

    def __init__(self) -> None:
        self._reads: dict[int, _Read] = {}  # by descriptor
        self._watched: dict[int, Connection] = {}  # whose descriptor is registered, also while others use them
        self._epoll = select.epoll()
        self._thread_token: deque[None] = deque([None])
        self._last_active = self._last_sweep = 0.0

    def begin(
        self,
        service: Service,
        url: BlobURL,
        length: int,
        scope: Scope,
        done: Callable[[BlobVersion, bytes], None],
        failed: Callable[[], None],
    ) -> bool:
        """Begin to read the first *length* bytes; False without an idle connection.

        Exactly one of *done* and *failed* is called, on another thread, unless False was returned.
        """
        connection = take_idle(service.origin)
        if connection is None:
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
        read = _Read(connection, hold, length, headers["x-ms-client-request-id"], done, failed)
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
        """Whether *read* was still entered; it is taken out. The thread and `begin` may both want to end it."""
        return self._reads.get(descriptor) is read and self._reads.pop(descriptor, None) is read

    def _watch(self, descriptor: int, connection: Connection) -> None:
        if self._watched.get(descriptor) is not connection:
            self._register(descriptor, connection)

    def _register(self, descriptor: int, connection: Connection) -> None:
        self._watched[descriptor] = connection
        with suppress(FileExistsError):  # the thread was faster
            self._epoll.register(descriptor, select.EPOLLIN)

    def _start(self) -> None:
        """Start the thread unless it runs."""
        if self._thread_token:
            with suppress(IndexError):  # another thread was faster
                self._thread_token.pop()
                if not start_thread(self._run):
                    self._fail_all()

    def _fail_all(self) -> None:
        for descriptor, read in list(self._reads.items()):  # to be made again elsewhere
            self._end(descriptor, read, is_good=False)
        self._thread_token.append(None)

    def _run(self) -> None:
        scratch = memoryview(bytearray(_MAX_HEAD_BYTES))
        self._last_active = time.monotonic()
        with on_error(self._fail_all):
            while self._is_wanted():
                for descriptor, _ in self._epoll.poll(_POLL_SECONDS):
                    self._advance(descriptor, scratch)
                self._drop_stalled()

    def _is_wanted(self) -> bool:
        if self._reads or time.monotonic() - self._last_active < _IDLE_SECONDS:
            return True
        self._thread_token.append(None)
        if not self._reads:
            return False
        try:
            self._thread_token.pop()
        except IndexError:  # for that read another thread was started
            return False
        return True

    def _advance(self, descriptor: int, scratch: memoryview) -> None:
        read = self._reads.get(descriptor)
        if read is None:  # others are using the connection, or it was closed
            self._unwatch(descriptor)
            read = self._reads.get(descriptor)
            if read is not None:  # `begin` may have found it registered still, and have noted that
                self._register(descriptor, read.connection)
            return
        self._last_active = read.last_active = time.monotonic()
        try:
            if read.advance(scratch):
                self._end(descriptor, read, is_good=True)
        except (OSError, HTTPException, _UnexpectedResponseError):
            self._end(descriptor, read, is_good=False)

    def _drop_stalled(self) -> None:
        now = time.monotonic()
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
        with suppress(OSError):  # it is closed, or an interrupt has come before it was registered
            self._epoll.unregister(descriptor)


class _UnexpectedResponseError(Exception):
    """The answer is not the plain one; a thread that knows more asks again."""


class _Read:
    """One answer in flight."""

    def __init__(
        self,
        connection: Connection,
        hold: Hold,
        length: int,
        request_id: str,
        done: Callable[[BlobVersion, bytes], None],
        failed: Callable[[], None],
    ) -> None:
        self.connection = connection
        self._socket = connection.socket
        self.last_active = time.monotonic()
        self._hold = hold
        self._length = length
        self._request_id = request_id
        self._done = done
        self._failed = failed
        self._began = time.perf_counter()
        self._head = b""
        self._version: BlobVersion | None = None
        self._data = b""
        self._missing = memoryview(b"")

    def advance(self, scratch: memoryview) -> bool:
        """Take what has arrived; whether that was all."""
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
        """Hand over the result, or the wish to try again; the connection is kept only after a complete answer."""
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
        """The version that an answer speaks of which is in every respect the one that was asked for."""
        status, fields, stays_open = parse_head(head)
        found = _CONTENT_RANGE.fullmatch(fields.get("content-range", ""))
        if status != 206 or found is None or not stays_open or "transfer-encoding" in fields:
            raise _UnexpectedResponseError
        stop, size = int(found.group(1)) + 1, int(found.group(2))
        if stop != min(self._length, size) or fields.get("content-length") != str(stop):
            raise _UnexpectedResponseError
        if fields.get("x-ms-client-request-id") != self._request_id or not fields.get("etag"):
            raise _UnexpectedResponseError  # it may be the answer to another request
        return BlobVersion(size, fields["etag"])


_multiplexers: PerProcess[dict[Engine, Multiplexer]] = PerProcess(dict)


def multiplexer_for(engine: Engine) -> Multiplexer | None:
    """The multiplexer of *engine*; None on systems without epoll."""
    if not hasattr(select, "epoll"):
        return None
    multiplexers = _multiplexers.get()
    return multiplexers.get(engine) or multiplexers.setdefault(engine, Multiplexer())
