"""What can go wrong, as data.

A fault befalls one request. Unless its docstring says otherwise the operation is carried out and only the
answer suffers. `after` counts bytes of the answer's body.
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
        "unknown",
    }
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Base of all faults."""


@dataclass(frozen=True, slots=True)
class Fine(Fault):
    """No fault: this request is answered as usual. Spaces out the others in a script."""


# Instead of the operation: nothing is read or written.


@dataclass(frozen=True, slots=True)
class Status(Fault):
    """An error answer instead of the operation.

    With *before_body* it is sent as soon as the request's head is there, and the connection is closed on the
    unread body.
    """

    code: int
    error_code: str | None = None
    retry_after: float | None = None  # seconds; a date is not produced
    retry_after_ms: int | None = None
    body: bytes | None = None  # instead of the service's XML
    before_body: bool = False


@dataclass(frozen=True, slots=True)
class Redirect(Fault):
    """A redirect of the same path and query to another origin, such as `http://127.0.0.1:1234`."""

    to: str
    status: int = 307


@dataclass(frozen=True, slots=True)
class Reset(Fault):
    """RST once the request has arrived, before any byte of an answer."""


@dataclass(frozen=True, slots=True)
class Hangup(Fault):
    """FIN once the request has arrived, before any byte of an answer."""


@dataclass(frozen=True, slots=True)
class ResetUpload(Fault):
    """RST after *after* bytes of the request's body."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class ConnectionRefused(Fault):
    """The service goes away: every connection is reset, and new ones are refused for *seconds*."""

    seconds: float = 0.2


# Around the operation.


@dataclass(frozen=True, slots=True)
class ChangedEtag(Fault):
    """Somebody overwrites the blob just before this request is carried out.

    With *data*, or with as many bytes as it has, each inverted.
    With *ignores_conditions* the service then answers as if no If-Match had been sent.
    """

    data: bytes | None = None
    ignores_conditions: bool = False


@dataclass(frozen=True, slots=True)
class FullInsteadOfPartial(Fault):
    """200 and the whole blob for a ranged Get Blob."""


@dataclass(frozen=True, slots=True)
class LostAnswer(Fault):
    """The operation is carried out, then RST instead of the answer."""


@dataclass(frozen=True, slots=True)
class Hold(Fault):
    """The operation waits until *gate* is set. For tests that need an order of events, not a span of time."""

    gate: threading.Event


@dataclass(frozen=True, slots=True)
class Together(Fault):
    """The operation waits until *count* requests were in progress at once since the log was reset."""

    count: int


# In the answer.


@dataclass(frozen=True, slots=True)
class WrongHeader(Fault):
    """Header *name* says *value*."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class MissingHeader(Fault):
    """The answer lacks header *name*. Without Content-Length the connection is closed to end the body."""

    name: str


@dataclass(frozen=True, slots=True)
class WrongContentRange(Fault):
    """Content-Range is *value*, or the true one moved by *shift* bytes; the body is the right one."""

    shift: int = 1
    value: str | None = None


@dataclass(frozen=True, slots=True)
class WrongLength(Fault):
    """Content-Length is off by *delta*.

    Too long: FIN after the true body. Too short: the surplus bytes follow, and the connection stays open.
    """

    delta: int


@dataclass(frozen=True, slots=True)
class CorruptByte(Fault):
    """One byte of the body is inverted; checksums in the headers are those of the true body.

    Negative counts from the end.
    """

    at: int = 0


@dataclass(frozen=True, slots=True)
class WrongBytes(Fault):
    """The body is a plausible other one of the same length: every byte inverted."""


@dataclass(frozen=True, slots=True)
class Chunked(Fault):
    """The same body in transfer-encoding chunked, as some proxies make it."""

    size: int = 1000


@dataclass(frozen=True, slots=True)
class MalformedXml(Fault):
    """The answer's XML stops in the middle, or is *body*. Its Content-Length is consistent."""

    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class EmptyPageWithMarker(Fault):
    """List Blobs: nothing on this page, more under its marker. The service does this; it is not an error."""


@dataclass(frozen=True, slots=True)
class RepeatedMarker(Fault):
    """List Blobs: NextMarker leads back to this same page."""


# On the wire.


@dataclass(frozen=True, slots=True)
class ResetInHeaders(Fault):
    """RST in the middle of the answer's head."""


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
class SlowBytes(Fault):
    """The body at *rate* bytes per second."""

    rate: float


@dataclass(frozen=True, slots=True)
class StaleConnection(Fault):
    """A good answer without `Connection: close`, after which the connection is closed all the same.

    At once, or with *on_next_request* when the next request arrives on it: that one is dropped, unread and
    not logged. With *reset* by RST, not by FIN.
    """

    on_next_request: bool = False
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """Which requests a rule is about. What is None does not matter; all of what is given must hold.

    *path* is a regular expression searched in the decoded path; *where* is asked before the request's body has
    been received. Of the requests that match, the *nth* (from 1) gets the first fault, and from there on every
    *every*-th gets the next one.
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
    """A script under way. `FaultService.script()` returns it: a test can see that its faults came to pass."""

    match: Match
    faults: Sequence[Fault]
    repeat: bool = False
    seen: int = 0  # requests that matched
    fired: int = 0  # faults that befell one
    is_cancelled: bool = field(default=False)

    def cancel(self) -> None:
        self.is_cancelled = True

    @property
    def is_exhausted(self) -> bool:
        """Every fault has been used (at least once, if they repeat)."""
        return self.fired >= len(self.faults)

    def next_fault(self, request: LoggedRequest, *, already_hit: bool) -> Fault | None:
        """Count this request if it matches; take the fault that is due unless another rule hit it."""
        if self.is_cancelled or not self.match.covers(request):
            return None
        self.seen += 1
        is_due = self.seen >= self.match.nth and (self.seen - self.match.nth) % self.match.every == 0
        if already_hit or not is_due or (self.is_exhausted and not self.repeat):
            return None
        self.fired += 1
        return self.faults[(self.fired - 1) % len(self.faults)]
