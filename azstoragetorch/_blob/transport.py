"""HTTP/1.1 over `http.client`, with pooled connections and bodies received directly into the caller's memory.

A connection is used by one request at a time and returns to the pool only after the whole response was received.
Redirects are not followed, so a credential never reaches another host. A forked child closes its copies of the sockets
and creates new connections.
"""

from __future__ import annotations

import atexit
import http.client
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from azstoragetorch import __version__
from azstoragetorch._blob.connection import MAX_IDLE_SECONDS, Body, Connection, Origin, length_of
from azstoragetorch._blob.head import Headers, HTTPResponse, Stream, receive_head
from azstoragetorch._blob.race import Overtaken, Race, Sent, log_answer
from azstoragetorch._blob.retry import is_connection_failure
from azstoragetorch._blob.secret import redact
from azstoragetorch._blob.takeover import Takeover
from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.hedging import Hedging
from azstoragetorch._engine.metrics import count, count_answer
from azstoragetorch._engine.process import PerProcess
from azstoragetorch._engine.scope import Cancelled, Hold, Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError

USER_AGENT = f"azstoragetorch/{__version__}"
_DRAIN_LIMIT = 64 * KiB  # receiving this much of an unwanted body is cheaper than a new connection
_MAX_IDLE = 128  # connections kept for each origin
_UNCHECKED_SECONDS = 1.0  # how long `take_idle` assumes that a connection is still open


class Response:
    """The response to one request. Leaving its ``with`` block releases the connection."""

    def __init__(
        self, pool: Pool, connection: Connection, raw: HTTPResponse, hold: Hold, race: Race | None = None
    ) -> None:
        self._pool = pool
        self._connection = [connection]  # `pop` is one step, so `close` releases it once, even if interrupted
        self._raw = raw
        self._hold = hold
        self._race = race
        self.status = raw.status
        self.reason = raw.reason
        self.headers: Mapping[str, str] = raw.fields
        self._received = 0
        self.length = raw.length
        """The number of bytes of the body still to be received; None if the service has not declared it."""

    def readinto(self, target: memoryview) -> int:
        """Receive up to ``len(target)`` bytes; fewer, or zero, only at the end of the body."""
        if self.length is None:
            received = self._raw.readinto(target)
            self._received += received
            return received
        done, wanted, race = 0, min(target.nbytes, self.length), self._race
        if race is not None:
            race.can_continue = race.can_be_continued
        while done < wanted:
            try:
                if race is not None and race.takeover.skip:
                    if not self._drop_some(race.takeover):
                        break
                    continue
                received = self._raw.receive(target[done:wanted])
                if not received:
                    break
                self._received += received
                done += received
                self.length -= received
                if race is not None:
                    race.takeover.reached += received
                    race.look()
            except Overtaken as overtaken:
                self._replace(overtaken)
        return done

    def _drop_some(self, takeover: Takeover[Any]) -> int:
        """Receive bytes that are in the memory already; their number."""
        received = self._raw.receive(memoryview(bytearray(min(takeover.skip, _DRAIN_LIMIT))))
        takeover.skip -= received
        self._received += received
        return received

    def read(self) -> bytes:
        """Receive the rest of the body."""
        if self._race is not None:
            self._race.can_continue = self._received == 0 and 200 <= self.status < 300
        data: bytes | None = None
        while data is None:
            try:
                data = self._raw.read()
            except Overtaken as overtaken:  # noqa: PERF203 - rare
                self._replace(overtaken)
        self._received += len(data)
        self.length = 0
        return data

    def _replace(self, overtaken: Overtaken) -> None:
        """Continue with another response. The connection of the former one was closed before it began."""
        self._hold.leave()
        self._raw.close()
        self._raw, self._hold = overtaken.raw, overtaken.rival.hold
        self._connection[0] = overtaken.rival.connection

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
        if self._race is not None:
            self._race.close(but=connection)
            self._race.can_continue = False
            if self.length == 0:
                self._race.takeover.completed()
        try:
            if self.length is not None and 0 < self.length <= _DRAIN_LIMIT and not self._raw.isclosed():
                self._received += len(self._raw.read())
                self.length = 0
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
    hedging: Hedging | None = None,
    kind: str = "",
    note: Callable[[float, HTTPResponse], None] = lambda *_: None,
) -> Response:
    """Send one request and receive the response headers.

    If a pooled connection turns out to be closed, the request is sent again on another connection, which does not count
    as a failure. *on_repeat* is called before that. Conditional writes are not sent again.

    With *hedging*, the request can be repeated. If it is silent, it is sent once more, and the first response is used.
    It is compared with other requests of its *kind*. *note* is called if the service asks to slow down instead.

    Raises:
        OSError, http.client.HTTPException: the connection failed.
        ClientRequestIdMismatchError: the response belongs to another request.
        Cancelled: *scope* was cancelled.
    """
    pool, scope = _pool.get(), scope or Scope()
    sent = Sent(method, target, headers, body)
    take = partial(_take, pool, origin, scope)
    while True:
        connection, hold = take(is_new=origin in pool.distrusted and _is_conditional_write(method, headers))
        race = None if hedging is None else Race(hedging, kind, sent, connection, hold, take, note)
        try:
            hold.__enter__()
            started = time.perf_counter()
            try:
                raw = _exchange(connection, sent, race)
            except Overtaken as overtaken:
                return Response(pool, overtaken.rival.connection, overtaken.raw, overtaken.rival.hold, race)
        except BaseException as error:
            hold.leave()
            connection.close()
            if race is not None:
                race.close()
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
        log_answer(origin, sent, raw.status, elapsed)
        return _checked(Response(pool, connection, raw, hold, race), origin, sent)


def _take(pool: Pool, origin: Origin, scope: Scope, *, is_new: bool = False) -> tuple[Connection, Hold]:
    """A connection, and what makes *scope* interrupt it."""
    connection = pool.take(origin, is_new=is_new)
    return connection, scope.holding(connection.wake)


def _exchange(connection: Connection, sent: Sent, race: Race | None) -> HTTPResponse:
    """Send *sent* and receive the head of the response."""
    if race is None:
        connection.send(sent.method, sent.target, sent.headers, sent.body)
        return receive_head(Stream(connection), sent.method)
    connection.send(sent.method, sent.target, sent.headers, sent.body, race.patience)
    race.begin()
    raw = receive_head(Stream(connection, race.on_silence), sent.method)
    race.answered(raw)
    return raw


def _checked(response: Response, origin: Origin, sent: Sent) -> Response:
    """*response*, if it belongs to the request *sent*."""
    sent_id = sent.headers.get("x-ms-client-request-id", "")
    echoed_id = response.headers.get("x-ms-client-request-id")
    if not echoed_id and response.status >= 300:  # for the error message
        response.headers = Headers({**response.headers, "x-ms-client-request-id": sent_id})
    if sent_id and echoed_id and sent_id != echoed_id:
        response.discard()
        raise _mismatch(f"{sent.method} {origin.scheme}://{origin.host}{sent.target}", sent_id, response.headers)
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
