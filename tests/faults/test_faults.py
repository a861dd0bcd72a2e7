"""Every fault, checked on the wire by an independent client."""

from __future__ import annotations

import base64
import hashlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from xml.etree import ElementTree

import pytest
from azure.storage.blob import ContainerClient

from . import faults
from .faults import (
    ChangedEtag,
    Chunked,
    ConnectionRefused,
    CorruptByte,
    EmptyPageWithMarker,
    Fault,
    Fine,
    FullInsteadOfPartial,
    GarbageStatusLine,
    Hangup,
    Hold,
    LostAnswer,
    MalformedXml,
    Match,
    MissingHeader,
    Redirect,
    RepeatedMarker,
    Reset,
    ResetInHeaders,
    ResetUpload,
    SlowBytes,
    StaleConnection,
    Stall,
    StallUntil,
    Status,
    Together,
    Torn,
    TornReset,
    WrongBytes,
    WrongContentRange,
    WrongHeader,
    WrongLength,
)
from .fixtures import LoopbackTls
from .service import FaultService

CONTENT = bytes(range(200)) * 5
BLOB = "/devstoreaccount1/data/blob"
LIST = "/devstoreaccount1/data?restype=container&comp=list"
TIMEOUT = 60  # seconds


@dataclass(frozen=True, slots=True)
class Seen:
    """All received bytes, and how the connection ended."""

    data: bytes
    end: str  # "FIN" or "RST"

    @property
    def head(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1])


def watch(service: FaultService, method: str = "GET", target: str = BLOB, body: bytes = b"") -> Seen:
    """Send one request and read until the service ends the connection."""
    with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
        head = f"{method} {target} HTTP/1.1\r\nHost: {service.address}\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(f"{head}x-ms-blob-type: BlockBlob\r\n\r\n".encode() + body)
        return read_to_the_end(sock)


def read_to_the_end(sock: socket.socket) -> Seen:
    data = bytearray()
    try:
        while piece := sock.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        return Seen(bytes(data), "RST")
    return Seen(bytes(data), "FIN")


