"""Send a silent request once more, on another connection, and use the response that begins first.

`_engine.hedging` decides when, and `takeover` which response is used. This module sends and waits, on the thread that
waits for the response. `transport` uses it for every request that can be repeated.
"""

from __future__ import annotations

import http.client
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from ssl import SSLWantReadError

from azstoragetorch._blob.connection import Body, Connection, Origin, length_of, readable
from azstoragetorch._blob.head import HTTPResponse, Stream, range_of, receive_head
from azstoragetorch._blob.secret import redact
from azstoragetorch._blob.takeover import Attempt, Begun, Takeover
from azstoragetorch._engine.config import KiB
from azstoragetorch._engine.hedging import Hedging
from azstoragetorch._engine.metrics import THROTTLED, count_answer
from azstoragetorch._engine.scope import Hold, on_error

log = logging.getLogger("azstoragetorch")

_MOST_HEAD = 64 * KiB  # bytes of the head of a response to a rival
_LONGEST_WAIT = 2.0  # seconds, to connect for a rival or to send a piece of its body: nothing is received meanwhile


# One referee for each response
# -----------------------------
# A request and its rivals (the same request on other connections) are received by one thread: the one that waits for
# the response. It blocks on the first connection as usual. If nothing has arrived there for a while, `Stream` calls
# `Race.on_silence` on that same thread, which may send a rival and then waits for both connections. So no two responses
# are received at the same time, and nothing is shared between threads. `takeover` argues which of them is used.
#
# A rival receives only its head. When that has arrived and fits, all other connections are closed, and `Overtaken` is
# raised through the reader of the former response, which is not used any more then. If the former response continues
# before a rival has begun, the rivals are closed. A rival that fails is dropped, and the thread continues to wait.
#
# The connections of all attempts are closed by `close`, except for the one that the response has by then: so an
# interrupt on the way leaves none open. A rival never has rivals itself. All of them count for the read timeout, which
# is measured from the last byte that was used.
class Overtaken(Exception):  # noqa: N818 - it carries a response and is not an error
    """A rival's response is to be used instead."""

    def __init__(self, rival: Rival, raw: HTTPResponse) -> None:
        super().__init__()
        self.rival = rival
        self.raw = raw


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


class Rival(Attempt):
    """The same request on another connection, until its response has begun."""

    __slots__ = ("_arrived",)

    def __init__(self, connection: Connection, hold: Hold, kind: str, sent: Sent, number: int, start: int) -> None:
        super().__init__(connection, hold, kind, sent.headers, number, start)
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


