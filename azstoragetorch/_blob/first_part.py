"""A read of the first bytes of one blob, as `multiplex` does it: on one connection, or more if that one is silent.

It handles only the common case, a complete 206 response. `Attempt.advance` receives what has arrived, and never waits.
`takeover` argues which attempt is received.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ssl import SSLWantReadError

from azstoragetorch._blob import takeover
from azstoragetorch._blob.connection import Connection
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.head import parse_head, range_of
from azstoragetorch._blob.takeover import Begun, Takeover, UnfitError
from azstoragetorch._blob.transport import give_back
from azstoragetorch._engine.memory import bytes_to_fill
from azstoragetorch._engine.metrics import count, count_answer
from azstoragetorch._engine.scope import Hold, Scope

MAX_HEAD_BYTES = 16 << 10  # of a response: status line and headers
_NOTHING = memoryview(b"")
KIND = "GET"  # the kind of these requests for `Hedging`: `service` uses the same one


@dataclass(slots=True, repr=False, eq=False)  # the target has secrets
class FirstPart:
    """What is read, the attempts to read it, and the memory. Exactly one of *done* and *failed* is called.

    *note* gets the time at which an attempt was sent, and the status, the reason and the headers of its response.
    """

    takeover: Takeover[Attempt]
    target: str
    length: int
    scope: Scope
    note: Callable[[float, int, str, Mapping[str, str]], None]
    done: Callable[[BlobVersion, bytes], None]
    failed: Callable[[], None]
    data: bytes = b""
    missing: memoryview = _NOTHING  # of *data*
    is_over: bool = False

    def end(self, attempt: Attempt, *, is_good: bool) -> None:
        """*attempt* has ended. Its connection goes back to the pool only after a complete response."""
        attempt.hold.leave()
        found = self.takeover.begun
        if is_good and found is not None and not attempt.hold.was_woken:
            self.takeover.close(but=attempt)
            count("bytes_received", found.length)
            give_back(attempt.connection)
            data = self.data
            done, _ = self.finish()
            done(BlobVersion(found.size, found.etag), data)
            return
        self.takeover.end(attempt)
        if not self.takeover.attempts:
            _, failed = self.finish()
            failed()

    def finish(self) -> tuple[Callable[[BlobVersion, bytes], None], Callable[[], None]]:
        """End the read; the functions of which one is to be called. Afterwards they do nothing."""
        done, self.done = self.done, _ignore
        failed, self.failed = self.failed, _ignore
        self.is_over = True
        self.takeover.owner = None  # reference cycles would keep the caller's memory
        self.takeover.attempts.clear()
        self.data, self.missing = b"", _NOTHING
        return done, failed


class Attempt(takeover.Attempt):
    """One request of a read."""

    __slots__ = ("_head", "descriptor", "read", "silent_since", "socket")

    def __init__(
        self,
        read: FirstPart,
        connection: Connection,
        descriptor: int,
        hold: Hold,
        headers: dict[str, str],
        start: int = 0,
    ) -> None:
        super().__init__(connection, hold, KIND, headers, read.takeover.hedges, start)
        self.read = read
        self.descriptor = descriptor
        self.socket = connection.socket
        self.silent_since = self.since
        self._head = b""
        read.takeover.enter(self)

    def wants_hedge(self, now: float) -> bool:
        """Whether to request what is missing once more; takes a token of the budget if so."""
        takeover = self.read.takeover
        if takeover.hedging is None or takeover.attempts[-1:] != [self]:
            return False
        if now - self.silent_since >= takeover.hedging.patience(KIND):
            return not self.connection.is_readable() and takeover.is_late(self.silent_since)
        return takeover.owner is self and takeover.drips(now)

    def advance(self, scratch: memoryview) -> bool:
        """Receive what has arrived; return whether the read is complete.

        Raises:
            OSError, http.client.HTTPException: the connection failed, or the response is not the expected one.
        """
        sock, read = self.socket, self.read
        takeover = read.takeover
        try:
            while takeover.owner is not self:
                self._take_head(scratch[: _received(sock.recv_into(scratch))])
            while takeover.skip:
                takeover.skip -= _received(sock.recv_into(scratch[: takeover.skip]))
            while read.missing:
                received = _received(sock.recv_into(read.missing))
                read.missing = read.missing[received:]
                takeover.reached += received
        except (BlockingIOError, SSLWantReadError):
            return False
        return True

    def _take_head(self, arrived: memoryview) -> None:
        before = len(self._head)
        self._head += arrived
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > MAX_HEAD_BYTES:
                raise UnfitError("the head is too long")
            return
        found, request_id = self._parse(self._head[:end])
        body = arrived[end + 4 - before :]
        size = min(self.read.length, found.size)
        if len(body) > found.length or size == 1 > len(body):
            raise UnfitError("the body is not as long as declared")
        self._head = b""
        self.read.takeover.begin(self, found, request_id)
        self._take_body(body, size)

    def _take_body(self, body: memoryview, size: int) -> None:
        """Take what has arrived of the body with its head."""
        read, takeover = self.read, self.read.takeover
        known = min(len(body), takeover.skip)
        takeover.skip -= known
        body = body[known:]
        if not read.data:
            if len(body) == size:
                read.data, takeover.reached = bytes(body), size
                return
            read.data, read.missing = bytes_to_fill(size)
        read.missing[: len(body)] = body
        read.missing = read.missing[len(body) :]
        takeover.reached += len(body)

    def _parse(self, head: bytes) -> tuple[Begun, str]:
        """The head of a response to exactly this request, and the id that it repeats."""
        read, now = self.read, time.monotonic()
        status, fields, stays_open = parse_head(head)
        read.note(self.since, status, fields.get("", ""), fields)
        read.takeover.answered(self, status)
        count_answer(now - self.since, status, 0)
        if status == 416 and read.takeover.owner is None:  # not a refusal: the blob is empty
            read.takeover.close(but=self)
        found = range_of(fields)
        if status != 206 or found is None or not stays_open or "transfer-encoding" in fields:
            raise UnfitError(f"an answer with status {status} is for a thread")
        first, last, size = found
        request_id, etag = fields.get("x-ms-client-request-id", ""), fields.get("etag", "")
        if first != self.start or last + 1 != min(read.length, size):
            raise UnfitError("another range")
        if fields.get("content-length") != str(last + 1 - first):
            raise UnfitError("the body is not as long as the range")
        if request_id != self.request_id or not etag:
            raise UnfitError("possibly the response to another request")
        return Begun(status, etag, first, last, size, last + 1 - first), request_id


def _ignore(*_: object) -> None:
    """Nobody waits any more."""


def _received(received: int) -> int:
    if not received:
        raise UnfitError("the connection was closed")
    return received
