"""The head of a response: the status line and the headers. `Stream` is what the rest of it is received from."""

from __future__ import annotations

import http.client
import io
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from azstoragetorch._blob.connection import Connection
from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch._engine.metrics import count
from azstoragetorch._engine.scope import on_error

_NUMBER = re.compile(r"[0-9]{1,19}")  # no size is longer, and Python refuses to parse thousands of digits
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) (\d{3})(?: (.*))?")
_RECORD_BYTES = 16 * KiB  # of a TLS record, at most
_MOST_AT_ONCE, _MOST_SECONDS = 1 * MiB, 0.05  # received at once over TLS
_MOST_KEYS = 256  # of headers that are remembered
_MAX_FIELDS, _MAX_LINE = 200, 64 * KiB  # of a response: headers, and bytes of one


class Stream(io.RawIOBase):
    """What arrives on a connection after *early*, which has arrived already.

    *on_silence* is called whenever nothing has arrived for the timeout of the socket, with the time since when. It
    returns to wait again, or raises. Without it the timeout is an error.
    """

    def __init__(
        self, connection: Connection, on_silence: Callable[[float], None] | None = None, early: bytes = b""
    ) -> None:
        self._socket = connection.socket
        self._on_silence = on_silence
        self._early = early
        self._is_tls = isinstance(connection.socket, ssl.SSLSocket)
        self._silent_since: float | None = None

    def readable(self) -> bool:
        """Whether it can be read: `io.BufferedReader` asks."""
        return True

    def readinto(self, target: Any) -> int:
        """Receive up to ``len(target)`` bytes, at least one; zero if the connection was closed."""
        if self._early:
            count = min(len(target), len(self._early))
            target[:count] = self._early[:count]
            self._early = self._early[count:]
            return count
        target = memoryview(target)
        received = self._receive(target)
        return self._receive_more(target, received) if received == _RECORD_BYTES and self._is_tls else received

    def _receive(self, target: Any) -> int:
        since, self._silent_since = self._silent_since, None
        if since is None:
            try:
                return self._socket.recv_into(target)
            except TimeoutError:
                if self._on_silence is None:
                    raise
                since = self._begin_of_silence()
        if self._on_silence is None:
            raise TimeoutError("timed out")
        while True:
            self._on_silence(since)
            try:
                return self._socket.recv_into(target)
            except TimeoutError:
                pass

    def _receive_more(self, target: Any, received: int) -> int:
        """Receive further TLS records: a call returns one, of at most 16 KiB.

        The layers above would take as long for each as decrypting it. They have to see when a body slows down. So this
        takes a moment only, and leaves a silence to the next call.
        """
        size, end = min(len(target), _MOST_AT_ONCE), time.monotonic() + _MOST_SECONDS
        is_open, waits = True, False
        try:
            while is_open and received < size and time.monotonic() < end:
                if waits:
                    more = self._socket.recv_into(target[received:size])
                    is_open = more > 0
                else:
                    more, is_open = self._receive_arrived(target[received:size], end)
                received, waits = received + more, not waits
        except TimeoutError:
            self._silent_since = self._begin_of_silence()
        return received

    def _receive_arrived(self, target: Any, end: float) -> tuple[int, bool]:
        """Receive the TLS records that have arrived, until *end*; their bytes, and whether the connection is open.

        The time for it is counted: it is not the network that takes it.
        """
        sock, received, more, began = self._socket, 0, 1, time.perf_counter()
        timeout = sock.gettimeout()
        sock.settimeout(0.0)
        try:
            while more and received < len(target) and time.monotonic() < end:
                more = sock.recv_into(target[received:])
                received += more
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):  # the latter if the peer wants new keys
            pass
        finally:
            sock.settimeout(timeout)
            count("tls_seconds", time.perf_counter() - began)
        return received, more > 0

    def _begin_of_silence(self) -> float:
        return time.monotonic() - (self._socket.gettimeout() or 0.0)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """A buffered reader: http.client asks a socket for one."""
        return io.BufferedReader(self, 8 * KiB)  # less than a record: it never waits for what is behind a response


