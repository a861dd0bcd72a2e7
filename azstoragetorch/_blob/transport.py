"""HTTP/1.1 over `http.client`, with pooled connections and bodies received straight into the caller's memory.

A connection belongs to one request at a time and returns to the pool only when its answer was read to the end.
Redirects are not followed, so a credential never reaches another host. Sockets are closed after fork in the
child, which makes its own.
"""

from __future__ import annotations

import atexit
import http.client
import logging
import re
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
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
_DRAIN_LIMIT = 64 * KiB  # reading this much of an unwanted body is cheaper than a new connection
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) (\d{3})(?: (.*))?")
_MAX_FIELDS, _MAX_LINE = 200, 64 * KiB  # of an answer's head
_MAX_IDLE = 128  # connections kept for each service
_UNCHECKED_SECONDS = 1.0  # seconds for which `take_idle` believes that a connection is open


class Headers(Mapping[str, str]):
    """The headers of an answer, whatever their case."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values  # by lower-case name; those of metadata as they came

    def __getitem__(self, name: str) -> str:
        return self._values[name if name in self._values else name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._values or name.lower() in self._values)


class _HTTPResponse(http.client.HTTPResponse):
    """http.client's answer with a head that is read at a tenth of the cost: it parses headers as if they were mail."""

    is_head = False
    fields: Headers

    def begin(self) -> None:
        """Read the status line and the headers."""
        while True:
            self.code, values, stays_open = parse_head(self._read_head())
            if self.code >= 200:  # below are interim answers
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
                    raise http.client.RemoteDisconnected("no answer came")
                raise http.client.IncompleteRead(line) if lines else http.client.BadStatusLine(repr(line))
            lines.append(line)
        raise http.client.HTTPException(f"more than {_MAX_FIELDS} headers")


