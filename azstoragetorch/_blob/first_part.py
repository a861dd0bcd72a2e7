"""A read of the first bytes of one blob, as `multiplex` does it: on one connection, or more if that one is silent.

It handles only the common case, a complete 206 response. `Attempt.advance` receives what has arrived, and never waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ssl import SSLWantReadError

from azstoragetorch._blob.connection import Connection
from azstoragetorch._blob.download import BlobVersion
from azstoragetorch._blob.head import parse_head, range_of
from azstoragetorch._blob.transport import give_back
from azstoragetorch._engine.hedging import MOST_HEDGES, Hedging
from azstoragetorch._engine.memory import bytes_to_fill
from azstoragetorch._engine.metrics import THROTTLED, count, count_answer
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Hold, Scope

MAX_HEAD_BYTES = 16 << 10  # of a response: status line and headers
KIND = "GET"  # the kind of these requests for `Hedging`: `service` uses the same one


class UnexpectedResponseError(Exception):
    """The response is not one that this module handles."""


@dataclass(slots=True, repr=False, eq=False)  # the target and the headers have secrets
class FirstPart:
    """What is read, and the attempts to read it. Exactly one of *done* and *failed* is called.

    *note* gets the status, the reason and the headers of the response to the first attempt. *drop* gives up an attempt.
    """

    # All attempts are received by the one thread of the multiplexer. The memory of the read belongs to one attempt, its
    # owner. While there is none, the first attempt whose response has begun and fits becomes the owner, and all others
    # are closed. If the owner is silent, another attempt requests the rest, from the byte that was reached, of the same
    # ETag. When its response has begun, the owner is closed, and only then the memory moves to the new owner, which
    # drops what the former one has received meanwhile. So every byte is written once, by one response. An attempt that
    # is refused, or fails, ends alone, as long as there is another one.

    hedging: Hedging | None
    target: str
    headers: Mapping[str, str]
    length: int
    scope: Scope
    note: Callable[[int, str, Mapping[str, str]], None]
    done: Callable[[BlobVersion, bytes], None]
    failed: Callable[[], None]
    drop: Callable[[Attempt], None]
    attempts: list[Attempt] = field(default_factory=list)
    owner: Attempt | None = None
    hedges: int = 0
    is_over: bool = False

    def rest(self) -> tuple[dict[str, str], int]:
        """The headers of a request for what is missing, and the byte that it begins with."""
        self.hedges += 1
        headers = dict(self.headers)
        headers["x-ms-client-request-id"] += f"-{self.hedges}"
        owner = self.owner
        if owner is None or owner.version is None:
            return headers, 0
        headers["x-ms-range"] = ByteRange(owner.reached, owner.size).header
        headers["If-Match"] = owner.version.etag
        return headers, owner.reached

    def end(self, attempt: Attempt, *, is_good: bool) -> None:
        """*attempt* has ended. Its connection goes back to the pool only after a complete response."""
        attempt.hold.leave()
        with suppress(ValueError):  # the call that began the read was interrupted, and has ended it
            self.attempts.remove(attempt)
        if is_good and attempt.version is not None and not attempt.hold.was_woken:
            if self.attempts:
                self.drop_all()
            count("bytes_received", len(attempt.data))
            give_back(attempt.connection)
            done, _ = self.finish()
            done(attempt.version, attempt.data)
            return
        attempt.close()
        if attempt.is_hedge and self.owner is not attempt:
            count("hedges_canceled")
        if not self.attempts:
            _, failed = self.finish()
            failed()

    def finish(self) -> tuple[Callable[[BlobVersion, bytes], None], Callable[[], None]]:
        """End the read; the functions of which one is to be called. Afterwards they do nothing."""
        done, self.done = self.done, _ignore
        failed, self.failed = self.failed, _ignore
        self.is_over = True
        self.owner = None  # a reference cycle would keep the caller's memory
        self.attempts.clear()
        return done, failed

    def drop_all(self, but: Attempt | None = None) -> None:
        """Close all attempts *but* one."""
        for attempt in [each for each in self.attempts if each is not but]:
            self.attempts.remove(attempt)
            if attempt.is_hedge and self.owner is not attempt:
                count("hedges_canceled")
            self.drop(attempt)


class Attempt:
    """One request of a read, on one connection. `Hedging` knows it as a request that waits for its answer."""

    __slots__ = (
        "_began",
        "_head",
        "_missing",
        "_request_id",
        "_skip",
        "_start",
        "connection",
        "data",
        "descriptor",
        "hold",
        "is_hedge",
        "kind",
        "read",
        "silent_since",
        "since",
        "size",
        "socket",
        "version",
    )

    def __init__(
        self, read: FirstPart, connection: Connection, descriptor: int, hold: Hold, request_id: str, start: int = -1
    ) -> None:
        self.read = read
        self.connection = connection
        self.descriptor = descriptor
        self.hold = hold
        self.kind = KIND
        self.is_hedge = start >= 0
        self._request_id = request_id
        self._start = max(0, start)  # the first byte that was requested
        self._skip = 0  # bytes to drop, which another attempt has received meanwhile
        self._head = b""
        self.version: BlobVersion | None = None
        self.data = b""
        self.size = 0  # bytes of the result, once the response has begun
        self._missing = memoryview(b"")
        self.socket = connection.socket
        self.since = self.silent_since = self._began = time.monotonic()
        if read.hedging is not None:
            read.hedging.enter(self, is_hedge=self.is_hedge)

    @property
    def reached(self) -> int:
        """Bytes of the result that are there."""
        return self.size - self._missing.nbytes

    def wants_hedge(self, now: float) -> bool:
        """Whether to request what is missing once more; takes a token of the budget if so."""
        read, hedging = self.read, self.read.hedging
        if hedging is None or read.hedges >= MOST_HEDGES or read.attempts[-1:] != [self]:
            return False
        if now - self.silent_since >= hedging.patience(KIND):
            return not self.connection.is_readable() and hedging.allows(KIND, self.silent_since)
        seconds = now - self._began
        if read.owner is not self or seconds < hedging.drip_seconds:
            return False
        return not hedging.keeps_pace(self.size, self.reached, seconds) and hedging.allows_for_drip(
            KIND, self.size, self.reached, self._began
        )

    def advance(self, scratch: memoryview) -> bool:
        """Receive what has arrived; return whether the read is complete."""
        sock = self.socket
        try:
            while self.version is None:
                self._take_head(scratch[: _received(sock.recv_into(scratch))])
            while self._skip:
                self._skip -= _received(sock.recv_into(scratch[: self._skip]))
            while self._missing:
                self._missing = self._missing[_received(sock.recv_into(self._missing)) :]
        except (BlockingIOError, SSLWantReadError):
            return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self.hold.leave()
        self.connection.close()
        if self.read.hedging is not None:
            self.read.hedging.drop(self)

    def _take_head(self, arrived: memoryview) -> None:
        self._head += arrived
        head, end, body = self._head.partition(b"\r\n\r\n")
        if not end:
            if len(self._head) > MAX_HEAD_BYTES:
                raise UnexpectedResponseError
            return
        version, read = self._check(head), self.read
        now = time.monotonic()
        count_answer(now - self.since, 206, 0)
        if read.hedging is not None:
            read.hedging.answered(self)
        size = min(read.length, version.size)
        if len(body) > size - self._start or size == 1 > len(body):
            raise UnexpectedResponseError
        self._head = b""
        self.size = size
        self._began = now
        if read.hedges:
            body = self._take_over(body)
        read.owner = self
        self.version = version
        if self._missing:
            pass  # the memory of the former owner
        elif len(body) == size:
            self.data = body
            return
        else:
            self.data, self._missing = bytes_to_fill(size)
        self._missing[: len(body)] = body
        self._missing = self._missing[len(body) :]

    def _take_over(self, body: bytes) -> bytes:
        """Close all other attempts and take the memory of the owner; the part of *body* that is missing there."""
        read, former = self.read, self.read.owner
        read.drop_all(but=self)
        if self.is_hedge:
            count("hedges_won")
        if former is None:
            return body
        self.data, self._missing = former.data, former._missing  # noqa: SLF001 - of this class
        known = self.reached - self._start
        self._skip = max(0, known - len(body))
        return body[known:]

    def _check(self, head: bytes) -> BlobVersion:
        """The version of the blob, from the headers of a response to exactly this request."""
        status, fields, stays_open = parse_head(head)
        if not self.is_hedge:
            self.read.note(status, fields.get("", ""), fields)
        if status in THROTTLED:
            count_answer(time.monotonic() - self.since, status, 0)
            if self.read.hedging is not None:
                self.read.hedging.answered(self, status)
        if status == 416 and self.read.owner is None:  # not a refusal: the blob is empty
            self.read.drop_all(but=self)
        found = range_of(fields)
        if status != 206 or found is None or not stays_open or "transfer-encoding" in fields:
            raise UnexpectedResponseError
        start, stop, size = found[0], found[1] + 1, found[2]
        if start != self._start or stop != min(self.read.length, size):
            raise UnexpectedResponseError
        if fields.get("content-length") != str(stop - start):
            raise UnexpectedResponseError
        if fields.get("x-ms-client-request-id") != self._request_id or not fields.get("etag"):
            raise UnexpectedResponseError  # possibly the response to another request
        version, owner = BlobVersion(size, fields["etag"]), self.read.owner
        if owner is not None and owner.version != version:
            raise UnexpectedResponseError
        return version


def _ignore(*_: object) -> None:
    """Nobody waits any more."""


def _received(received: int) -> int:
    if not received:
        raise UnexpectedResponseError  # the connection was closed
    return received
