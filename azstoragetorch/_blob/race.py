"""Send a silent request once more, on another connection, and use the response that begins first.

`_engine.hedging` decides when. This module sends, waits, and decides which response is used. `transport` uses it for
every request that can be repeated, and `multiplex` does the same in its own event loop.
"""

from __future__ import annotations

import http.client
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ssl import SSLWantReadError

from azstoragetorch._blob.connection import Body, Connection, Origin, length_of, readable
from azstoragetorch._blob.head import HTTPResponse, Stream, range_of, receive_head
from azstoragetorch._blob.secret import redact
from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.hedging import MOST_HEDGES, Hedging
from azstoragetorch._engine.metrics import count, count_answer
from azstoragetorch._engine.scope import Hold, Scope, on_error

log = logging.getLogger("azstoragetorch")

_MOST_HEAD = 64 * KiB  # bytes of the head of a response to a rival
_LONGEST_WAIT = 2.0  # seconds, to connect for a rival or to send a piece of its body: nothing is received meanwhile


# One referee for each response
# -----------------------------
# A request and its rivals (the same request on other connections) are received by one thread: the one that waits for
# the response. It blocks on the first connection as usual. If nothing has arrived there for a while, `Stream` calls
# `Race.on_silence` on that same thread, which may send a rival and then waits for both connections. So no two responses
# are received at the same time, and nothing is shared between threads.
#
# Which response is used
#
#     head      While no response has begun, the first connection on which one begins is used. A rival receives only its
#               head, into memory of its own. If it is refused (any status but success, another version, another range),
#               or fails, it is dropped, and the thread continues to wait for the first response: a refused rival never
#               replaces the result of the first request.
#     body      A response that has begun to fill the caller's memory has reached some byte. A rival requests the rest,
#               from that byte on, of the same ETag. When its head has arrived and fits, the thread closes the first
#               connection and only then continues with the body of the rival, behind the byte that was reached
#               meanwhile; what the rival sends before that byte is dropped. So every byte of the caller's memory is
#               written by one response, and none by a response that comes late: its socket is closed, and only this
#               thread ever received from it.
#     document  A page of a listing has no ranges. The rival requests all of it, and what had arrived is dropped.
#
# If the first response continues before a rival has begun, the rivals are closed. `Overtaken` is raised through the
# reader of the first response, which is not used any more then. The winner stays in `_rivals`, which `close` closes,
# until its connection belongs to the response: so an interrupt on the way does not leave it open.
#
# A request may have up to `MOST_HEDGES` rivals, one after the other: a rival can be silent as well. A rival never has
# rivals itself. All of them count for the read timeout, which is measured from the last byte that was used.
class Overtaken(Exception):  # noqa: N818 - it carries a response and is not an error
    """A rival's response is to be used instead."""

    def __init__(self, rival: Rival, raw: HTTPResponse) -> None:
        super().__init__()
        self.rival = rival
        self.raw = raw


class _RefusedError(http.client.HTTPException):
    """The response to a rival cannot be used."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """What rivals are compared with: the head of the response that began first.

    It is not the response itself, whose reader refers to the race: an interrupt would leave its connection open until
    the next garbage collection.
    """

    status: int
    etag: str
    range: tuple[int, int, int]
    size: int  # bytes of the body; 0 if the service has not declared it
    can_be_continued: bool  # the rest of the body can be requested: its range and version are known

    @classmethod
    def of(cls, raw: HTTPResponse) -> _Begun:
        """What is known of *raw* before its body is received."""
        etag, span, size = raw.fields.get("etag", ""), range_of(raw.fields), raw.length or 0
        start, last, _ = span or (0, -1, 0)
        is_continuable = raw.status == 206 and bool(etag) and 0 < size == last + 1 - start
        return cls(raw.status, etag, span or (0, 0, 0), size, is_continuable)


@dataclass(frozen=True, slots=True, repr=False)  # the target and the headers have secrets
class Sent:
    """A request as it was sent."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: Body = None


