"""HTTP/1.1 over `http.client`, with pooled connections and bodies received directly into the caller's memory.

A connection is used by one request at a time and returns to the pool only after the whole response was received.
Redirects are not followed, so a credential never reaches another host. A forked child closes its copies of the sockets
and creates new connections.
"""

from __future__ import annotations

import atexit
import http.client
import logging
import re
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType

from azstoragetorch import __version__
from azstoragetorch._blob.connection import MAX_IDLE_SECONDS, Body, Connection, Origin, length_of
from azstoragetorch._blob.retry import is_connection_failure
from azstoragetorch._blob.secret import redact
from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.metrics import count, count_answer
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.scope import Cancelled, Hold, Scope, on_error
from azstoragetorch.exceptions import ClientRequestIdMismatchError

log = logging.getLogger("azstoragetorch")

USER_AGENT = f"azstoragetorch/{__version__}"
_DRAIN_LIMIT = 64 * KiB  # receiving this much of an unwanted body is cheaper than a new connection
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) (\d{3})(?: (.*))?")
_MAX_FIELDS, _MAX_LINE = 200, 64 * KiB  # of a response: headers, and bytes of one
_MAX_IDLE = 128  # connections kept for each origin
_UNCHECKED_SECONDS = 1.0  # how long `take_idle` assumes that a connection is still open


class Headers(Mapping[str, str]):
    """Response headers; names are case-insensitive."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values  # by lower-case name; names of metadata keep their case

    def __getitem__(self, name: str) -> str:
        return self._values[name if name in self._values else name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._values or name.lower() in self._values)


class _HTTPResponse(http.client.HTTPResponse):
    """http.client's response with its own header parser: the email parser of http.client takes ten times as long."""

    is_head = False
    fields: Headers

    def begin(self) -> None:
        """Read the status line and the headers."""
        while True:
            self.code, values, stays_open = parse_head(self._read_head())
            if self.code >= 200:  # lower statuses are interim responses
                break
        self.status = self.code
        self.reason = values.pop("", "")
        self.version = 11
        self.fields = Headers(values)
        self.chunked = values.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.will_close = not stays_open
        length = values.get("content-length")
        self.length = None
        if self.is_head or self.status in (204, 304):
            self.length = 0
        elif length is not None and not self.chunked:
            if not (length.isascii() and length.isdigit()):
                raise http.client.HTTPException(f"Content-Length is {length!r}")
            self.length = int(length)
        if self.length is None and not self.chunked:
            self.will_close = True

    def _read_head(self) -> bytes:
        lines: list[bytes] = []
        for _ in range(_MAX_FIELDS):
            line = self.fp.readline(_MAX_LINE)
            if line in (b"\r\n", b"\n") and lines:
                return b"".join(lines)
            if not line.endswith(b"\n"):
                if not lines and not line:
                    raise http.client.RemoteDisconnected("the connection was closed without a response")
                raise http.client.IncompleteRead(line) if lines else http.client.BadStatusLine(repr(line))
            lines.append(line)
        raise http.client.HTTPException(f"the response has more than {_MAX_FIELDS} headers")


