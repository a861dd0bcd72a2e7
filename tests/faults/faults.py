"""Faults, as data.

A fault affects one request. Unless its docstring says otherwise, the operation is carried out and only the response
is affected. `after` counts bytes of the response body.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .service import LoggedRequest

OPERATIONS = frozenset(
    {
        "get_blob",
        "head",
        "delete",
        "put_blob",
        "put_block",
        "put_block_from_url",
        "put_block_list",
        "get_block_list",
        "copy_blob",
        "set_metadata",
        "snapshot_blob",
        "list_blobs",
        "create_container",
        "get_container",
        "delete_container",
        "list_containers",
        "get_account_information",
        "get_user_delegation_key",
        "unknown",
    }
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Base of all faults."""


@dataclass(frozen=True, slots=True)
class Fine(Fault):
    """No fault: this request gets its normal response. Used between other faults in a script."""


# Instead of the operation: nothing is read or written.


@dataclass(frozen=True, slots=True)
class Status(Fault):
    """An error response instead of the operation.

    With *before_body* it is sent after the request headers, and the connection is closed without reading the body.
    """

    code: int
    error_code: str | None = None
    retry_after: float | None = None  # seconds; dates are not supported
    retry_after_ms: int | None = None
    body: bytes | None = None  # instead of the XML of the service
    before_body: bool = False


@dataclass(frozen=True, slots=True)
class Redirect(Fault):
    """A redirect of the same path and query to another origin, such as `http://127.0.0.1:1234`."""

    to: str
    status: int = 307


@dataclass(frozen=True, slots=True)
class Reset(Fault):
    """RST after the request, before any byte of a response."""


@dataclass(frozen=True, slots=True)
class Hangup(Fault):
    """FIN after the request, before any byte of a response."""


@dataclass(frozen=True, slots=True)
class ResetUpload(Fault):
    """RST after *after* bytes of the request body."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class ConnectionRefused(Fault):
    """The service is down: every connection is reset, and new ones are refused for *seconds*."""

    seconds: float = 0.2


# Around the operation.


@dataclass(frozen=True, slots=True)
class ChangedEtag(Fault):
    """The blob is overwritten just before this request is carried out.

    The new content is *data*, or the old bytes inverted. With *ignores_conditions* the service ignores If-Match.
    """

    data: bytes | None = None
    ignores_conditions: bool = False


@dataclass(frozen=True, slots=True)
class FullInsteadOfPartial(Fault):
    """200 and the whole blob for a ranged Get Blob."""


@dataclass(frozen=True, slots=True)
class LostAnswer(Fault):
    """The operation is carried out, then RST instead of the response."""


@dataclass(frozen=True, slots=True)
class Hold(Fault):
    """The operation waits until *gate* is set. For tests that need an order of events."""

    gate: threading.Event


@dataclass(frozen=True, slots=True)
class Together(Fault):
    """The operation waits until *count* requests were in progress at once since the log was reset."""

    count: int


# In the response.


@dataclass(frozen=True, slots=True)
class WrongHeader(Fault):
    """Header *name* has the value *value*."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class MissingHeader(Fault):
    """Header *name* is missing. Without Content-Length the connection is closed to end the body."""

    name: str


@dataclass(frozen=True, slots=True)
class WrongContentRange(Fault):
    """Content-Range is *value*, or the right one shifted by *shift* bytes; the body is right."""

    shift: int = 1
    value: str | None = None


@dataclass(frozen=True, slots=True)
class WrongLength(Fault):
    """Content-Length is off by *delta*.

    Too long: FIN after the right body. Too short: the remaining bytes follow, and the connection stays open.
    """

    delta: int


@dataclass(frozen=True, slots=True)
class CorruptByte(Fault):
    """One byte of the body is inverted; checksums in the headers are those of the right body.

    A negative position counts from the end.
    """

    at: int = 0


@dataclass(frozen=True, slots=True)
class WrongBytes(Fault):
    """Another body of the same length: every byte is inverted."""


