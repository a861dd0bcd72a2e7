"""Which of several responses to one request fills the caller's memory, and from which byte on. No I/O.

A request that is silent for too long is sent once more, on another connection. Two modules do that: `race` for a thread
that waits for one response, on connections that block, and `first_part` for the one thread that receives many, on
connections that do not. Both send and receive, and ask a `Takeover` what to send and what may be received.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from azstoragetorch._blob.connection import Connection
from azstoragetorch._engine.hedging import MOST_HEDGES, Hedging
from azstoragetorch._engine.metrics import count
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Hold

_ID = "x-ms-client-request-id"


class UnfitError(http.client.HTTPException):
    """The response to an attempt cannot be used."""


class Begun(NamedTuple):
    """The head of a response, as far as two of them are compared. The range is that of the blob, by Content-Range."""

    status: int
    etag: str
    first: int  # byte of the blob
    last: int
    size: int  # bytes of the blob
    length: int  # bytes of the body; 0 if the service has not declared them

    @property
    def can_be_continued(self) -> bool:
        """Whether another response can continue the body at any byte: its version and range are known."""
        return self.status == 206 and bool(self.etag) and 0 < self.length == self.last + 1 - self.first


class Attempt:
    """One request on one connection. `Hedging` knows it as a request that waits for its answer.

    *number* is 0 for the first one, and *start* the byte of the body that it begins with.
    """

    __slots__ = ("connection", "hold", "kind", "number", "request_id", "since", "start")

    def __init__(
        self, connection: Connection, hold: Hold, kind: str, headers: Mapping[str, str], number: int = 0, start: int = 0
    ) -> None:
        self.connection = connection
        self.hold = hold
        self.kind = kind
        self.request_id = headers.get(_ID, "")
        self.number = number
        self.start = start
        self.since = time.monotonic()

    def close(self) -> None:
        """Close the connection."""
        self.hold.leave()
        self.connection.close()


A = TypeVar("A", bound=Attempt)


# One buffer is never written by two responses, and never gets bytes of two versions
# ----------------------------------------------------------------------------------
# An attempt is in one of three states:
#
#     waiting   it was sent, and its response has not begun
#     owner     its response fills the memory; at most one attempt is in this state
#     closed    it has failed, its response does not fit, or another attempt became the owner
#
# One thread drives a takeover. It receives only from attempts that are not closed: of those that wait the head, into
# memory of their own, and of the owner the body. `begin` alone makes an owner.
#
#     One writer    Before `begin` makes an attempt the owner, it closes all others, the former owner included. So
#                   between two calls all bytes come from one response. One that comes late has nowhere to go, since
#                   nothing is received from a closed connection.
#     One version   The first owner settles the version and the range. Another attempt may follow it only with exactly
#                   the rest that it requested, of the same ETag, which is also the condition of its request. Otherwise
#                   it is closed, and the owner stays: a refusal never replaces the result of the first request.
#     Once          `reached` grows only by bytes that the owner has written. An attempt requests what is missing from
#                   `reached` on. Until its response begins, the owner may write more: so many bytes of the new owner
#                   are dropped (`skip`). No byte of the memory is written twice, and none is left out.
#     Documents     A page of a listing has no range. Another attempt requests all of it, and what had arrived is
#                   dropped by the caller, which has passed nothing on.
#
# An interrupt between two lines of `begin` leaves some attempts closed and the others in `attempts`, where the caller's
# cleanup finds them. It never leaves two that may write: the owner changes after the last one was closed.
class Takeover(Generic[A]):
    """The attempts of one request. *close* is called for each one that is given up."""

    __slots__ = (
        "_began",
        "_close",
        "_headers",
        "_kind",
        "_look_from",
        "_seen",
        "attempts",
        "begun",
        "hedges",
        "hedging",
        "look_at",
        "owner",
        "reached",
        "skip",
    )

    def __init__(
        self, hedging: Hedging | None, kind: str, headers: Mapping[str, str], close: Callable[[A], object]
    ) -> None:
        self.hedging = hedging
        self._kind = kind
        self._headers = headers
        self._close = close
        self.attempts: list[A] = []
        """All that are not closed, in the order in which they were sent."""
        self.owner: A | None = None
        self.begun: Begun | None = None
        """What the first owner has settled."""
        self.hedges = 0
        self.reached = 0
        """Bytes of the body that are in the memory."""
        self.skip = 0
        """Bytes that the owner sends before the next one that is missing."""
        self.look_at = self._began = self._look_from = 0.0
        self._seen = 0

    def enter(self, attempt: A) -> None:
        """*attempt* was sent."""
        self.attempts.append(attempt)
        if self.hedging is not None:
            self.hedging.enter(attempt, is_hedge=attempt.number > 0)

    def answered(self, attempt: A, status: int) -> None:
        """The head of the response to *attempt* has arrived."""
        if self.hedging is not None:
            self.hedging.answered(attempt, status)

    def begin(self, attempt: A, head: Begun, request_id: str) -> None:
        """Make *attempt* the owner and close all others. *request_id* is the one that its response repeats, if any.

        Raises:
            UnfitError: its response cannot take the place of the first one.
        """
        if attempt.number:
            self._check(attempt, head, request_id)
        self.close(but=attempt)
        if attempt.number:
            count("hedges_won")
        if self.begun is None:
            self.begun = head
        elif not self.begun.can_be_continued:
            self.reached = 0  # it sends all of a document
        self.skip = self.reached - attempt.start
        self._began = self._look_from = now = time.monotonic()
        self._seen = self.reached
        if self.hedging is not None:
            self.look_at = now + self.hedging.drip_seconds
        self.owner = attempt

    def end(self, attempt: A) -> None:
        """Close *attempt*."""
        if self.hedging is not None:
            self.hedging.drop(attempt)
        self._close(attempt)
        with suppress(ValueError):  # it was closed before
            self.attempts.remove(attempt)
            if attempt.number and attempt is not self.owner:
                count("hedges_canceled")

    def close(self, but: A | None = None) -> None:
        """Close all attempts *but* one."""
        for attempt in list(self.attempts):
            if attempt is not but:
                self.end(attempt)

    def completed(self) -> None:
        """The whole body was received."""
        if self.hedging is not None and self.reached:
            self.hedging.received(self.reached, time.monotonic() - self._began)

    def is_late(self, since: float) -> bool:
        """Whether to send another attempt, since nothing has arrived since *since*; takes a token if so."""
        return self.hedging is not None and self.hedges < MOST_HEDGES and self.hedging.allows(self._kind, since)

    def drips(self, now: float) -> bool:
        """Whether to send another attempt, since the body comes too slowly; takes a token if so."""
        hedging = self.hedging
        if hedging is None or now < self.look_at:
            return False
        self.look_at = now + hedging.drip_seconds
        received, size = self.reached - self._seen, self.begun.length if self.begun is not None else 0
        if hedging.keeps_pace(size, received, now - self._look_from):
            self._look_from, self._seen = now, self.reached
            return False
        return self.hedges < MOST_HEDGES and hedging.allows_for_drip(self._kind, size, received, self._look_from)

    def rest(self) -> tuple[dict[str, str], int]:
        """The headers of another attempt, for what is missing, and the byte of the body that it begins with."""
        self.hedges += 1
        count("hedged")
        headers, begun = dict(self._headers), self.begun
        if request_id := headers.get(_ID):
            headers[_ID] = f"{request_id}-{self.hedges}"
        if begun is None or not begun.can_be_continued:
            return headers, 0
        headers["x-ms-range"] = ByteRange(begun.first + self.reached, begun.last + 1).header
        headers["If-Match"] = begun.etag
        headers.pop("x-ms-range-get-content-md5", None)
        return headers, self.reached

    def _check(self, attempt: A, head: Begun, request_id: str) -> None:
        if request_id not in ("", attempt.request_id):
            raise UnfitError("the response to another request")
        begun = self.begun
        if begun is None:
            # 416 without a condition is not a refusal: the blob ends before the range.
            fits = 200 <= head.status < 300 or (head.status == 416 and "If-Match" not in self._headers)
        elif begun.can_be_continued:
            fits = head == begun._replace(first=begun.first + attempt.start, length=begun.length - attempt.start)
        else:
            fits = head.status == begun.status
        if not fits:
            raise UnfitError(f"refused with status {head.status}")
