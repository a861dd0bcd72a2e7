"""An HTTP/1.1 server on plain sockets, with the control that faults need.

A connection can send incomplete headers, or end with FIN after too few bytes, or with RST, which `http.server` does not
allow. A server has an acceptor thread and a thread for each connection; `close()` ends all of them.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import ssl
import struct
import termios
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_HEAD = 1 << 20  # bytes; far more than any client here sends, to detect a broken one
_RECEIVE = 1 << 16
_JOIN_TIMEOUT = 60.0  # seconds; the thread of a connection blocks only on its socket, which close() shuts down

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and headers of a request; header names are lower-case."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def raw_path(self) -> str:
        """The path as it was sent, percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """The decoded query parameters. As in the service, `+` is a space here, and a plus in the path."""
        pairs = (pair.partition("=") for pair in self.target.partition("?")[2].split("&") if pair)
        return {unquote_plus(name): unquote_plus(value) for name, _, value in pairs}


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that a server is about to send."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Bytes = b""

    def head(self) -> bytes:
        try:
            reason = HTTPStatus(self.status).phrase
        except ValueError:
            reason = "Unknown"
        lines = [f"HTTP/1.1 {self.status} {reason}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class PeerGoneError(Exception):
    """The peer closed its side, or this server is closing."""


class Connection:
    """One accepted socket. Only its thread reads, writes and closes it; other threads can `interrupt()` it."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.number = number
        self.sock = sock
        self.is_waiting_for_request = False
        self._received = bytearray()
        self._reset_at_end = False

    def read_head(self) -> Head | None:
        """The headers of the next request; None if the peer closed the connection between requests."""
        self.is_waiting_for_request = not self._received
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if len(self._received) > _MAX_HEAD:
                raise PeerGoneError
            data = self.sock.recv(_RECEIVE)
            self.is_waiting_for_request = False
            if not data:
                return None
            self._received += data
        first, *lines = self._received[:end].decode("latin-1").split("\r\n")
        del self._received[: end + 4]
        words = first.split(" ")
        if len(words) != 3:
            raise PeerGoneError
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.strip().lower(), value.strip()
            headers[name] = f"{headers[name]},{value}" if name in headers else value
        return Head(words[0], words[1], headers)

    def read_body(self, head: Head, limit: int | None = None) -> bytearray:
        """The request body, or its first *limit* bytes."""
        if head.headers.get("expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            body = bytearray()
            while size := int(self._read_line().partition(b";")[0], 16):
                body += self._read_exactly(size)
                self._read_line()
                if limit is not None and len(body) >= limit:
                    return body[:limit]
            while self._read_line():
                pass
            return body
        length = int(head.headers.get("content-length", "0"))
        return self._read_exactly(length if limit is None else min(limit, length))

    def send(self, data: Bytes) -> None:
        self.sock.sendall(data)

    def wait(self, seconds: float) -> None:
        """Sleep. Raises PeerGoneError as soon as the peer disconnects or the server closes."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        # Clients do not pipeline here, so input during a response is the end of stream of the peer.
        if poll.poll(seconds * 1000):
            raise PeerGoneError

    def wait_for_input(self) -> None:
        """Wait until there is something to read, or the end of the stream."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not self._received:
            poll.poll()

    def reset_at_end(self) -> None:
        """End with RST instead of FIN, after the kernel of the peer has received everything sent so far."""
        self._reset_at_end = True

    def interrupt(self, *, reset: bool = False) -> None:
        """From another thread: make the owner end the connection, with RST if *reset*."""
        self._reset_at_end |= reset
        with suppress(OSError):
            # Shutting down the sending side as well would send a FIN before the reset.
            self._shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self.sock.fileno() < 0:
            return
        with suppress(OSError):
            if self._reset_at_end:
                self._drain()
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                # Unlike close(), this reaches the peer even if a forked child has the descriptor.
                self._shutdown(socket.SHUT_WR)
        self.sock.close()

    def _shutdown(self, how: int) -> None:
        # SSLSocket.shutdown also drops the TLS state, which another thread may be using to send.
        socket.socket.shutdown(self.sock, how)

    def _drain(self) -> None:
        """Wait until the peer acknowledged everything, or is gone: a reset discards what is still queued here."""
        gone = select.poll()
        gone.register(self.sock, 0)  # POLLHUP and POLLERR, which are always reported
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            queued = struct.unpack("i", fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
            if not queued or gone.poll(0):
                return
            time.sleep(0.001)

    def _read_line(self) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            self._receive_more()
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    def _read_exactly(self, size: int) -> bytearray:
        body = bytearray(size)
        have = min(size, len(self._received))
        body[:have] = self._received[:have]
        del self._received[:have]
        with memoryview(body) as view:
            while have < size:
                count = self.sock.recv_into(view[have:])
                if not count:
                    raise PeerGoneError
                have += count
        return body

    def _receive_more(self) -> None:
        data = self.sock.recv(_RECEIVE)
        if not data:
            raise PeerGoneError
        self._received += data


class LoopbackServer:
    """Accepts on 127.0.0.1 and runs `serve()` for each connection in a separate thread.

    Subclasses override `serve`. With *ssl_context* every connection is TLS.
    """

    def __init__(self, *, ssl_context: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.host = host
        self._ssl_context = ssl_context
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._connections_opened = 0
        self._closing = threading.Event()
        self._is_abandoned = False
        self._listener = _bind(host, 0)
        self.port: int = self._listener.getsockname()[1]
        self._wake_read, self._wake_write = socket.socketpair()
        self._acceptor: threading.Thread | None = None
        _live.add(self)
        self._listen()

    def serve(self, connection: Connection) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop accepting, end every connection and join every thread. Idempotent."""
        if self._is_abandoned or self._closing.is_set():
            return
        self._closing.set()
        self._stop_listening()
        with self._lock:
            self._listener.close()
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            connection.interrupt()
        for thread in threads:
            thread.join(_JOIN_TIMEOUT)
        self._wake_read.close()
        self._wake_write.close()
        stuck = [thread.name for thread in threads if thread.is_alive()]
        if stuck:
            raise RuntimeError(f"connection threads did not end: {stuck}")

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def open_connections(self) -> int:
        """The number of open connections. A close by the peer is noticed with a short delay."""
        return len(self._connections)

    @property
    def connections_opened(self) -> int:
        """The number of connections accepted since the start."""
        return self._connections_opened

    def drop_connections(self, *, reset: bool = False) -> int:
        """End every open connection, with RST if *reset*; return their number."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.interrupt(reset=reset)
        return len(connections)

    def drop_idle_connections(self) -> int:
        """Close connections without a request in flight, as a service does after a while."""
        with self._lock:
            idle = [connection for connection in self._connections if connection.is_waiting_for_request]
        for connection in idle:
            connection.interrupt()
        return len(idle)

    @contextmanager
    def refusing_connections(self) -> Iterator[None]:
        """Within the block all connections are closed and new ones are refused."""
        self._refuse()
        try:
            yield
        finally:
            self._listen()

    def refuse_for(self, seconds: float) -> None:
        """Refuse connections for *seconds*; this blocks, so only the thread of a connection calls it."""
        self._refuse()
        if not self._closing.wait(seconds):
            self._listen()

    def _refuse(self) -> None:
        while True:
            self._stop_listening()
            with self._lock:
                if self._closing.is_set():
                    return
                if self._acceptor is not None:  # another thread has begun to listen again since
                    continue
                # A child that was forked just now may still hold a copy of the listener, which would keep the port
                # in use: shutdown() ends listening in every copy. OSError: it was not listening.
                with suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RD)
                self._listener.close()
                # Bound without listen(): connections are refused, and no other process can use the port.
                self._listener = _bind(self.host, self.port)
                break
        self.drop_connections(reset=True)

    def _listen(self) -> None:
        with self._lock:
            if self._closing.is_set() or self._acceptor is not None:
                return
            self._listener.listen(1024)
            self._acceptor = threading.Thread(target=self._accept, name=f"{self.address} acceptor", daemon=True)
            self._acceptor.start()

    def _stop_listening(self) -> None:
        with self._lock:
            acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            self._wake_write.send(b"x")
            acceptor.join(_JOIN_TIMEOUT)
            self._wake_read.recv(1)

    def _accept(self) -> None:
        listener = self._listener
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll()]
            if self._wake_read.fileno() in ready:
                return
            try:
                sock, _ = listener.accept()
            except OSError:
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections_opened += 1
                connection = Connection(sock, self._connections_opened)
                thread = threading.Thread(
                    target=self._run,
                    args=(connection,),
                    name=f"{self.address} #{connection.number}",
                    daemon=True,
                )
                self._connections.add(connection)
                self._threads.add(thread)
            thread.start()

    def _run(self, connection: Connection) -> None:
        try:
            if self._ssl_context is not None:
                # The handshake waits until interrupt() can reach it.
                connection.sock = self._ssl_context.wrap_socket(
                    connection.sock, server_side=True, do_handshake_on_connect=False
                )
            if self._closing.is_set():
                return
            if isinstance(connection.sock, ssl.SSLSocket):
                connection.sock.do_handshake()
            self.serve(connection)
        except (PeerGoneError, OSError):
            pass  # the peer disconnected, or close() interrupted this thread: clean up
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())

    def _abandon_in_child(self) -> None:
        """In a forked child: close the copies of the parent's sockets, which would keep its connections open.

        Takes no lock: any thread of the parent can have held it at the fork.
        """
        self._is_abandoned = True
        for connection in list(self._connections):
            connection.sock.close()
        for sock in (self._listener, self._wake_read, self._wake_write):
            sock.close()


def _bind(host: str, port: int) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


_live: weakref.WeakSet[LoopbackServer] = weakref.WeakSet()


def _abandon_all() -> None:
    for server in list(_live):
        server._abandon_in_child()


os.register_at_fork(after_in_child=_abandon_all)