class Race:
    """One request on *connection*, and its rivals.

    Args:
        hedging: Decides when a rival is sent.
        kind: The kind of the request, for *hedging*.
        hold: Makes the scope interrupt *connection*.
        take: Returns a connection for a rival, and its hold.
        note: Called with the time at which a rival was sent and with its response, if that asks to slow down.
    """

    def __init__(
        self,
        hedging: Hedging,
        kind: str,
        sent: Sent,
        connection: Connection,
        hold: Hold,
        take: Callable[[], tuple[Connection, Hold]],
        note: Callable[[float, HTTPResponse], None],
    ) -> None:
        self._hedging = hedging
        self._kind = kind
        self._sent = sent
        self._take = take
        self._note = note
        self._current = Attempt(connection, hold, kind, sent.headers)  # what is received from
        self.takeover: Takeover[Attempt] = Takeover(hedging, kind, sent.headers, Attempt.close)
        self.can_continue = True  # there is a request for what is missing

    @property
    def patience(self) -> float:
        """The timeout of the socket while it is received from."""
        return min(self._hedging.patience(self._kind), self._origin.read_timeout)

    @property
    def can_be_continued(self) -> bool:
        """Whether the rest of the body can be requested, from any byte on."""
        begun = self.takeover.begun
        return begun is not None and begun.can_be_continued

    @property
    def _origin(self) -> Origin:
        return self._current.connection.origin

    @property
    def _rivals(self) -> list[Rival]:
        return [each for each in self.takeover.attempts if isinstance(each, Rival) and each is not self._current]

    def begin(self) -> None:
        """The request was sent."""
        self._current.since = time.monotonic()
        self.takeover.enter(self._current)

    def answered(self, raw: HTTPResponse) -> None:
        """The response to the first request has begun."""
        self.takeover.answered(self._current, raw.status)
        self._use(self._current, raw)

    def _use(self, attempt: Attempt, raw: HTTPResponse) -> None:
        first, last, size = range_of(raw.fields) or (0, -1, 0)
        head = Begun(raw.status, raw.fields.get("etag", ""), first, last, size, raw.length or 0)
        self.takeover.begin(attempt, head, raw.fields.get("x-ms-client-request-id", ""))
        self._current = attempt
        self.can_continue = False  # until the body is received

    def close(self, but: Connection | None = None) -> None:
        """Close the connections of all attempts *but* the one that the response has."""
        for attempt in list(self.takeover.attempts):
            if attempt.connection is not but:
                self.takeover.end(attempt)

    def on_silence(self, since: float) -> None:
        """Wait until the current connection has something to receive, or there is no rival to wait for.

        Raises:
            Overtaken: a rival's response is to be used.
            TimeoutError: nothing has arrived for the read timeout.
        """
        while True:
            if time.monotonic() - since >= self._origin.read_timeout:
                raise TimeoutError("timed out")
            if self._current.connection.is_readable():  # since the timeout: this thread had to wait for its turn
                return
            rivals = self._rivals
            latest = rivals[-1].since if rivals else since
            if self.can_continue and self.takeover.is_late(latest):
                self._start(f"nothing for {time.monotonic() - since:.3f} s")
            if not self._rivals:
                return
            if self._wait_for_rivals(self._current.connection):
                if self.takeover.owner is not None:
                    self.takeover.close(but=self._current)  # the body continues
                return

    def look(self) -> None:
        """Look whether the body comes too slowly. Cheap: called after each piece that was received.

        Raises:
            Overtaken: a rival's response is to be used.
        """
        takeover = self.takeover
        if (now := time.monotonic()) < takeover.look_at:
            return
        if self.can_continue and takeover.drips(now):
            self._start("the body comes too slowly")
        if self._rivals:
            self._wait_for_rivals(None)
        takeover.look_at = time.monotonic() + self._hedging.drip_seconds

    def _start(self, why: str) -> None:
        """Send a rival."""
        headers, start = self.takeover.rest()
        sent = Sent(self._sent.method, self._sent.target, headers, self._sent.body)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s %s: %s, sent once more", sent.method, _shown(self._origin, sent), why)
        connection, hold = self._take()
        rival = Rival(connection, hold, self._kind, sent, self.takeover.hedges, start)
        self.takeover.enter(rival)
        with on_error(partial(self.takeover.close, self._current)):
            try:
                hold.__enter__()
                connection.send(sent.method, sent.target, sent.headers, sent.body, limit=_LONGEST_WAIT)
                connection.set_timeout(0.0)
                rival.since = time.monotonic()
            except (OSError, http.client.HTTPException) as error:
                self._drop(rival, error)

    def _wait_for_rivals(self, current: Connection | None) -> bool:
        """Wait until *current* has something to receive (True), or for the patience.

        Raises:
            Overtaken: a rival's response is to be used.
        """
        until = time.monotonic() + self.patience
        while (rivals := self._rivals) and (seconds := until - time.monotonic()) > 0:
            sockets = [rival.connection.socket for rival in rivals]
            ready = readable([*sockets, current.socket] if current is not None else sockets, seconds)
            for rival in [each for each in rivals if each.connection.socket.fileno() in ready]:
                self._advance(rival)
            if current is not None and current.socket.fileno() in ready:
                return True
        return False

    def _advance(self, rival: Rival) -> None:
        try:
            if not rival.has_begun():
                return
            raw = rival.response(self._sent.method, self.on_silence)
            self.takeover.answered(rival, raw.status)
            count_answer(elapsed := time.monotonic() - rival.since, raw.status, length_of(self._sent.body))
            log_answer(self._origin, self._sent, raw.status, elapsed)
            if raw.status in THROTTLED:
                self._note(rival.since, raw)
            rival.connection.set_timeout(self.patience)
            self._use(rival, raw)
        except (OSError, http.client.HTTPException) as error:
            self._drop(rival, error)
            return
        log.debug("the second request was answered first")
        raise Overtaken(rival, raw)

    def _drop(self, rival: Rival, error: Exception) -> None:
        self.takeover.end(rival)
        log.debug("the second request was given up: %r", error)
