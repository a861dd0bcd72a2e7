"""One connection to a service: open it, directly or through a proxy, and send requests.

The proxy and the certificate authorities come from the environment variables that requests and curl read, so a machine
that is set up for other clients needs no further configuration.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import math
import os
import re
import select
import socket
import ssl
import time
import urllib.request
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.process import PerProcess

_SEND_SLICE = 1 * MiB  # bytes; the timeout of a socket is per call of sendall, so a call must not send too much
MAX_IDLE_SECONDS = 100.0  # the service closes idle connections after a few minutes, load balancers earlier
_PORTS = {"http": 80, "https": 443}
_CONTROL_BYTES = bytes([*range(0x20), 0x7F])
_CONTROL = re.compile(r"[\x00-\x20\x7f]")  # or a space: neither is allowed in hosts and URLs
_UNSENDABLE = re.compile(r"[^\x20-\x7e\x80-\xff]")  # in the method, the target and the headers

Body = bytes | memoryview | Sequence[memoryview] | None
_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def length_of(body: Body) -> int:
    """Bytes of *body*."""
    if body is None:
        return 0
    return memoryview(body).nbytes if isinstance(body, (bytes, memoryview)) else sum(piece.nbytes for piece in body)


class Origin(NamedTuple):
    """The server and the timeouts of a connection. Connections of the same origin are interchangeable."""

    scheme: str
    host: str
    connect_timeout: float
    read_timeout: float

    @classmethod
    def of(cls, scheme: str, host: str, config: TransferConfig) -> Origin:
        """The origin for requests to *host*, with its port, under *config*."""
        return cls(scheme, host, config.connect_timeout, config.read_timeout)


def _waker_of(found: weakref.ref[Connection]) -> Callable[[], None]:
    def wake() -> None:
        connection = found()
        if connection is not None:
            connection.interrupt()

    return wake


class Connection:
    """One connection to an origin, direct or through a proxy."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.was_used = False
        self._timeout: float | None = None  # seconds, of the socket; None while it has the connect timeout
        self._is_interrupted = False
        self._was_closed = False  # `close` was called by the request that owns the connection
        self._wakers: dict[object, None] = {}  # calls of `interrupt` that may be using the socket
        self.idle_since = 0.0
        self.wake = _waker_of(weakref.ref(self))
        """A call of `interrupt` for a scope, which does not keep the connection open.

        An interrupt between two lines can lose a connection. Its finalizer closes it then, also while the scope lives.
        """
        self._host = f"Host: {origin.host}"
        self._prefix = ""  # of the request target: a proxy for plain HTTP needs the whole URL
        self.proxy_headers: Mapping[str, str] = {}
        self._http = self._make()

    def _make(self) -> http.client.HTTPConnection:
        origin = self.origin
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        options: dict[str, object] = {"timeout": origin.connect_timeout}
        if _CONTROL.search(origin.host):
            raise ValueError(
                f"{origin.scheme}://{origin.host!r}: the host has a space or a control character; remove it"
            )
        if origin.scheme == "https":
            kind = http.client.HTTPSConnection
            options["context"] = _tls_context()
        proxy = proxy_for(origin.scheme, origin.host)
        if proxy is None:
            return kind(origin.host, **options)  # type: ignore[arg-type]
        through = kind(proxy.host, proxy.port, **options)  # type: ignore[arg-type]
        if origin.scheme == "https":
            target = urlsplit(f"//{origin.host}")
            through.set_tunnel(target.hostname or "", target.port or 443, headers=dict(proxy.headers))
        else:
            self._prefix = f"http://{origin.host}"
            self.proxy_headers = proxy.headers
        return through

    def send(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: Body,
        patience: float | None = None,
        *,
        limit: float | None = None,
    ) -> None:
        """Send a request; connect first if the connection is not open.

        The socket then has the timeout *patience*, or the read timeout. *limit* is the longest time in seconds to
        connect and to send each piece of the body, where that is shorter than the timeouts of the origin.

        Raises:
            ValueError: a part of the request has a control character or another character that HTTP cannot carry.
            OSError: connecting or sending failed.
        """
        head = self._head(method, self._prefix + target, headers)
        connection = self._http
        if connection.sock is None:
            if limit is not None:
                connection.timeout = min(limit, self.origin.connect_timeout)
            connection.connect()
        longest = self.origin.read_timeout if limit is None else min(limit, self.origin.read_timeout)
        self.set_timeout(longest if body is not None or patience is None else patience)
        if self._is_interrupted:  # by an interrupt that came before there was a socket to shut down
            raise ConnectionAbortedError("interrupted")
        try:
            pieces = [memoryview(body)] if isinstance(body, (bytes, memoryview)) else body or ()
            if length_of(pieces) <= _SEND_SLICE:
                connection.sock.sendall(b"".join([head, *pieces]))
            else:
                connection.sock.sendall(head)
                for piece in pieces:
                    for start in range(0, piece.nbytes, _SEND_SLICE):
                        connection.sock.sendall(piece[start : start + _SEND_SLICE])
        except (BrokenPipeError, ConnectionResetError):
            if body is None:
                raise
            # A service that refuses a request responds before it has read a large body: receive that response.
        if body is not None and patience is not None:
            self.set_timeout(patience)

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of the socket; zero makes it non-blocking. Costs next to nothing if it has this timeout."""
        if self._timeout != seconds:
            self.socket.settimeout(seconds)
            self._timeout = seconds

    def _head(self, method: str, target: str, headers: Mapping[str, str]) -> bytes:
        lines = [f"{method} {target} HTTP/1.1", self._host, "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self.proxy_headers:
            lines += [f"{name}: {value}" for name, value in self.proxy_headers.items()]
        text = "\r\n".join(lines)
        head = text.encode("latin-1", "ignore")
        # The only control characters allowed are the line breaks between these lines. One in a value, for example in an
        # ETag from the metadata of a checkpoint, could end this request and start another one.
        lost = len(text) - len(head.translate(None, _CONTROL_BYTES))
        if lost != 2 * (len(lines) - 1) or lines[0].count(" ") != 2 or not target.isascii():
            raise _unsendable(method, target, headers)
        return head + b"\r\n\r\n"

    def begin(self, target: str, headers: Mapping[str, str]) -> socket.socket:
        """Send a GET on an open connection without blocking. The socket stays non-blocking until the next `send`.

        Raises:
            OSError: the request could not be sent at once.
        """
        sock = self.socket
        head = self._head("GET", self._prefix + target, headers)
        self.set_timeout(0.0)
        if sock.send(head) != len(head):
            raise BlockingIOError("the request could not be sent at once")
        return sock

    @property
    def socket(self) -> socket.socket:
        """The socket of an open connection."""
        sock: socket.socket = self._http.sock
        return sock

    def is_stale(self, unchecked: float) -> bool:
        """Whether this idle connection is unusable: too old, closed by the peer, or with unexpected bytes to read.

        The socket is not checked if the connection was used less than *unchecked* seconds ago.
        """
        sock = self._http.sock
        idle = time.monotonic() - self.idle_since
        if sock is None or self._is_interrupted or idle > MAX_IDLE_SECONDS:
            return True
        return idle >= unchecked and self.is_readable()

    def is_readable(self) -> bool:
        """Whether an open connection has bytes to read, or was closed by the peer."""
        return bool(readable([self.socket], 0))

    # A cancel shuts down the socket while a request blocks on it. If the request closed the socket at the same moment,
    # the system could give its descriptor to another connection, and the cancel would shut down that one. So whichever
    # of the two comes later closes the socket. Each side first announces its step and then checks for the other's:
    #
    #     interrupt:   1. add itself to `_wakers`         close:   1. set `_was_closed`
    #                  2. shut down, unless closed                 2. close the socket, unless `_wakers` has an entry
    #                  3. leave `_wakers`; close the socket if `_was_closed` and no other entry is left
    #
    # If the interrupt does not see `_was_closed` in step 2, the request sees the entry in `_wakers` and leaves the
    # closing to the interrupt. Closing twice is harmless: a closed socket object has no descriptor. No step waits, so
    # either side can be a signal handler that interrupts the other.
    def interrupt(self) -> None:
        """Make the thread that blocks on this connection fail at once, or as soon as it is connected."""
        me = object()
        self._wakers[me] = None
        try:
            self._is_interrupted = True
            sock = self._http.sock
            if sock is not None and not self._was_closed:
                with suppress(OSError):  # the peer has closed it
                    # Not SSLSocket.shutdown, which drops the TLS state that the blocked thread is using.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        finally:
            self._wakers.pop(me, None)
            if self._was_closed and not self._wakers:
                self._http.close()

    def close(self) -> None:
        """Close the socket, or leave that to an `interrupt` that is using it. Called by the request that owns it."""
        self._was_closed = True
        if not self._wakers:
            self._http.close()

    def __del__(self) -> None:
        if "_http" in vars(self):  # an interrupt can prevent that
            self._http.close()

    def forget(self) -> None:
        """In a forked child: close the copy of the parent's socket, without sending anything, even in mid-response."""
        sock = self._http.sock
        if sock is not None:
            with suppress(OSError):  # already closed
                os.close(sock.detach())


