"""The effect of each fault on a response: pure functions from values to values, and to steps on the wire."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

from .faults import (
    Chunked,
    CorruptByte,
    EmptyPageWithMarker,
    Fault,
    GarbageStatusLine,
    Hangup,
    LostAnswer,
    MalformedXml,
    MissingHeader,
    RepeatedMarker,
    Reset,
    ResetInHeaders,
    SlowBytes,
    StaleConnection,
    Stall,
    StallUntil,
    Torn,
    TornReset,
    WrongBytes,
    WrongContentRange,
    WrongHeader,
    WrongLength,
)
from .store import BlobStore, ListPage
from .wire import Answer, Bytes

_SLOW_STEP = 0.02  # seconds between the pieces of SlowBytes
_ONE_SEND = 1 << 16  # bytes; a small body is sent together with the headers
_INVERT = bytes(255 - value for value in range(256))


class End(Enum):
    """How a connection ends after a response."""

    FIN = auto()
    RST = auto()
    FIN_ON_NEXT_REQUEST = auto()


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Until:
    gate: threading.Event


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes for the wire, of which *body_bytes* belong to the body; *status* if they complete the headers."""

    data: Bytes
    body_bytes: int = 0
    status: int | None = None


Step = Send | Wait | Until | End


def inverted(data: Bytes) -> bytes:
    return bytes(data).translate(_INVERT)


def alter_page(fault: Fault | None, page: ListPage, store: BlobStore) -> ListPage:
    """The listing page to send instead of *page*."""
    match fault:
        case EmptyPageWithMarker():
            return replace(page, items=(), next_marker=store.same_place(page.marker))
        case RepeatedMarker():
            return replace(page, next_marker=page.marker or store.same_place(""))
    return page


def alter_answer(fault: Fault | None, answer: Answer) -> Answer:
    """The response to send instead of *answer*, which has its Content-Length."""
    headers, body = dict(answer.headers), answer.body
    match fault:
        case WrongHeader(name, value):
            _drop(headers, name)
            headers[name] = value
        case MissingHeader(name):
            _drop(headers, name)
        case WrongContentRange(shift, value):
            if "Content-Range" in headers:
                headers["Content-Range"] = value or _shifted(headers["Content-Range"], shift)
        case WrongLength(delta):
            headers["Content-Length"] = str(max(0, int(headers["Content-Length"]) + delta))
        case CorruptByte(at):
            if len(body):
                changed = bytearray(body)
                changed[at % len(body)] ^= 0xFF
                body = changed
        case WrongBytes():
            body = inverted(body)
        case MalformedXml(replacement):
            body = bytes(body[: len(body) // 2]) if replacement is None else replacement
            headers["Content-Length"] = str(len(body))
        case Chunked() if len(body):
            _drop(headers, "Content-Length")
            headers["Transfer-Encoding"] = "chunked"
        case _:
            return answer
    return Answer(answer.status, headers, body)


def delivery(fault: Fault | None, answer: Answer) -> Iterator[Step]:
    """The steps on the wire, in order. Without an `End` the connection stays open."""
    first, body = answer.head(), memoryview(answer.body)
    head = Send(first, status=answer.status)
    match fault:
        case Reset() | LostAnswer():
            yield End.RST
        case Hangup():
            yield End.FIN
        case ResetInHeaders():
            yield Send(first[: len(first) // 2])
            yield End.RST
        case GarbageStatusLine(line):
            yield Send(line)
            yield End.FIN
        case Torn(after):
            yield head
            yield _part(body[: _short_of_all(after, body)])
            yield End.FIN
        case TornReset(after):
            yield head
            yield _part(body[: _short_of_all(after, body)])
            yield End.RST
        case Stall(seconds, None):
            yield Wait(seconds)
            yield head
            yield _part(body)
        case Stall(seconds, int(after)):
            yield head
            yield _part(body[:after])
            yield Wait(seconds)
            yield _part(body[after:])
        case StallUntil(gate, after):
            yield head
            yield _part(body[:after])
            yield Until(gate)
            yield _part(body[after:])
        case SlowBytes(rate):
            yield head
            for piece in _pieces(body, max(1, int(rate * _SLOW_STEP))):
                yield Wait(len(piece) / rate)
                yield _part(piece)
        case Chunked(size) if len(body):
            yield head
            for piece in _pieces(body, size):
                yield Send(b"".join((b"%x\r\n" % len(piece), piece, b"\r\n")), len(piece))
            yield Send(b"0\r\n\r\n")
        case _:
            if len(body) <= _ONE_SEND:
                yield Send(first + body, len(body), answer.status)
            else:
                yield head
                yield _part(body)
            if (end := _end_of_whole(fault)) is not None:
                yield end


def _end_of_whole(fault: Fault | None) -> End | None:
    """How the connection ends after a complete response."""
    match fault:
        case StaleConnection(reset=True):
            return End.RST
        case StaleConnection(on_next_request):
            return End.FIN_ON_NEXT_REQUEST if on_next_request else End.FIN
        case WrongLength(delta) if delta > 0:
            return End.FIN
        case MissingHeader(name) if name.lower() == "content-length":
            return End.FIN
    return None


def _part(body: memoryview) -> Send:
    return Send(body, len(body))


def _pieces(body: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


def _short_of_all(after: int, body: memoryview) -> int:
    return max(0, min(after, len(body) - 1))


def _shifted(content_range: str, shift: int) -> str:
    return re.sub(r"(\d+)-(\d+)", lambda found: f"{int(found[1]) + shift}-{int(found[2]) + shift}", content_range)


def _drop(headers: dict[str, str], name: str) -> None:
    for key in [key for key in headers if key.lower() == name.lower()]:
        del headers[key]
