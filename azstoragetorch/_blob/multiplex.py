"""Read many small blobs at once on one thread: the good case of `open_range`, without a thread for each request.

Sixty-four threads that each wait for one answer spend more time handing the interpreter lock around than on their
answers. Here a request is sent at once on an idle connection, and one thread takes whichever answers arrive. Only a
plain, complete answer is taken: whatever else happens, the read is handed back, to be made anew by a thread that can
retry, renew a token, and say what is wrong.
"""

from __future__ import annotations

import re
import select
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http.client import HTTPException
from ssl import SSLWantReadError

from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.ranges import ByteRange
from azstoragetorch._blob.service import Service
from azstoragetorch._blob.transport import Connection, parse_head, take_idle
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.engine import Cancelled, Engine, Scope
from azstoragetorch._engine.memory import bytes_to_fill
from azstoragetorch._engine.metrics import count, count_answer

_WHOLE = re.compile(r"bytes 0-(\d+)/(\d+)")
_MOST_OF_A_HEAD = 16 << 10
_TICK = 0.25  # seconds between two looks at what has stalled
_PATIENCE = 0.5  # seconds for which the thread waits for another read before it ends


class Multiplexer:
    """The reads of one engine that are under way on one thread. Made on first use; a forked child makes its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._reads: dict[int, _Read] = {}  # by descriptor
        self._watched: dict[int, Connection] = {}  # whose descriptor is registered, also while others use them
        self._epoll = select.epoll()
        self._is_running = False
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
        """Begin to read the first *length* bytes; False if there is no idle connection for it.

        Exactly one of *done* and *failed* is called, on another thread, unless False was returned.
        """
        connection = take_idle(service.origin)
        if connection is None:
            return False
        cleanup = ExitStack()
        try:
            cleanup.enter_context(scope.holding(connection))
            target, headers = service.signed(url, {"x-ms-range": ByteRange(0, length).header})
            sock = connection.begin(target, headers)
        except (Cancelled, OSError):
            cleanup.close()
            connection.close()
            return False
        except BaseException:
            cleanup.close()
            connection.close()
            raise
        read = _Read(connection, cleanup, length, headers["x-ms-client-request-id"], done, failed)
        descriptor = sock.fileno()
        with self._lock:
            self._reads[descriptor] = read
            if self._watched.get(descriptor) is not connection:
                self._watched[descriptor] = connection
                self._epoll.register(descriptor, select.EPOLLIN)
            must_start, self._is_running = not self._is_running, True
        if must_start:
            self._engine.submit(self._run)
        return True

    def _run(self) -> None:
        scratch = memoryview(bytearray(_MOST_OF_A_HEAD))
        try:
            while self._is_wanted():
                for descriptor, _ in self._epoll.poll(_TICK):
                    self._advance(descriptor, scratch)
                self._drop_stalled()
        finally:
            with self._lock:
                self._is_running = False  # after an error, too: what is left is made anew
                left = list(self._reads)
            for descriptor in left:
                self._end(descriptor, is_good=False)

    def _is_wanted(self) -> bool:
        with self._lock:
            if not self._reads and time.monotonic() - self._last_active > _PATIENCE:
                self._is_running = False
            return self._is_running

    def _advance(self, descriptor: int, scratch: memoryview) -> None:
        with self._lock:
            read = self._reads.get(descriptor)
            if read is None:  # somebody else is using the connection, or it was closed
                self._unwatch(descriptor)
                return
        self._last_active = read.last_active = time.monotonic()
        try:
            if read.advance(scratch):
                self._end(descriptor, is_good=True)
        except (OSError, HTTPException, _UnusualError):
            self._end(descriptor, is_good=False)

    def _drop_stalled(self) -> None:
        now = time.monotonic()
        if now - self._last_sweep < _TICK:
            return
        self._last_sweep = now
        for descriptor, read in list(self._reads.items()):
            if now - read.last_active > read.connection.origin.read_timeout:
                self._end(descriptor, is_good=False)

    def _end(self, descriptor: int, *, is_good: bool) -> None:
        with self._lock:
            read = self._reads.pop(descriptor)
            if not is_good:
                self._unwatch(descriptor)
        read.end(is_good)

    def _unwatch(self, descriptor: int) -> None:
        self._watched.pop(descriptor, None)
        with suppress(OSError):  # it is closed, or an interrupt has come before it was registered
            self._epoll.unregister(descriptor)


class _UnusualError(Exception):
    """The answer is not the plain one; a thread that knows more is to ask again."""


class _Read:
    """One answer on its way."""

    def __init__(
        self,
        connection: Connection,
        cleanup: ExitStack,
        length: int,
        request_id: str,
        done: Callable[[BlobVersion, bytes], None],
        failed: Callable[[], None],
    ) -> None:
        self.connection = connection
        self.last_active = time.monotonic()
        self._cleanup = cleanup
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
        sock = self.connection.socket
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
        self._cleanup.close()
        if is_good and self._version is not None:
            count("bytes_received", len(self._data))
            self.connection.settle()
            self._done(self._version, self._data)
        else:
            self.connection.close()
            self._failed()

    @staticmethod
    def _receive(received: int) -> int:
        if not received:
            raise _UnusualError  # the connection was closed
        return received

    def _take_head(self, arrived: memoryview) -> None:
        self._head += arrived
        head, end, body = self._head.partition(b"\r\n\r\n")
        if not end:
            if len(self._head) > _MOST_OF_A_HEAD:
                raise _UnusualError
            return
        self._version = self._check(head)
        count_answer(time.perf_counter() - self._began, 206, 0)
        size = min(self._length, self._version.size)
        if len(body) > size or size == 1 > len(body):
            raise _UnusualError
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
        found = _WHOLE.fullmatch(fields.get("content-range", ""))
        if status != 206 or found is None or not stays_open or "transfer-encoding" in fields:
            raise _UnusualError
        stop, size = int(found.group(1)) + 1, int(found.group(2))
        if stop != min(self._length, size) or fields.get("content-length") != str(stop):
            raise _UnusualError
        if fields.get("x-ms-client-request-id") != self._request_id or not fields.get("etag"):
            raise _UnusualError  # it may be the answer to another request
        return BlobVersion(size, fields["etag"])


_multiplexers: weakref.WeakKeyDictionary[Engine, Multiplexer] = weakref.WeakKeyDictionary()


def multiplexer_for(engine: Engine) -> Multiplexer | None:
    """The multiplexer of *engine*; None on systems without epoll."""
    if not hasattr(select, "epoll"):
        return None
    multiplexer = _multiplexers.get(engine)
    if multiplexer is None:
        multiplexer = _multiplexers.setdefault(engine, Multiplexer(engine))
    return multiplexer