def log_answer(origin: Origin, sent: Sent, status: int, seconds: float) -> None:
    """Log that *sent* was answered."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s %s: %d in %.1f ms", sent.method, _shown(origin, sent), status, seconds * 1000)


def _shown(origin: Origin, sent: Sent) -> str:
    """The URL of *sent* without its secrets."""
    return redact(f"{origin.scheme}://{origin.host}{sent.target}")


class Rival:
    """The same request on another connection, until its response has begun. `Hedging` knows it as a waiting request."""

    __slots__ = ("_arrived", "connection", "hold", "kind", "request_id", "since", "start")

    def __init__(self, connection: Connection, hold: Hold, kind: str, start: int, request_id: str) -> None:
        self.connection = connection
        self.hold = hold
        self.start = start  # the byte of the first response's body that this one begins with
        self.request_id = request_id
        self.kind = kind
        self.since = time.monotonic()
        self._arrived = b""

    def has_begun(self) -> bool:
        """Receive what has arrived; whether the head is complete.

        Raises:
            OSError, http.client.HTTPException: the connection failed.
        """
        while b"\r\n\r\n" not in self._arrived:
            try:
                arrived = self.connection.socket.recv(_MOST_HEAD)
            except (BlockingIOError, SSLWantReadError):
                return False
            self._arrived += arrived
            if not arrived or len(self._arrived) > 2 * _MOST_HEAD:
                raise http.client.RemoteDisconnected("no head of a response")
        return True

    def response(self, method: str, on_silence: Callable[[float], None]) -> HTTPResponse:
        """The response whose head has arrived."""
        return receive_head(Stream(self.connection, on_silence, self._arrived), method)

    def close(self) -> None:
        """Close the connection."""
        self.hold.leave()
        self.connection.close()


class Race:
    """One request on *connection*, and its rivals. `Hedging` knows it as a waiting request.

    Args:
        hedging: Decides when a rival is sent.
        kind: The kind of the request, for *hedging*.
        take: Returns a connection for a rival.
    """

    def __init__(
        self,
        hedging: Hedging,
        kind: str,
        sent: Sent,
        connection: Connection,
        scope: Scope,
        take: Callable[[], Connection],
    ) -> None:
        self._hedging = hedging
        self.kind = kind
        self.since = 0.0  # when the request was sent
        self._is_waiting = False
        self._sent = sent
        self._connection = connection
        self._scope = scope
        self._take = take
        self._rivals: list[Rival] = []
        self._sent_rivals = 0
        self._began = self._look_from = self._look_at = 0.0
        self._seen = 0
        self._first: _Begun | None = None
        self.can_continue = True  # there is a request for what is missing
        self.done = 0
        """Bytes of the body that were received."""

    @property
    def patience(self) -> float:
        """The timeout of the socket while it is received from."""
        return min(self._hedging.patience(self.kind), self._connection.origin.read_timeout)

    @property
    def can_be_continued(self) -> bool:
        """Whether the rest of the body can be requested, from any byte on."""
        return self._first is not None and self._first.can_be_continued

    def begin(self) -> None:
        """The request was sent."""
        self.since = time.monotonic()
        self._is_waiting = True
        self._hedging.enter(self)

    def answered(self, raw: HTTPResponse, winner: Rival | None = None) -> None:
        """The first response has begun; it is that of *winner*, unless that is None."""
        if self._is_waiting:
            self._is_waiting = False
            self._hedging.answered(self, raw.status)
        self._use(raw)
        self.can_continue = False
        self._release(winner)

    def overtaken(self, raw: HTTPResponse, winner: Rival) -> None:
        """*raw*, the response to *winner*, is used, and the caller closes its connection from now on."""
        if self._first is not None and self._first.status != 206:
            self.done = 0
        self._use(raw)
        self._release(winner)

    def _release(self, winner: Rival | None) -> None:
        """Close all rivals but *winner*, which belongs to the response from now on."""
        for rival in [each for each in self._rivals if each is not winner]:
            self._drop(rival)
        self._rivals.clear()

    def _use(self, raw: HTTPResponse) -> None:
        self._first = self._first or _Begun.of(raw)
        self._began = self._look_from = time.monotonic()
        self._look_at = self._began + self._hedging.drip_seconds
        self._seen = self.done

    def close(self) -> None:
        """Close all rivals."""
        if self._is_waiting:
            self._is_waiting = False
            self._hedging.drop(self)
        while self._rivals:
            self._drop(self._rivals[-1])

    def received(self, is_complete: bool) -> None:
        """The response is closed."""
        self.close()
        if is_complete and self.done:
            self._hedging.received(self.done, time.monotonic() - self._began)

    def on_silence(self, since: float) -> None:
        """Wait until the first connection has something to receive, or there is no rival to wait for.

        Raises:
            Overtaken: a rival's response is to be used.
            TimeoutError: nothing has arrived for the read timeout.
        """
        while True:
            if time.monotonic() - since >= self._connection.origin.read_timeout:
                raise TimeoutError("timed out")
            if self._connection.is_readable():  # since the timeout: this thread had to wait for its turn
                return
            latest = self._rivals[-1].since if self._rivals else since
            if self._may_start() and self._hedging.allows(self.kind, latest):
                self._start(f"nothing for {time.monotonic() - since:.3f} s")
            if not self._rivals:
                return
            if self._wait_for_rivals(self._connection):
                if self._first is not None:
                    self.close()  # the body continues
                return

    def look(self) -> None:
        """Look whether the body comes too slowly. Cheap: called after each piece that was received.

        Raises:
            Overtaken: a rival's response is to be used.
        """
        if (now := time.monotonic()) < self._look_at:
            return
        received, size = self.done - self._seen, self._first.size if self._first is not None else 0
        if self._hedging.keeps_pace(size, received, now - self._look_from):
            self._look_from, self._seen = now, self.done
        elif self._may_start() and self._hedging.allows_for_drip(self.kind, size, received, self._look_from):
            self._start(f"{received} bytes in {now - self._look_from:.3f} s")
        if self._rivals:
            self._wait_for_rivals(None)
        self._look_at = time.monotonic() + self._hedging.drip_seconds

    def _may_start(self) -> bool:
        return self.can_continue and self._sent_rivals < MOST_HEDGES

    def _start(self, why: str) -> None:
        """Send a rival."""
        self._sent_rivals += 1
        count("hedged")
        sent = self._rest()
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s: %s, sent once more", sent.method, _shown(self._connection.origin, sent), why)
        connection = self._take()
        request_id = sent.headers.get("x-ms-client-request-id", "")
        rival = Rival(connection, self._scope.holding(connection.waker()), self.kind, self.done, request_id)
        self._rivals.append(rival)
        with on_error(self.close):
            try:
                rival.hold.__enter__()
                connection.send(sent.method, sent.target, sent.headers, sent.body, limit=_LONGEST_WAIT)
                connection.set_timeout(0.0)
                rival.since = time.monotonic()
                self._hedging.enter(rival, is_hedge=True)
            except (OSError, http.client.HTTPException) as error:
                self._drop(rival, repr(error))

    def _rest(self) -> Sent:
        """The request for what is missing."""
        sent, headers = self._sent, dict(self._sent.headers)
        if request_id := headers.get("x-ms-client-request-id"):
            headers["x-ms-client-request-id"] = f"{request_id}-{self._sent_rivals}"
        if self._first is not None and self._first.status == 206:
            start, last, _ = self._first.range
            headers["x-ms-range"] = f"bytes={start + self.done}-{last}"
            headers["If-Match"] = self._first.etag
            headers.pop("x-ms-range-get-content-md5", None)
        return Sent(sent.method, sent.target, headers, sent.body)

    def _wait_for_rivals(self, first: Connection | None) -> bool:
        """Wait until *first* has something to receive (True), or for the patience.

        Raises:
            Overtaken: a rival's response is to be used.
        """
        until = time.monotonic() + self.patience
        while self._rivals and (seconds := until - time.monotonic()) > 0:
            sockets = [rival.connection.socket for rival in self._rivals]
            ready = readable([*sockets, first.socket] if first is not None else sockets, seconds)
            for rival in [each for each in self._rivals if each.connection.socket.fileno() in ready]:
                self._advance(rival)
            if first is not None and first.socket.fileno() in ready:
                return True
        return False

    def _advance(self, rival: Rival) -> None:
        try:
            if not rival.has_begun():
                return
            raw = rival.response(self._sent.method, self.on_silence)
            self._hedging.answered(rival, raw.status)
            count_answer(elapsed := time.monotonic() - rival.since, raw.status, length_of(self._sent.body))
            log_answer(self._connection.origin, self._sent, raw.status, elapsed)
            self._check(rival, raw)
        except (OSError, http.client.HTTPException) as error:
            self._drop(rival, repr(error))
            return
        count("hedges_won")
        log.debug("the second request was answered first")
        rival.connection.set_timeout(self.patience)
        self._connection = rival.connection
        raise Overtaken(rival, raw)

    def _check(self, rival: Rival, raw: HTTPResponse) -> None:
        """Raise unless *raw* can take the place of the first response."""
        first = self._first
        echoed = raw.fields.get("x-ms-client-request-id")
        if echoed and echoed != rival.request_id:
            raise _RefusedError("the response to another request")
        if first is None:
            # 416 without a condition is not a refusal: the blob ends before the range.
            is_good = 200 <= raw.status < 300 or (raw.status == 416 and "If-Match" not in self._sent.headers)
        elif first.status == 206:
            start, last, size = first.range
            is_good = (
                raw.status == 206
                and raw.fields.get("etag") == first.etag
                and range_of(raw.fields) == (start + rival.start, last, size)
                and raw.length == last + 1 - start - rival.start
            )
        else:
            is_good = raw.status == first.status
        if not is_good:
            raise _RefusedError(f"refused with status {raw.status}")

    def _drop(self, rival: Rival, why: str = "the first request was answered first") -> None:
        """Give *rival* up."""
        self._hedging.drop(rival)
        rival.close()
        with suppress(ValueError):  # it was dropped before
            self._rivals.remove(rival)
            count("hedges_canceled")
            log.debug("the second request was given up: %s", why)