def parse_head(head: bytes) -> tuple[int, dict[str, str], bool]:
    """The status, the headers by lower-case name, and whether the connection stays open.

    The reason phrase is the value for the empty name. Names of metadata keep their case.

    Raises:
        http.client.HTTPException: *head* is not a valid status line with headers.
    """
    # Not splitlines: it also splits at some bytes of UTF-8 names.
    first, *lines = head.decode("latin-1").rstrip("\r\n").replace("\r\n", "\n").split("\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise http.client.BadStatusLine(repr(first))
    values = {"": (found.group(3) or "").strip()}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise http.client.HTTPException(f"{line[:80]!r} is not a header")
        name = name.strip()
        lower = name.lower()
        values[name if lower.startswith("x-ms-meta-") else lower] = value.strip()  # case matters in names of metadata
    connection = values.get("connection", "").lower()
    stays_open = "close" not in connection and (found.group(1) == "1" or "keep-alive" in connection)
    return int(found.group(2)), values, stays_open


def _receive_head(connection: Connection, method: str) -> _HTTPResponse:
    response = _HTTPResponse(connection.socket, method=method)
    response.is_head = method == "HEAD"
    with on_error(response.close):
        response.begin()
    return response


class Response:
    """The response to one request. Leaving its ``with`` block releases the connection."""

    def __init__(self, pool: Pool, connection: Connection, raw: _HTTPResponse, hold: Hold) -> None:
        self._pool = pool
        self._connection = [connection]  # `pop` is one step, so `close` releases it once, even if interrupted
        self._raw = raw
        self._hold = hold
        self.status = raw.status
        self.reason = raw.reason
        self.headers: Mapping[str, str] = raw.fields
        self._received = 0
        self.length = raw.length
        """The number of bytes of the body still to be received; None if the service has not declared it."""

    def readinto(self, target: memoryview) -> int:
        """Receive up to ``len(target)`` bytes; fewer, or zero, only at the end of the body."""
        received = self._raw.readinto(target)
        self._received += received
        if self.length is not None:
            self.length -= received
        return received

    def read(self) -> bytes:
        """Receive the rest of the body."""
        data = self._raw.read()
        self._received += len(data)
        self.length = 0
        return data

    def discard(self) -> None:
        """Close the connection, whatever is left of the body."""
        self.length = None
        self.close()

    def close(self) -> None:
        """Return the connection to the pool if the whole body was received, otherwise close it. Idempotent."""
        try:
            connection = self._connection.pop()
        except IndexError:
            return
        try:
            if self.length is not None and 0 < self.length <= _DRAIN_LIMIT and not self._raw.isclosed():
                self.read()
            if self.length == 0:
                self._raw.close()
        except (OSError, http.client.HTTPException):
            pass
        count("bytes_received", self._received)
        is_free = self._raw.isclosed() and self.length == 0 and not self._raw.will_close
        self._hold.leave()
        if is_free and not self._hold.was_woken:
            self._pool.give_back(connection)
        else:
            connection.close()
        self._raw.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.length = None  # after an error the rest of the body cannot be trusted
        self.close()


# Connection reuse
# ----------------
# A connection is in exactly one place: in the pool, or owned by one request. It moves by single steps on a deque
# (`pop`, `append`) that take no lock, so another thread, or a signal handler that sends requests from any line here,
# gets another connection. An interrupt between two lines can lose a connection (its finalizer closes the socket) but
# never share one.
#
#     idle -> in use    `take`. A socket that is readable while idle was closed by the service, or has bytes that belong
#                       to no request: it is closed. The check cannot be complete, since the service may close the
#                       connection just after it. Then sending fails, or the response ends before its first byte, and
#                       `send` repeats the request on another connection. It does that only for a connection that was
#                       used before, so a service that closes every connection is an error at once.
#     in use -> idle    `Response.close`, only if the whole body was received, the service did not send "Connection:
#                       close", and no error was raised. Otherwise the rest of the body would be read as the beginning
#                       of the next response. A short rest is received and dropped first.
#     in use -> closed  in every other case.
#
# A conditional write is not repeated (`_is_conditional_write`): if the first one was carried out, the service would
# refuse the second one, and the caller, which checks what happened (see `commit`), would not know that there were two.
# The next attempt of the caller gets a new connection (`distrusted`): all idle connections may have died together.
#
# A cancel can come from another thread while a request returns its connection. The request first leaves its hold. If
# that happened before the cancel, `was_woken` stays false, the connection goes to the pool, and the cancel, which finds
# the hold ended, does not touch it. Otherwise the connection is closed; `Connection` says who closes it.
class Pool:
    """The idle connections of this process; the most recently used one is taken first."""

    def __init__(self) -> None:
        self._idle: dict[Origin, deque[Connection]] = {}
        self._made: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.distrusted: set[Origin] = set()
        """Origins where a pooled connection failed during a conditional write: such writes then get new connections."""

    def take(self, origin: Origin, *, is_new: bool = False) -> Connection:
        """An open idle connection, or a new one if none is idle or *is_new* is set."""
        connection = None if is_new else self.take_idle(origin)
        if connection is None:
            count("connections")
            connection = Connection(origin)
            self._made.add(connection)
        return connection

    def take_idle(self, origin: Origin, unchecked: float = 0.0) -> Connection | None:
        """An open idle connection, or None. One that was used in the last *unchecked* seconds is assumed to be open."""
        idle = self._idle.get(origin)
        while idle:
            try:
                connection = idle.pop()
            except IndexError:  # another thread has taken the last one
                break
            if not connection.is_stale(unchecked):
                return connection
            connection.close()
        return None

    def give_back(self, connection: Connection) -> None:
        """Keep *connection* for the next request."""
        connection.was_used = True
        connection.idle_since = time.monotonic()
        idle = self._idle.get(connection.origin) or self._idle.setdefault(connection.origin, deque())
        idle.append(connection)
        try:
            if len(idle) > _MAX_IDLE or connection.idle_since - idle[0].idle_since > MAX_IDLE_SECONDS:
                idle.popleft().close()
        except IndexError:  # other threads have taken all of them
            pass

    def close(self) -> None:
        """Close all idle connections."""
        for idle in list(self._idle.values()):
            with suppress(IndexError):
                while True:
                    idle.pop().close()

    def forget(self) -> None:
        """In a forked child: close the copies of the parent's sockets."""
        for connection in list(self._made):
            connection.forget()


_pool = PerProcess(Pool, Pool.forget)


def send(
    origin: Origin,
    method: str,
    target: str,
    headers: Mapping[str, str],
    *,
    body: Body = None,
    scope: Scope | None = None,
    on_repeat: Callable[[], None] | None = None,
) -> Response:
    """Send one request and receive the response headers.

    If a pooled connection turns out to be closed, the request is sent again on another connection, which does not count
    as a failure. *on_repeat* is called before that. Conditional writes are not sent again.

    Raises:
        OSError, http.client.HTTPException: the connection failed.
        ClientRequestIdMismatchError: the response belongs to another request.
        Cancelled: *scope* was cancelled.
    """
    pool, scope = _pool.get(), scope or Scope()
    while True:
        connection = pool.take(origin, is_new=origin in pool.distrusted and _is_conditional_write(method, headers))
        hold = scope.holding(connection.interrupt)
        try:
            hold.__enter__()
            started = time.perf_counter()
            connection.send(method, target, headers, body)
            raw = _receive_head(connection, method)
        except BaseException as error:
            hold.leave()
            connection.close()
            if scope.is_cancelled and is_connection_failure(error):
                raise Cancelled from None
            if connection.was_used and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                if not _is_conditional_write(method, headers):
                    if on_repeat is not None:
                        on_repeat()
                    continue
                pool.distrusted.add(origin)
            raise
        count_answer(elapsed := time.perf_counter() - started, raw.status, length_of(body))
        if log.isEnabledFor(logging.DEBUG):
            url = redact(f"{origin.scheme}://{origin.host}{target}")
            log.debug("%s %s: %d in %.1f ms", method, url, raw.status, elapsed * 1000)
        sent_id, echoed_id = headers.get("x-ms-client-request-id", ""), raw.fields.get("x-ms-client-request-id")
        if not echoed_id and raw.status >= 300:
            raw.fields = Headers({**raw.fields, "x-ms-client-request-id": sent_id})  # for the error message
        response = Response(pool, connection, raw, hold)
        if sent_id and echoed_id and sent_id != echoed_id:
            response.discard()
            raise _mismatch(f"{method} {origin.scheme}://{origin.host}{target}", sent_id, raw.fields)
        return response


def _mismatch(request: str, sent_id: str, fields: Mapping[str, str]) -> ClientRequestIdMismatchError:
    return ClientRequestIdMismatchError(
        f"{redact(request)}: the response is for client request id {fields['x-ms-client-request-id']}, not {sent_id} "
        f"(request id {fields.get('x-ms-request-id', '-')})"
    )


def _is_conditional_write(method: str, headers: Mapping[str, str]) -> bool:
    """Whether the service would refuse a second request if the first one was carried out."""
    return method != "GET" and any(name.lower() in ("if-none-match", "if-match") for name in headers)


def take_idle(origin: Origin) -> Connection | None:
    """An idle connection, which the caller must return with `give_back` or close; None if no connection is idle.

    If it was used within the last second it is not checked, which saves a system call: the caller has to handle a
    connection that fails anyway.
    """
    return _pool.get().take_idle(origin, _UNCHECKED_SECONDS)


def give_back(connection: Connection) -> None:
    """Return a connection from `take_idle` to the pool, after the whole response was received."""
    _pool.get().give_back(connection)


def close_idle_connections() -> None:
    """Close all idle connections; the next request opens a new one."""
    _pool.get().close()


atexit.register(close_idle_connections)