@dataclass(frozen=True, slots=True)
class Chunked(Fault):
    """The same body in chunked transfer encoding, as from some proxies."""

    size: int = 1000


@dataclass(frozen=True, slots=True)
class MalformedXml(Fault):
    """The XML of the response is truncated, or is *body*. Its Content-Length is consistent."""

    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class EmptyPageWithMarker(Fault):
    """List Blobs: an empty page with a marker for more. The service does this; it is not an error."""


@dataclass(frozen=True, slots=True)
class RepeatedMarker(Fault):
    """List Blobs: NextMarker points to the same page."""


# On the wire.


@dataclass(frozen=True, slots=True)
class ResetInHeaders(Fault):
    """RST in the middle of the response headers."""


@dataclass(frozen=True, slots=True)
class GarbageStatusLine(Fault):
    """Bytes that are not HTTP, then FIN."""

    line: bytes = b"\x16\x03\x01 this is not HTTP\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Torn(Fault):
    """FIN after too few bytes: *after*, and at least one fewer than promised."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class TornReset(Fault):
    """RST after too few bytes: *after*, and at least one fewer than promised."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Stall(Fault):
    """Nothing for *seconds* after *after* bytes (None: before the status line), then the rest."""

    seconds: float
    after: int | None = 0


@dataclass(frozen=True, slots=True)
class StallUntil(Fault):
    """Nothing until *gate* is set after *after* bytes, then the rest. For tests that need an order of events."""

    gate: threading.Event
    after: int = 0


@dataclass(frozen=True, slots=True)
class SlowBytes(Fault):
    """The body is sent at *rate* bytes per second."""

    rate: float


@dataclass(frozen=True, slots=True)
class StaleConnection(Fault):
    """A normal response without `Connection: close`, after which the connection is still closed.

    At once, or with *on_next_request* when the next request arrives, which is neither read nor logged. With *reset* it
    ends with RST instead of FIN.
    """

    on_next_request: bool = False
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """Which requests a rule applies to: those that match everything that is not None.

    *path* is a regular expression searched in the decoded path; *where* is called before the request body is received.
    Of the matching requests, the *nth* (from 1) gets the first fault, and from there on every *every*-th the next one.
    """

    operation: str | None = None
    method: str | None = None
    path: str | None = None
    nth: int = 1
    every: int = 1
    where: Callable[[LoggedRequest], bool] | None = None

    def __post_init__(self) -> None:
        if self.operation is not None and self.operation not in OPERATIONS:
            raise ValueError(f"unknown operation {self.operation!r}: one of {sorted(OPERATIONS)}")
        if self.nth < 1 or self.every < 1:
            raise ValueError("nth and every count from 1")

    def covers(self, request: LoggedRequest) -> bool:
        return (
            self.operation in (None, request.operation)
            and self.method in (None, request.method)
            and (self.path is None or re.search(self.path, request.decoded_path) is not None)
            and (self.where is None or self.where(request))
        )


@dataclass(slots=True)
class Rule:
    """A running script. `FaultService.script()` returns it, so that a test can check that its faults occurred."""

    match: Match
    faults: Sequence[Fault]
    repeat: bool = False
    seen: int = 0  # requests that matched
    fired: int = 0  # faults that occurred
    is_cancelled: bool = field(default=False)

    def cancel(self) -> None:
        self.is_cancelled = True

    @property
    def is_exhausted(self) -> bool:
        """Whether every fault was used, at least once if they repeat."""
        return self.fired >= len(self.faults)

    def next_fault(self, request: LoggedRequest, *, already_hit: bool) -> Fault | None:
        """Count this request if it matches; return its fault unless another rule applied."""
        if self.is_cancelled or not self.match.covers(request):
            return None
        self.seen += 1
        is_due = self.seen >= self.match.nth and (self.seen - self.match.nth) % self.match.every == 0
        if already_hit or not is_due or (self.is_exhausted and not self.repeat):
            return None
        self.fired += 1
        return self.faults[(self.fired - 1) % len(self.faults)]