def readable(sockets: Sequence[socket.socket], seconds: float) -> list[int]:
    """The descriptors of *sockets* that have bytes to read, or have failed; waits for the first one."""
    if not hasattr(select, "poll"):
        return [sock.fileno() for sock in select.select(sockets, [], [], seconds)[0]]
    poll = select.poll()
    for sock in sockets:
        poll.register(sock, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(math.ceil(seconds * 1000))]


def _unsendable(method: str, target: str, headers: Mapping[str, str]) -> ValueError:
    """The error for a request that HTTP cannot carry. It does not show values, which can be secrets."""
    parts = {"the method": method, "the path": target.partition("?")[0], "the SAS": target.partition("?")[2], **headers}
    bad = [
        name if name.isprintable() else repr(name)
        for name, value in parts.items()
        if _UNSENDABLE.search(f"{name}{value}")
        or (name in ("the path", "the SAS") and (" " in value or not value.isascii()))
    ]
    return ValueError(
        f"{method!r} {parts['the path']!r} was not sent: {' and '.join(bad) or 'a header for the proxy'} contains a "
        "line break, another control character, a space or a character that HTTP cannot carry; pass a credential, name "
        "or ETag without it"
    )


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy and the header with its user name and password."""

    host: str
    port: int
    headers: Mapping[str, str] = field(repr=False)


def proxy_for(scheme: str, host: str) -> Proxy | None:
    """The proxy for *scheme* requests to *host*, which can include a port; None to connect directly.

    Raises:
        ValueError: the environment variable does not name an HTTP proxy, or contains a control character.
    """
    settings = urllib.request.getproxies()
    url = (settings.get(scheme) or settings.get("all") or "").strip()
    # proxy_bypass also knows the exceptions in the system settings of macOS and Windows.
    if not url or is_exception(scheme, host, settings.get("no", "")) or urllib.request.proxy_bypass(host):
        return None
    url = url if "://" in url else f"http://{url}"
    variable = f"{scheme.upper()}_PROXY or ALL_PROXY"
    kind = url.partition("://")[0].lower()
    if kind != "http":  # this is the connection to the proxy; https requests through it still use TLS
        raise ValueError(f"{variable} must name an http:// proxy, not {kind}://")
    if _CONTROL.search(url):  # urlsplit drops line breaks and tabs
        raise ValueError(f"{variable} contains a space or a control character: remove it")
    try:
        parts = urlsplit(url)
        hostname, port = parts.hostname, parts.port or _PORTS["http"]
        if not hostname:
            raise ValueError("it has no host")
    except ValueError:  # the original message can show the password
        raise ValueError(f"{variable} is not a valid URL: expected http://[user:password@]host:port") from None
    return Proxy(hostname, port, _login(parts, variable))


def _login(parts: SplitResult, variable: str) -> dict[str, str]:
    if parts.username is None:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    if _CONTROL.search(login.replace(" ", "")):
        raise ValueError(f"{variable} contains a control character in its user name or password: remove it")
    return {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def is_exception(scheme: str, host: str, entries: str) -> bool:
    """Whether *host*, which can include a port, matches *entries*, the value of ``NO_PROXY``.

    An entry is ``*`` for all hosts, an IP address (IPv6 with or without brackets), a network (``10.0.0.0/8``), or a
    domain, with or without a leading dot, which also matches its subdomains. An entry with a port matches only that
    port.
    """
    target = urlsplit(f"//{host}")
    name = (target.hostname or "").rstrip(".")
    port = target.port or _PORTS[scheme]
    address = _address(name)
    return any(_names(entry, name, address, port) for entry in re.split(r"[\s,]+", entries.strip().lower()) if entry)


def _names(entry: str, name: str, address: _IPAddress | None, port: int) -> bool:
    if entry == "*":
        return True
    if address is not None and "/" in entry:
        try:
            return address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    if _address(entry) is None:  # an IPv6 address without brackets has colons, but it has no port
        host, colon, number = entry.rpartition(":")
        if colon and number.isdecimal():
            if int(number) != port:
                return False
            entry = host
    if address is not None:
        return _address(entry) == address
    domain = entry.removeprefix("*").strip(".")
    return bool(domain) and (name == domain or name.endswith(f".{domain}"))


def _address(text: str) -> _IPAddress | None:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return ipaddress.ip_address(bare)
    except ValueError:
        return None


def authorities() -> str:
    """The file or folder with the certificate authorities to trust; empty for those of the system.

    The variables that requests (and so the Azure SDK) reads take precedence over those that OpenSSL reads itself.
    """
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or ""


def make_tls_context(trusted: str) -> ssl.SSLContext:
    """A TLS context that trusts the authorities in the file or folder *trusted*, or those of the system if it is empty.

    Raises:
        ValueError: *trusted* does not exist.
    """
    if trusted and not os.path.exists(trusted):  # noqa: PTH110 - a string from the environment
        raise ValueError(f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names {trusted!r}, which does not exist")
    if os.path.isdir(trusted):  # noqa: PTH112 - a string from the environment
        context = ssl.create_default_context(capath=trusted)
    else:
        context = ssl.create_default_context(cafile=trusted or None)
    if not trusted and not context.cert_store_stats()["x509_ca"] and "SSL_CERT_DIR" not in os.environ:
        import certifi  # for systems without a certificate store

        context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


_tls: PerProcess[dict[str, ssl.SSLContext]] = PerProcess(dict)


def _tls_context() -> ssl.SSLContext:
    trusted, contexts = authorities(), _tls.get()
    return contexts.get(trusted) or contexts.setdefault(trusted, make_tls_context(trusted))