def parse_head(head: bytes) -> tuple[int, dict[str, str], bool]:
    """Status, headers by lower-case name (and the reason by no name), and whether the connection stays open.

    Metadata keeps the case of its names.

    Raises:
        http.client.HTTPException: this is not the head of an answer.
    """
    # Not splitlines, to which some bytes of a UTF-8 file name are ends of lines too.
    first, *lines = head.decode("latin-1").rstrip("\r\n").replace("\r\n", "\n").split("\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise http.client.BadStatusLine(repr(first))
    values = {"": (found.group(3) or "").strip()}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise http.client.HTTPException(f"not a header: {line[:80]!r}")
        name = name.strip()
        lower = name.lower()
        values[name if lower.startswith("x-ms-meta-") else lower] = value.strip()  # names of metadata have a case
    connection = values.get("connection", "").lower()
    stays_open = "close" not in connection and (found.group(1) == "1" or "keep-alive" in connection)
    return int(found.group(2)), values, stays_open


def _receive_head(connection: Connection, method: str) -> _HTTPResponse:
    answer = _HTTPResponse(connection.socket, method=method)
    answer.is_head = method == "HEAD"
    with on_error(answer.close):
        answer.begin()
    return answer


class Response:
    """The answer to one request. Leaving its ``with`` block frees the connection."""

    def __init__(self, pool: Pool, connection: Connection, raw: _HTTPResponse, hold: Hold) -> None:
        self._pool = pool
        self._connection = [connection]  # taken out in one step: `close` gives it back once, even if it is interrupted
        self._raw = raw
        self._hold = hold
        self.status = raw.status
        self.reason = raw.reason
        self.headers: Mapping[str, str] = raw.fields
        self._received = 0
        self.length = raw.length
        """Bytes of the body that are still to come, where the service said so."""

    def readinto(self, target: memoryview) -> int:
        """Receive up to ``len(target)`` bytes; fewer, or 0, only if the body ends."""
        received = self._raw.readinto(target)
        self._received += received
        if self.length is not None:
            self.length -= received
        return received

    def read(self) -> bytes:
        """The rest of the body."""
        data = self._raw.read()
        self._received += len(data)
        self.length = 0
        return data

    def close(self) -> None:
        """Return the connection to the pool if the body was read to its end, else close it; once is enough."""
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
            self.length = None  # what is left of the body is not trusted
        self.close()


# A connection is in one place at a time: in the pool, or with the one request that took it out. Both ways are single
# steps on a deque (`pop`, `append`), which take no lock: other threads, and a signal handler that sends requests
# from any line here, get other connections. An interrupt between two lines can drop a connection, never share one.
#
# A cancel may come from another thread while a request gives its connection back. The request first ends its hold, and
# only if that came before the cancel (`was_woken` is false for good) the connection goes to the pool; a cancel that
# comes later finds the hold ended and touches nothing. Otherwise the connection is closed, see `Connection.close`.
class Pool:
    """Idle connections of this process, most recently used first."""

    def __init__(self) -> None:
        self._idle: dict[Origin, deque[Connection]] = {}
        self._made: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.distrusted: set[Origin] = set()
        """Where a used connection has died under a write that is not sent twice: the next ones get new connections."""

    def take(self, origin: Origin, *, is_new: bool = False) -> Connection:
        """An idle connection that is still open, unless it has to be a new one, or a new one."""
        connection = None if is_new else self.take_idle(origin)
        if connection is None:
            count("connections")
            connection = Connection(origin)
            self._made.add(connection)
        return connection

    def take_idle(self, origin: Origin, unchecked: float = 0.0) -> Connection | None:
        """An idle connection that is still open, as far as is known of those used *unchecked* seconds ago; or None."""
        idle = self._idle.get(origin)
        while idle:
            try:
                connection = idle.pop()
            except IndexError:  # another thread took it
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
        except IndexError:  # other threads took them all
            pass

    def close(self) -> None:
        """Close all idle connections."""
        for idle in list(self._idle.values()):
            with suppress(IndexError):
                while True:
                    idle.pop().close()

    def forget(self) -> None:
        """Let go of all connections of a forked parent."""
        for connection in list(self._made):
            connection.forget()

    @property
    def idle_count(self) -> int:
        """Connections that wait for a request."""
        return sum(map(len, list(self._idle.values())))


_pool = PerProcess(Pool, Pool.forget)


def send(
    origin: Origin,
    method: str,
    target: str,
    headers: Mapping[str, str],
    *,
    body: Body = None,
    scope: Scope | None = None,
) -> Response:
    """Send one request and read the head of its answer.

    A pooled connection that turns out to be dead is replaced at once and the request sent again, which does not count
    as a failure; conditional writes are not sent twice.

    Raises:
        OSError, http.client.HTTPException: the connection failed.
        ClientRequestIdMismatchError: the answer belongs to another request.
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
            is_dead = isinstance(error, (ConnectionError, http.client.BadStatusLine))
            if connection.was_used and is_dead:
                if not _is_conditional_write(method, headers):
                    continue
                pool.distrusted.add(origin)
            raise
        elapsed = time.perf_counter() - started
        count_answer(elapsed, raw.status, length_of(body))
        if log.isEnabledFor(logging.DEBUG):
            url = redact(f"{origin.scheme}://{origin.host}{target}")
            log.debug("%s %s: %d in %.1f ms", method, url, raw.status, elapsed * 1000)
        sent_id, echoed_id = headers.get("x-ms-client-request-id", ""), raw.fields.get("x-ms-client-request-id")
        if not echoed_id and raw.status >= 300:
            raw.fields = Headers({**raw.fields, "x-ms-client-request-id": sent_id})  # for the error's message
        response = Response(pool, connection, raw, hold)
        if sent_id and echoed_id and sent_id != echoed_id:
            response.length = None
            response.close()
            raise ClientRequestIdMismatchError(
                f"{method} {redact(f'{origin.scheme}://{origin.host}{target}')}: the answer is for client request id "
                f"{echoed_id}, not {sent_id} (request id {raw.fields.get('x-ms-request-id', '-')})"
            )
        return response


def _is_conditional_write(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a second request would be refused because of the first one, which is for the caller to find out."""
    return method != "GET" and any(name.lower() in ("if-none-match", "if-match") for name in headers)


def take_idle(origin: Origin) -> Connection | None:
    """An idle connection for the caller to give back or close; None if all are in use.

    It was open a moment ago. Whether it still is would take one more system call to know, and the caller has to be
    prepared for a broken connection anyway.
    """
    return _pool.get().take_idle(origin, _UNCHECKED_SECONDS)


def give_back(connection: Connection) -> None:
    """Return to the pool a connection that `take_idle` gave, after an answer that was received whole."""
    _pool.get().give_back(connection)


def idle_connections() -> int:
    """Connections of this process that wait in the pool."""
    return _pool.get().idle_count


def close_idle_connections() -> None:
    """Close the connections that wait in the pool; the next request opens a new one."""
    _pool.get().close()


atexit.register(close_idle_connections)