class Headers(Mapping[str, str]):
    """Response headers; names are case-insensitive."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values  # by lower-case name; names of metadata keep their case

    def __getitem__(self, name: str) -> str:
        return self._values[name if name in self._values else name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._values or name.lower() in self._values)


class HTTPResponse(http.client.HTTPResponse):
    """http.client's response with its own header parser: the email parser of http.client takes ten times as long."""

    is_head = False
    fields: Headers

    def begin(self) -> None:
        """Read the status line and the headers."""
        while True:
            self.code, values, stays_open = parse_head(self._read_head())
            if self.code >= 200:  # lower statuses are interim responses
                break
        self.status = self.code
        self.reason = values.pop("", "")
        self.version = 11
        self.fields = Headers(values)
        self.chunked = values.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.will_close = not stays_open
        length = values.get("content-length")
        self.length = None
        if self.is_head or self.status in (204, 304):
            self.length = 0
        elif length is not None and not self.chunked:
            self.length = number_in(length)
            if self.length is None:
                raise http.client.HTTPException(f"Content-Length is {length[:80]!r}")
        if self.length is None and not self.chunked:
            self.will_close = True

    def receive(self, target: memoryview) -> int:
        """Receive at least one byte of a body of a declared length, up to ``len(target)``; zero if it ends early."""
        received = int(self.fp.readinto1(target))
        self.length = (self.length or 0) - received
        return received

    def _read_head(self) -> bytes:
        lines: list[bytes] = []
        for _ in range(_MAX_FIELDS):
            line = self.fp.readline(_MAX_LINE)
            if line in (b"\r\n", b"\n") and lines:
                return b"".join(lines)
            if not line.endswith(b"\n"):
                if not lines and not line:
                    raise http.client.RemoteDisconnected("the connection was closed without a response")
                raise http.client.IncompleteRead(line) if lines else http.client.BadStatusLine(repr(line))
            lines.append(line)
        raise http.client.HTTPException(f"the response has more than {_MAX_FIELDS} headers")


_keys: dict[str, str] = {}  # by name as it was sent: most responses have the same ones, and computing one takes longer


def _key_of(name: str) -> str:
    """The key for the header *name*: lower case, except that case matters in names of metadata."""
    bare = name.strip()
    lower = bare.lower()
    if lower.startswith("x-ms-meta-"):
        return bare
    if len(_keys) < _MOST_KEYS:
        _keys[name] = lower
    return lower


def parse_head(head: bytes) -> tuple[int, dict[str, str], bool]:
    """The status, the headers by lower-case name, and whether the connection stays open.

    The reason phrase is the value for the empty name. Names of metadata keep their case.

    Raises:
        http.client.HTTPException: *head* is not a valid status line with headers.
    """
    # Not splitlines: it also splits at some bytes of UTF-8 names.
    first, *lines = head.decode("latin-1").rstrip("\r\n").replace("\r\n", "\n").split("\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise http.client.BadStatusLine(repr(first))
    values = {"": (found.group(3) or "").strip()}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise http.client.HTTPException(f"{line[:80]!r} is not a header")
        values[_keys.get(name) or _key_of(name)] = value.strip()
    connection = values.get("connection", "").lower()
    stays_open = "close" not in connection and (found.group(1) == "1" or "keep-alive" in connection)
    return int(found.group(2)), values, stays_open


def number_in(text: str | None) -> int | None:
    """The size or count that the service has written as *text*; None if it is no such number."""
    return int(text) if text is not None and _NUMBER.fullmatch(text) else None


def range_of(fields: Mapping[str, str]) -> tuple[int, int, int] | None:
    """The first and the last byte of the body, and the size of the blob, by Content-Range; None if that is missing."""
    found = _CONTENT_RANGE.fullmatch(fields.get("content-range", ""))
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def receive_head(stream: Stream, method: str) -> HTTPResponse:
    """The response on *stream*, when its head has arrived."""
    response = HTTPResponse(stream, method=method)  # type: ignore[arg-type]  # it has what is used of a socket
    response.is_head = method == "HEAD"
    with on_error(response.close):
        response.begin()
    return response
