"""A small HTTP proxy with a log: CONNECT tunnels for https, absolute requests for http.

A route maps a name such as `account.blob.core.windows.net:443` to a server on loopback, so that a test can use real
host names without a name server.
"""

from __future__ import annotations

import base64
import select
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from .wire import Answer, Connection, Head, LoopbackServer

_PIECE = 1 << 16
_CONNECT_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class ProxiedRequest:
    """One request to the proxy: its target, and the status that the proxy sent itself or passed on."""

    connection: int
    method: str  # CONNECT for a tunnel, whose contents are not logged
    target: str
    headers: Mapping[str, str]  # names in lower case
    status: int


class LoggingProxy(LoopbackServer):
    """A proxy for any target. With *user* and *password* it responds with 407 to requests without them.

    *routes* replaces `host:port` targets. With *ssl_context* clients connect to the proxy itself over TLS.
    """

    def __init__(
        self,
        *,
        user: str | None = None,
        password: str = "",
        routes: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.log: list[ProxiedRequest] = []
        self._routes = dict(routes or {})
        self._credentials = None
        if user is not None:
            self._credentials = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._book = threading.Lock()
        super().__init__(ssl_context=ssl_context)
        self.url = f"{'https' if ssl_context else 'http'}://{self.address}"

    def serve(self, connection: Connection) -> None:
        head = connection.read_head()
        if head is None:
            return
        if self._credentials not in (None, head.headers.get("proxy-authorization")):
            headers = {
                "Proxy-Authenticate": 'Basic realm="proxy"',
                "Content-Length": "0",
                "Connection": "close",
            }
            self._answer(connection, head, Answer(407, headers))
            return
        is_tunnel = head.method == "CONNECT"
        origin = head.target if is_tunnel else urlsplit(head.target).netloc
        if ":" not in origin:
            origin += ":80"
        host, _, port = self._routes.get(origin, origin).rpartition(":")
        try:
            upstream = socket.create_connection((host, int(port)), _CONNECT_TIMEOUT)
        except (OSError, ValueError):
            self._answer(connection, head, Answer(502, {"Content-Length": "0", "Connection": "close"}))
            return
        with upstream:
            upstream.settimeout(None)
            if is_tunnel:
                self._answer(connection, head, Answer(200))
                _pump(connection.sock, upstream)
            else:
                self._forward(connection, head, upstream)
                _pump(connection.sock, upstream, lambda answer: self._note(connection, head, _status(answer)))

    def _forward(self, connection: Connection, head: Head, upstream: socket.socket) -> None:
        """Pass one request on with `Connection: close`, so that the response ends with the stream."""
        url = urlsplit(head.target)
        path = url.path + (f"?{url.query}" if url.query else "")
        body = connection.read_body(head)
        dropped = ("proxy-authorization", "proxy-connection", "connection", "transfer-encoding", "expect")
        headers = {name: value for name, value in head.headers.items() if name not in dropped}
        headers |= {"connection": "close", "content-length": str(len(body))}
        lines = [f"{head.method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        upstream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)

    def _answer(self, connection: Connection, head: Head, answer: Answer) -> None:
        self._note(connection, head, answer.status)
        connection.send(answer.head())

    def _note(self, connection: Connection, head: Head, status: int) -> None:
        with self._book:
            self.log.append(ProxiedRequest(connection.number, head.method, head.target, head.headers, status))


def _status(answer: bytes) -> int:
    """The status in the first line of a response, or 0 if it has none."""
    words = answer.split(b" ", 2)
    return int(words[1]) if len(words) == 3 and words[1].isdigit() else 0


def _pump(client: socket.socket, upstream: socket.socket, note: Callable[[bytes], None] | None = None) -> None:
    """Copy in both directions until either side ends. *note* is called with the first piece of the response."""
    poll = select.poll()
    other = {client.fileno(): (client, upstream), upstream.fileno(): (upstream, client)}
    for descriptor in other:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            source, sink = other[descriptor]
            data = source.recv(_PIECE)
            if not data:
                return
            if source is upstream and note is not None:
                note(data)
                note = None
            sink.sendall(data)
            # TLS can hold decrypted bytes, for which the socket is not readable.
            while isinstance(source, ssl.SSLSocket) and source.pending():
                sink.sendall(source.recv(_PIECE))
