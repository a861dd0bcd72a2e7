"""What each fault does to a good answer: pure functions from values to values, and to steps on the wire."""

from __future__ import annotations

import re
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
_ONE_SEND = 1 << 16  # bytes; a small body goes out together with its head
_INVERT = bytes(255 - value for value in range(256))


class End(Enum):
    """How a connection ends after an answer."""

    FIN = auto()
    RST = auto()
    FIN_ON_NEXT_REQUEST = auto()


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


Step = Bytes | Wait | End


def inverted(data: Bytes) -> bytes:
    return bytes(data).translate(_INVERT)


def alter_page(fault: Fault | None, page: ListPage, store: BlobStore) -> ListPage:
    """The listing page that is sent instead of *page*."""
    match fault:
        case EmptyPageWithMarker():
            return replace(page, items=(), next_marker=store.same_place(page.marker))
        case RepeatedMarker():
            return replace(page, next_marker=page.marker or store.same_place(""))
    return page


def alter_answer(fault: Fault | None, answer: Answer) -> Answer:
    """The answer that is sent instead of *answer*, which has its Content-Length."""
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
            headers["Content-Length"] = str(int(headers["Content-Length"]) + delta)
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
    """What goes over the wire, in order. Ending without an End keeps the connection open."""
    head, body = answer.head(), memoryview(answer.body)
    match fault:
        case Reset() | LostAnswer():
            yield End.RST
        case Hangup():
            yield End.FIN
        case ResetInHeaders():
            yield head[: len(head) // 2]
            yield End.RST
        case GarbageStatusLine(line):
            yield line
            yield End.FIN
        case Torn(after):
            yield head
            yield body[: _short_of_all(after, body)]
            yield End.FIN
        case TornReset(after):
            yield head
            yield body[: _short_of_all(after, body)]
            yield End.RST
        case Stall(seconds, None):
            yield Wait(seconds)
            yield head
            yield body
        case Stall(seconds, int(after)):
            yield head
            yield body[:after]
            yield Wait(seconds)
            yield body[after:]
        case SlowBytes(rate):
            yield head
            size = max(1, int(rate * _SLOW_STEP))
            for start in range(0, len(body), size):
                piece = body[start : start + size]
                yield Wait(len(piece) / rate)
                yield piece
        case Chunked(size) if len(body):
            yield head
            for start in range(0, len(body), size):
                piece = body[start : start + size]
                yield b"".join((b"%x\r\n" % len(piece), piece, b"\r\n"))
            yield b"0\r\n\r\n"
        case WrongLength(delta) if delta > 0:
            yield head
            yield body
            yield End.FIN
        case MissingHeader(name) if name.lower() == "content-length":
            yield head
            yield body
            yield End.FIN
        case StaleConnection(on_next_request):
            yield head
            yield body
            yield End.FIN_ON_NEXT_REQUEST if on_next_request else End.FIN
        case _:
            if len(body) <= _ONE_SEND:
                yield head + body
            else:
                yield head
                yield body


def _short_of_all(after: int, body: memoryview) -> int:
    return max(0, min(after, len(body) - 1))


def _shifted(content_range: str, shift: int) -> str:
    return re.sub(
        r"(\d+)-(\d+)", lambda found: f"{int(found[1]) + shift}-{int(found[2]) + shift}", content_range
    )


def _drop(headers: dict[str, str], name: str) -> None:
    for key in [key for key in headers if key.lower() == name.lower()]:
        del headers[key]