class Client:
    """One kept-alive connection. http.client reconnects by itself if the connection was closed."""

    def __init__(self, service: FaultService, tls: ssl.SSLContext | None = None) -> None:
        if tls is None:
            self._connection = http.client.HTTPConnection(service.host, service.port, timeout=TIMEOUT)
        else:
            self._connection = http.client.HTTPSConnection(service.host, service.port, timeout=TIMEOUT, context=tls)

    def get(self, target: str = BLOB, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        return self.ask("GET", target, None, **headers)

    def ask(
        self, method: str, target: str = BLOB, body: bytes | None = None, **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request(
            method, target, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = self._connection.getresponse()
        return answer, answer.read()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("data", "blob", CONTENT)
    return fault_service


@pytest.fixture
def client(service: FaultService) -> Iterator[Client]:
    client = Client(service)
    yield client
    client.close()


@contextmanager
def taking(at_least: float, below: float = TIMEOUT) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert at_least <= time.monotonic() - start < below


def assert_good(client: Client) -> None:
    """The fault was used: the next request gets a normal response."""
    answer, body = client.get()
    assert (answer.status, body) == (200, CONTENT)


def put_new_blob(service: FaultService) -> None:
    client = Client(service)
    assert client.ask("PUT", BLOB, b"new", x_ms_blob_type="BlockBlob")[0].status == 201
    client.close()


class TestInsteadOfTheOperation:
    @pytest.mark.parametrize("code", [401, 403, 404, 408, 409, 412, 429, 500, 502, 503, 504])
    @pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
    def test_status(self, service: FaultService, client: Client, code: int, method: str) -> None:
        service.script(Match(method=method), [Status(code)])
        answer, body = client.ask(method)
        assert answer.status == code
        assert answer.headers["x-ms-error-code"]
        assert "Retry-After" not in answer.headers
        assert ("WWW-Authenticate" in answer.headers) == (code == 401)
        if method != "HEAD":
            assert ElementTree.fromstring(body).findtext("Code") == answer.headers["x-ms-error-code"]
        assert_good(client)
        assert service.connections_opened == 1

    def test_status_with_details(self, service: FaultService, client: Client) -> None:
        service.script(
            "get_blob",
            [
                Status(503, "OperationTimedOut", retry_after=2, retry_after_ms=1500),
                Status(500, body=b"plain"),
            ],
        )
        answer, _ = client.get()
        assert answer.headers["x-ms-error-code"] == "OperationTimedOut"
        assert answer.headers["Retry-After"] == "2"
        assert answer.headers["x-ms-retry-after-ms"] == "1500"
        assert client.get()[1] == b"plain"

    def test_status_before_the_body(self, service: FaultService) -> None:
        """The response is sent although the request body was not, and the connection ends."""
        service.script("put_blob", [Status(503, before_body=True)])
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            sock.sendall(f"PUT {BLOB} HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n".encode())
            seen = read_to_the_end(sock)
        assert (seen.status, seen.end) == (503, "FIN")
        assert b"Connection: close" in seen.head
        assert service.get("data", "blob") == CONTENT
        assert service.log[0].body_length == 0

    def test_redirect(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [Redirect("http://elsewhere:1"), Redirect("http://elsewhere:1/", 302)])
        answer, body = client.get(f"{BLOB}?sig=x")
        assert (answer.status, body) == (307, b"")
        assert answer.headers["Location"] == f"http://elsewhere:1{BLOB}?sig=x"
        assert client.get()[0].status == 302
        assert_good(client)

    @pytest.mark.parametrize(("fault", "end"), [(Reset(), "RST"), (Hangup(), "FIN")])
    def test_reset_and_hangup(self, service: FaultService, fault: Fault, end: str) -> None:
        service.script(Match(method="PUT"), [fault])
        assert watch(service, "PUT", body=b"new") == Seen(b"", end)
        assert service.get("data", "blob") == CONTENT
        assert (service.log[0].status, service.log[0].body_length) == (None, 3)

    @pytest.mark.parametrize("after", [0, 1000])
    def test_reset_upload(self, service: FaultService, after: int) -> None:
        service.script("put_blob", [ResetUpload(after=after)])
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            sock.sendall(f"PUT {BLOB} HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n".encode() + bytes(after))
            assert read_to_the_end(sock) == Seen(b"", "RST")
        assert service.get("data", "blob") == CONTENT
        assert service.log[0].body_length == after

    def test_connection_refused(self, service: FaultService, client: Client) -> None:
        """Other connections are also reset, new ones are refused for a while, and then everything works."""
        service.script("head", [ConnectionRefused(seconds=5)])
        with socket.create_connection((service.host, service.port), TIMEOUT) as bystander:
            with pytest.raises(ConnectionResetError):
                client.ask("HEAD")
            with pytest.raises(ConnectionResetError):
                bystander.recv(1)
        with pytest.raises(ConnectionRefusedError):
            client.get()
        with taking(0):
            while True:
                try:
                    socket.create_connection((service.host, service.port), TIMEOUT).close()
                except ConnectionRefusedError:
                    time.sleep(0.01)
                else:
                    break
        client.close()
        assert_good(client)

    def test_connection_refused_for_long_does_not_hold_up_the_end(self, service: FaultService) -> None:
        service.script("get_blob", [ConnectionRefused(seconds=60)])
        assert watch(service).end == "RST"
        with taking(0, 30):
            service.close()


class TestAroundTheOperation:
    def test_fine(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [Fine(), Status(500), Fine()])
        assert [client.get()[0].status for _ in range(4)] == [200, 500, 200, 200]

    def test_changed_etag(self, service: FaultService, client: Client) -> None:
        service.script(Match("get_blob", nth=2), [ChangedEtag()])
        first, _ = client.get(x_ms_range="bytes=0-9")
        answer, _ = client.get(x_ms_range="bytes=10-19", If_Match=first.headers["ETag"])
        assert (answer.status, answer.headers["x-ms-error-code"]) == (412, "ConditionNotMet")
        assert service.get("data", "blob") == bytes(255 - byte for byte in CONTENT)
        assert client.get(x_ms_range="bytes=10-19")[1] == bytes(255 - byte for byte in CONTENT[10:20])

    def test_changed_etag_behind_a_service_that_ignores_conditions(self, service: FaultService, client: Client) -> None:
        service.script(Match("get_blob", nth=2), [ChangedEtag(b"other", ignores_conditions=True)])
        first, _ = client.get()
        answer, body = client.get(If_Match=first.headers["ETag"])
        assert (answer.status, body) == (200, b"other")
        assert answer.headers["ETag"] != first.headers["ETag"]

    def test_full_instead_of_partial(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [FullInsteadOfPartial()] * 2)
        for header in ("Range", "x_ms_range"):
            answer, body = client.get(**{header: "bytes=10-19"})
            assert (answer.status, body) == (200, CONTENT)
            assert "Content-Range" not in answer.headers
        assert client.get(Range="bytes=10-19")[1] == CONTENT[10:20]

    def test_lost_answer(self, service: FaultService) -> None:
        service.script(Match(method="PUT"), [LostAnswer()])
        assert watch(service, "PUT", body=b"new") == Seen(b"", "RST")
        assert service.get("data", "blob") == b"new"
        assert service.log[0].status is None

    def test_hold(self, service: FaultService, client: Client) -> None:
        """The operation waits for the gate; others do not."""
        gate = threading.Event()
        service.script("put_blob", [Hold(gate)])
        held = threading.Thread(target=put_new_blob, args=(service,))
        held.start()
        service.wait_for_requests(1, "put_blob")
        assert_good(client)
        assert service.active == 1
        gate.set()
        held.join(TIMEOUT)
        assert service.get("data", "blob") == b"new"

    def test_together(self, service: FaultService) -> None:
        """The first waits for the second, others do not wait."""
        service.script("put_blob", [Together(2)], repeat=True)
        first = threading.Thread(target=put_new_blob, args=(service,))
        first.start()
        service.wait_for_requests(1, "put_blob")
        assert not service.exists("data", "new")
        put_new_blob(service)
        first.join(TIMEOUT)
        put_new_blob(service)
        assert service.peak_active == 2

    def test_a_held_request_ends_with_its_client(self, service: FaultService) -> None:
        service.script("put_blob", [Hold(threading.Event())])
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            sock.sendall(f"PUT {BLOB} HTTP/1.1\r\nContent-Length: 3\r\n\r\nnew".encode())
            service.wait_for_requests(1)
        service.wait_until_idle()
        assert service.get("data", "blob") == CONTENT


class TestInTheAnswer:
    def test_wrong_header(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [WrongHeader("etag", '"forged"'), WrongHeader("X-New", "1")])
        assert client.get()[0].headers.get_all("ETag") == ['"forged"']
        assert client.get()[0].headers["X-New"] == "1"
        assert_good(client)

    @pytest.mark.parametrize("name", ["ETag", "Content-Range", "Last-Modified", "x-ms-request-id"])
    def test_missing_header(self, service: FaultService, client: Client, name: str) -> None:
        service.script("get_blob", [MissingHeader(name.lower())])
        answer, body = client.get(Range="bytes=0-9")
        assert (answer.status, body, name in answer.headers) == (206, CONTENT[:10], False)
        assert name in client.get(Range="bytes=0-9")[0].headers

    def test_missing_length(self, service: FaultService) -> None:
        service.script("get_blob", [MissingHeader("Content-Length")])
        seen = watch(service)
        assert (seen.body, seen.end) == (CONTENT, "FIN")
        assert b"content-length" not in seen.head.lower()

    def test_wrong_content_range(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [WrongContentRange(), WrongContentRange(-5), WrongContentRange(value="x")])
        seen = [client.get(Range="bytes=10-19") for _ in range(4)]
        ranges = [answer.headers["Content-Range"] for answer, _ in seen]
        assert ranges == ["bytes 11-20/1000", "bytes 5-14/1000", "x", "bytes 10-19/1000"]
        assert {body for _, body in seen} == {CONTENT[10:20]}

    def test_length_too_long(self, service: FaultService) -> None:
        service.script("get_blob", [WrongLength(+7)])
        seen = watch(service)
        assert b"\r\nContent-Length: 1007\r\n" in seen.data
        assert (seen.body, seen.end) == (CONTENT, "FIN")

    def test_length_too_short(self, service: FaultService) -> None:
        """The remaining bytes stay on the connection, before the next response."""
        service.script("get_blob", [WrongLength(-7)])
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            request = f"GET {BLOB} HTTP/1.1\r\n"
            sock.sendall(f"{request}\r\n{request}Connection: close\r\n\r\n".encode())
            seen = read_to_the_end(sock)
        assert b"\r\nContent-Length: 993\r\n" in seen.head
        surplus, line, _ = seen.body[993:].partition(b"HTTP/1.1 200 OK")
        assert (surplus, line) == (CONTENT[-7:], b"HTTP/1.1 200 OK")

    @pytest.mark.parametrize(("at", "index"), [(0, 10), (3, 13), (-1, 19), (25, 15)])
    def test_corrupt_byte(self, service: FaultService, client: Client, at: int, index: int) -> None:
        service.script("get_blob", [CorruptByte(at)])
        answer, body = client.get(Range="bytes=10-19", x_ms_range_get_content_md5="true")
        wrong = [position for position, byte in enumerate(body, 10) if byte != CONTENT[position]]
        assert (wrong, len(body)) == ([index], 10)
        assert base64.b64decode(answer.headers["Content-MD5"]) == hashlib.md5(CONTENT[10:20]).digest()
        assert service.get("data", "blob") == CONTENT

    def test_wrong_bytes(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [WrongBytes()])
        assert client.get()[1] == bytes(255 - byte for byte in CONTENT)
        assert_good(client)

    def test_chunked(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [Chunked(size=300)])
        answer, body = client.get()
        assert (answer.headers["Transfer-Encoding"], body) == ("chunked", CONTENT)
        assert "Content-Length" not in answer.headers
        assert_good(client)
        assert service.connections_opened == 1

    def test_malformed_xml(self, service: FaultService, client: Client) -> None:
        service.script("list_blobs", [MalformedXml(), MalformedXml(b"<html>")])
        for _ in range(2):
            answer, body = client.get(LIST)
            assert answer.status == 200
            with pytest.raises(ElementTree.ParseError):
                ElementTree.fromstring(body)
        assert ElementTree.fromstring(client.get(LIST)[1]).findtext("Blobs/Blob/Name") == "blob"
        assert service.connections_opened == 1


class TestPages:
    NAMES = ("a", "b", "blob", "c", "d")

    @pytest.fixture
    def sdk(self, service: FaultService) -> Iterator[ContainerClient]:
        for name in self.NAMES:
            service.put("data", name, CONTENT)
        with ContainerClient(service.url, "data", retry_total=0) as client:
            yield client

    @pytest.mark.parametrize("nth", [1, 2, 3])
    def test_empty_pages_hide_nothing(self, service: FaultService, sdk: ContainerClient, nth: int) -> None:
        service.script(Match("list_blobs", nth=nth), [EmptyPageWithMarker()] * 2)
        pages = [[blob.name for blob in page] for page in sdk.list_blobs(results_per_page=2).by_page()]
        assert [name for page in pages for name in page] == list(self.NAMES)
        assert pages.count([]) == 2
        markers = [entry.query.get("marker") for entry in service.requests("list_blobs")]
        assert len(set(markers)) == len(markers) == 5

    @pytest.mark.parametrize("nth", [1, 2])
    def test_a_repeated_marker_leads_in_a_circle(self, service: FaultService, sdk: ContainerClient, nth: int) -> None:
        service.script(Match("list_blobs", nth=nth), [RepeatedMarker()], repeat=True)
        pages = sdk.list_blobs(results_per_page=2).by_page()
        seen = [[blob.name for blob in next(pages)] for _ in range(6)]
        assert seen[nth - 1 :] == [list(self.NAMES[2 * nth - 2 : 2 * nth])] * (7 - nth)
        markers = [entry.query.get("marker") for entry in service.requests("list_blobs")]
        assert len(set(markers)) == 2

    def test_a_marker_repeated_once(self, service: FaultService, sdk: ContainerClient) -> None:
        service.script(Match("list_blobs", nth=2), [RepeatedMarker()])
        pages = [[blob.name for blob in page] for page in sdk.list_blobs(results_per_page=2).by_page()]
        assert pages == [["a", "b"], ["blob", "c"], ["blob", "c"], ["d"]]


class TestOnTheWire:
    def test_reset_in_headers(self, service: FaultService) -> None:
        service.script("get_blob", [ResetInHeaders()])
        seen = watch(service)
        assert seen.data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert (b"\r\n\r\n" in seen.data, seen.end) == (False, "RST")

    def test_garbage_status_line(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [GarbageStatusLine(), GarbageStatusLine(b"HTTP/1.1 abc\r\n\r\n")])
        seen = watch(service)
        assert (b"HTTP/1" in seen.data, seen.end) == (False, "FIN")
        with pytest.raises(http.client.BadStatusLine):
            client.get()
        client.close()
        assert_good(client)

    @pytest.mark.parametrize(("fault", "end"), [(Torn, "FIN"), (TornReset, "RST")])
    @pytest.mark.parametrize(("after", "got"), [(0, 0), (1, 1), (500, 500), (999, 999), (5000, 999)])
    def test_torn(self, service: FaultService, fault: type[Torn | TornReset], end: str, after: int, got: int) -> None:
        """Exactly that many bytes arrive, and never the last one."""
        service.script("get_blob", [fault(after=after)])
        seen = watch(service)
        assert b"\r\nContent-Length: 1000\r\n" in seen.data
        assert (seen.body, seen.end) == (CONTENT[:got], end)
        assert (service.log[0].status, service.log[0].sent) == (200, got)

    def test_a_large_torn_body(self, service: FaultService) -> None:
        """Bytes before the reset are never lost."""
        service.put("data", "blob", bytes(20 << 20))
        service.script("get_blob", [TornReset(after=10 << 20)])
        seen = watch(service)
        assert (len(seen.body), seen.end) == (10 << 20, "RST")

    @pytest.mark.parametrize(("after", "before"), [(None, b""), (0, b""), (400, CONTENT[:400])])
    def test_stall(self, service: FaultService, after: int | None, before: bytes) -> None:
        service.script("get_blob", [Stall(60, after=after), Stall(0.5, after=after)])
        request = f"GET {BLOB} HTTP/1.1\r\nConnection: close\r\n\r\n".encode()
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            sock.sendall(request)
            data = b""
            while after is not None and (b"\r\n\r\n" not in data or not data.endswith(before)):
                data += sock.recv(1)
            assert data.startswith(b"HTTP/1.1 200") == (after is not None)
            assert data.partition(b"\r\n\r\n")[2] == before
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock, taking(0.5):
            sock.sendall(request)
            rest = read_to_the_end(sock)
        assert rest.data.partition(b"\r\n\r\n")[2] == CONTENT

    def test_stall_until(self, service: FaultService, client: Client) -> None:
        gate = threading.Event()
        service.script("get_blob", [StallUntil(gate, after=3)])
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            sock.sendall(f"GET {BLOB} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while not data.endswith(b"\r\n\r\n" + CONTENT[:3]):
                data += sock.recv(1)
            assert_good(client)
            assert service.active == 1
            gate.set()
            assert data.partition(b"\r\n\r\n")[2] + read_to_the_end(sock).data == CONTENT

    def test_a_stalled_client_may_leave(self, service: FaultService) -> None:
        service.script("get_blob", [Stall(60)])
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            sock.sendall(f"GET {BLOB} HTTP/1.1\r\n\r\n".encode())
            assert sock.recv(100)
        service.wait_until_idle()

    def test_slow_bytes(self, service: FaultService, client: Client) -> None:
        service.script("get_blob", [SlowBytes(rate=2000)])
        with taking(0.5):
            assert client.get()[1] == CONTENT
        assert_good(client)
        assert [entry.fault is None for entry in service.log] == [False, True]
        assert service.connections_opened == 1

    def test_stale_connection(self, service: FaultService) -> None:
        service.script("get_blob", [StaleConnection()])
        seen = watch(service)
        assert (seen.status, seen.body, seen.end) == (200, CONTENT, "FIN")
        assert b"connection:" not in seen.head.lower()

    def test_connection_that_is_reset_after_a_whole_answer(self, service: FaultService) -> None:
        service.script("get_blob", [StaleConnection(reset=True)])
        seen = watch(service)
        assert (seen.status, seen.body, seen.end) == (200, CONTENT, "RST")

    def test_connection_that_is_stale_on_its_next_request(self, service: FaultService) -> None:
        service.script("get_blob", [StaleConnection(on_next_request=True)])
        with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
            request = f"GET {BLOB} HTTP/1.1\r\n\r\n".encode()
            sock.sendall(request)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert answer.read() == CONTENT
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(TIMEOUT)
            sock.sendall(request)
            assert read_to_the_end(sock).data == b""
        assert len(service.log) == 1


def test_faults_over_https(https_fault_service: FaultService, loopback_tls: LoopbackTls) -> None:
    """Faults are the same with TLS as without it."""
    service = https_fault_service
    service.put("data", "blob", CONTENT)
    service.script("get_blob", [Torn(after=3), TornReset(after=3), Status(503), WrongBytes(), LostAnswer(), Stall(0.1)])
    context = ssl.create_default_context(cafile=str(loopback_tls.ca_path))
    client = Client(service, context)
    outcomes: list[object] = []
    for _ in range(7):
        try:
            answer, body = client.get()
            outcomes.append((answer.status, body == CONTENT))
        except (ConnectionResetError, http.client.IncompleteRead):  # over TLS, ssl can report a reset as an end of file
            outcomes.append("broken")
            client.close()
    good = (200, True)
    assert outcomes == ["broken", "broken", (503, False), (200, False), "broken", good, good]
    assert service.connections_opened == 4
    client.close()


def test_a_drop_during_a_tls_answer_sends_nothing_in_the_clear(
    https_fault_service: FaultService, loopback_tls: LoopbackTls
) -> None:
    service = https_fault_service
    service.put("data", "blob", b"SECRET" * (8 << 20))
    context = ssl.create_default_context(cafile=str(loopback_tls.ca_path))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    raw = bytearray()
    with socket.create_connection((service.host, service.port), TIMEOUT) as sock:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(1 << 16))
        tls.write(f"GET {BLOB} HTTP/1.1\r\n\r\n".encode())
        sock.sendall(outgoing.read())
        raw += sock.recv(1 << 16)
        service.drop_connections(reset=True)
        rest = read_to_the_end(sock)
    raw += rest.data
    assert rest.end == "RST"
    assert b"SECRETSECRET" not in raw


def test_every_fault_has_a_test() -> None:
    names = {kind.__name__ for kind in vars(faults).values() if isinstance(kind, type) and issubclass(kind, Fault)} - {
        "Fault"
    }
    here = globals()
    assert [name for name in sorted(names) if name not in here] == []


@pytest.mark.parametrize("fault", [Status(503), Torn(), Redirect("http://x")], ids=lambda fault: repr(fault))
def test_faults_are_values(fault: Fault) -> None:
    """They are frozen, equal and hashable by content, and their repr can be evaluated, as parameters for tests."""
    same = eval(repr(fault))
    assert same == fault
    assert hash(same) == hash(fault)
    with pytest.raises(AttributeError):
        setattr(fault, fields(fault)[0].name, 1)
