"""Connections: pooled, replaced when stale, never redirected; proxies, certificates, logging."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from azure.core.credentials import AccessToken
from azure.core.exceptions import HttpResponseError, ServiceRequestError, ServiceResponseError

from azstoragetorch import TransferConfig
from azstoragetorch._blob import transport
from azstoragetorch._engine.scope import Cancelled, Scope
from azstoragetorch.exceptions import ClientRequestIdMismatchError, FatalBlobIOWriteError
from azstoragetorch.io import BlobIO
from tests.faults import (
    FaultService,
    Hold,
    LoggingProxy,
    Match,
    StaleConnection,
    Stall,
    Status,
    WrongHeader,
    WrongLength,
)
from tests.faults.fixtures import LoopbackTls
from tests.support import (
    QUICK,
    ROOT,
    blob_client,
    container_client,
    content,
    idle_connections,
    run_python,
    run_threads,
    taking,
)

DATA = content(200_000)
ONE_TRY = replace(QUICK, max_attempts=1)


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", DATA)
    return fault_service


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith(("_proxy", "_ca_bundle")) or name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            monkeypatch.delenv(name)


def read(service: FaultService, transfer: object = QUICK) -> bytes:
    return blob_client(service.blob_url("c", "b"), transfer).read()[0]  # type: ignore[arg-type]


class Token:
    def get_token(self, *scopes: str, **options: object) -> AccessToken:
        return AccessToken("topsecrettoken", int(time.time() + 3600))


class TestPool:
    def test_one_connection_serves_one_request_after_the_other(self, service: FaultService) -> None:
        client = blob_client(service.blob_url("c", "b"), replace(QUICK, part_size=1 << 20))
        for _ in range(5):
            assert client.read()[0] == DATA
        client.version()
        list(container_client(service.container_url("c")).pages())
        assert service.connections_opened == 1

    def test_reading_and_writing_share_it(self, service: FaultService) -> None:
        url = service.blob_url("c", "new")
        with BlobIO(url, "wb", credential=False, transfer=QUICK) as blob:
            blob.write(b"small")
        with BlobIO(url, "rb", credential=False, transfer=QUICK) as blob:
            assert blob.read() == b"small"
        assert service.connections_opened == 1

    def test_connections_are_no_more_than_transfers_at_once(self, service: FaultService) -> None:
        for _ in range(5):
            assert read(service) == DATA
        assert service.connections_opened <= QUICK.max_concurrency

    @pytest.mark.parametrize("reset", [False, True])
    def test_connections_that_were_closed_while_idle_cost_no_try(self, service: FaultService, reset: bool) -> None:
        run_threads(4, lambda _: read(service))
        service.wait_until_idle()
        before = idle_connections()
        if reset:
            assert service.drop_connections(reset=True)
        else:
            assert service.drop_idle_connections()
        assert before >= 1
        assert read(service, ONE_TRY) == DATA

    @pytest.mark.parametrize("operation", ["get_blob", "head", "list_blobs", "put_blob", "put_block", "put_block_list"])
    def test_nor_do_those_that_close_when_the_next_request_comes(self, service: FaultService, operation: str) -> None:
        """A race that a check of the socket cannot detect."""
        client = blob_client(service.blob_url("c", "b"), ONE_TRY)
        service.script("head", [StaleConnection(on_next_request=True)])
        client.version()
        if operation == "get_blob":
            assert client.read()[0] == DATA
        elif operation == "head":
            assert client.version() is not None
        elif operation == "list_blobs":
            list(container_client(service.container_url("c"), ONE_TRY).pages())
        else:
            if operation == "put_block_list":
                service.script(Match("put_block", nth=4), [StaleConnection(on_next_request=True)])
            new = DATA[::-1] if operation != "put_blob" else b"new"
            client.put(new)
            assert service.get("c", "b") == new
        assert service.unused_faults() == []

    def test_a_body_that_was_not_read_to_its_end_ends_its_connection(self, service: FaultService) -> None:
        """The rest of one response is never taken for another."""
        service.put("c", "b", content(3_000_000))
        for _ in range(3):
            reader = blob_client(service.blob_url("c", "b"), replace(QUICK, part_size=4 << 20)).reader()
            assert reader.readinto(0, memoryview(bytearray(10))) == 10
            reader.close()
        assert read(service) == content(3_000_000)

    def test_surplus_bytes_end_it_too(self, service: FaultService) -> None:
        service.script("list_blobs", [WrongLength(-5)], repeat=True)
        with pytest.raises(ServiceResponseError):
            list(container_client(service.container_url("c")).pages())
        service.clear_script()
        assert read(service, ONE_TRY) == DATA

    def test_idle_connections_can_be_closed(self, service: FaultService) -> None:
        read(service)
        assert idle_connections() >= 1
        transport.close_idle_connections()
        assert idle_connections() == 0
        assert read(service, ONE_TRY) == DATA

    def test_none_is_left_at_exit(self, service: FaultService) -> None:
        program = (
            "import sys; from azstoragetorch.io import BlobIO\n"
            "print(len(BlobIO(sys.argv[1], 'rb', credential=False).read()))"
        )
        result = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-c", program, service.blob_url("c", "b")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        assert (result.stdout, result.stderr) == (f"{len(DATA)}\n", "")


class TestAnswers:
    def test_an_answer_to_another_request_is_not_trusted(self, service: FaultService) -> None:
        service.script("get_blob", [WrongHeader("x-ms-client-request-id", "another's")])
        assert read(service) == DATA
        service.script("get_blob", [WrongHeader("x-ms-client-request-id", "another's")], repeat=True)
        with pytest.raises(ClientRequestIdMismatchError, match=r"GET .*/c/b.*another's"):
            read(service)

    def test_one_to_another_write_neither(self, service: FaultService) -> None:
        """The blob is checked instead, if that request is answered."""
        wrong = WrongHeader("x-ms-client-request-id", "another's")
        service.script(Match(method="PUT"), [wrong], repeat=True)
        blob_client(service.blob_url("c", "b")).put(b"new")
        assert service.get("c", "b") == b"new"
        service.script(Match(), [wrong], repeat=True)
        with pytest.raises(FatalBlobIOWriteError) as caught:
            blob_client(service.blob_url("c", "b")).put(b"newer")
        assert isinstance(caught.value.__cause__, ClientRequestIdMismatchError)

    def test_stored_encodings_are_not_undone(self, service: FaultService) -> None:
        """A gzip blob is returned as it is stored."""
        service.store.put("c", "b.gz", b"\x1f\x8b not really", settings={"Content-Encoding": "gzip"})
        assert blob_client(service.blob_url("c", "b.gz")).read()[0] == b"\x1f\x8b not really"
        assert service.log[-1].headers["accept-encoding"] == "identity"

    @pytest.mark.parametrize("text", ["Å.bin", "… .bin", "a\x0bb\x1cc", "a: b; c"])
    def test_a_header_may_hold_any_text(self, service: FaultService, text: str) -> None:
        """For example the file name of a blob, in UTF-8."""
        value = f'attachment; filename="{text}"'.encode().decode("latin-1")
        service.store.put("c", "named", DATA, settings={"Content-Disposition": value})
        assert blob_client(service.blob_url("c", "named")).read()[0] == DATA
        assert blob_client(service.blob_url("c", "named")).version() is not None

    def test_an_error_names_everything_that_support_asks_for(self, service: FaultService) -> None:
        service.script("get_blob", [Status(503, "ServerBusy")], repeat=True)
        with pytest.raises(HttpResponseError) as caught:
            read(service)
        last = service.requests("get_blob")[-1]
        for part in ("GET", "/c/b", "503", "ServerBusy", last.headers["x-ms-client-request-id"], f"{last.number:012d}"):
            assert part in str(caught.value)

    def test_a_line_break_in_a_credential_is_not_sent(self, https_fault_service: FaultService) -> None:
        class Broken:
            def get_token(self, *scopes: str, **options: object) -> AccessToken:
                return AccessToken("topsecret\r\nx-evil: 1", int(time.time() + 3600))

        with pytest.raises(ValueError, match="line break") as caught:
            blob_client(https_fault_service.blob_url("c", "b"), credential=Broken()).read()
        assert "topsecret" not in str(caught.value)
        assert https_fault_service.log == []


def cancel_in_flight(service: FaultService, config: TransferConfig) -> None:
    """Cancel a read while it waits for the service: it ends at once."""
    scope = Scope()
    client = blob_client(service.blob_url("c", "b"), config)

    def act(number: int) -> None:
        if number:
            service.wait_for_requests(1)
            time.sleep(0.1)
            scope.cancel()
        else:
            with pytest.raises(Cancelled):
                client.head(scope)

    with taking():
        run_threads(2, act)


class TestInterrupts:
    @pytest.mark.parametrize("after", [None, 0, 50_000], ids=["head", "body", "middle"])
    def test_cancelling_ends_a_request_that_stalls(self, service: FaultService, after: int | None) -> None:
        service.script("get_blob", [Stall(60, after=after)])
        cancel_in_flight(service, replace(QUICK, part_size=1 << 20, read_timeout=240))

    def test_and_one_over_tls(self, https_fault_service: FaultService) -> None:
        service = https_fault_service
        service.put("c", "b", DATA)
        service.script("get_blob", [Stall(60)])
        cancel_in_flight(service, replace(QUICK, read_timeout=240))

    def test_and_one_that_is_still_connecting(self, service: FaultService) -> None:
        """Without a socket to shut down yet, the request is not sent after connecting."""
        connection = transport.Connection(transport.Origin.of("http", service.address, QUICK))
        connection.interrupt()
        with pytest.raises(ConnectionAbortedError):
            connection.send("GET", "/c/b", {}, None)
        connection.close()
        service.wait_until_idle()
        assert service.log == []

    def test_and_an_upload(self, service: FaultService) -> None:
        gate = threading.Event()
        service.script("put_block", [Hold(gate)], repeat=True)
        writer = blob_client(service.blob_url("c", "b"), replace(QUICK, read_timeout=240)).writer()

        def act(number: int) -> None:
            if number:
                service.wait_for_requests(2)
                writer._scope.cancel()
            else:
                with pytest.raises(FatalBlobIOWriteError):
                    writer.write(memoryview(DATA * 2))  # enough to be in flight

        with taking():
            run_threads(2, act)
        assert service.get("c", "b") == DATA


def test_a_slow_upload_is_not_one_that_stalls() -> None:
    """The timeout is for the time without any byte, not for the whole body."""
    size, timeout, seconds = 24 << 20, 5.0, 0.0
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)

        def serve() -> None:
            nonlocal seconds
            with server.accept()[0] as peer:
                received, began = 0, time.monotonic()
                while received < size:
                    received += len(peer.recv(1 << 16))
                    time.sleep(max(0.0, began + (timeout + 1) * received / size - time.monotonic()))
                seconds = time.monotonic() - began
                peer.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        origin = transport.Origin.of("http", address, replace(QUICK, read_timeout=timeout))
        transport.send(origin, "PUT", "/c/b", {"Content-Length": str(size)}, body=bytes(size)).close()
        thread.join()
    assert seconds > timeout


class TestProxies:
    def test_plain_http(
        self, service: FaultService, logging_proxy: LoggingProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", logging_proxy.url)
        assert read(service) == DATA
        blob_client(service.blob_url("c", "new")).put(DATA)
        assert service.get("c", "new") == DATA
        assert {request.method for request in logging_proxy.log} == {"GET", "PUT"}
        assert all(request.target.startswith(service.origin) for request in logging_proxy.log)

    def test_a_tunnel_for_https_to_a_real_host_name(
        self, loopback_tls: LoopbackTls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The certificate is checked for the host of the account; the proxy sees neither path nor token."""
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(loopback_tls.ca_path))
        with FaultService(ssl_context=loopback_tls.server_context) as service:
            service.put("c", "b", DATA)
            host = "account.blob.core.windows.net:443"
            with LoggingProxy(routes={host: service.address}) as proxy:
                monkeypatch.setenv("https_proxy", proxy.url)
                url = "https://account.blob.core.windows.net/c/b"
                assert blob_client(url, credential=Token()).read()[0] == DATA
                assert {(request.method, request.target) for request in proxy.log} == {("CONNECT", host)}
                assert not any("authorization" in request.headers for request in proxy.log)
            transport.close_idle_connections()

    def test_a_name_that_the_certificate_does_not_have(
        self, loopback_tls: LoopbackTls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(loopback_tls.ca_path))
        with (
            FaultService(ssl_context=loopback_tls.server_context) as service,
            LoggingProxy(routes={"data.example.com:443": service.address}) as proxy,
        ):
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            with taking(), pytest.raises(ServiceRequestError, match="CERTIFICATE_VERIFY_FAILED"):
                blob_client("https://data.example.com/c/b").read()
            assert service.log == []

    @pytest.mark.parametrize("form", ["http://us%40er:pa%20ss@{}", "us%40er:pa%20ss@{}"])
    def test_with_a_login(self, service: FaultService, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
        with LoggingProxy(user="us@er", password="pa ss") as proxy:
            monkeypatch.setenv("HTTP_PROXY", form.format(proxy.address))
            assert read(service) == DATA
            assert {request.status for request in proxy.log} == {206}
        assert not any("proxy-authorization" in entry.headers for entry in service.log)

    def test_a_login_that_is_refused(self, service: FaultService, monkeypatch: pytest.MonkeyPatch) -> None:
        with LoggingProxy(user="user", password="right") as proxy:
            monkeypatch.setenv("HTTP_PROXY", f"http://user:wrongsecret@{proxy.address}")
            with pytest.raises(HttpResponseError, match="407") as caught:
                read(service)
        assert "wrongsecret" not in str(caught.value)

    @pytest.mark.parametrize("entry", ["127.0.0.1", "{}", "example.com, 127.0.0.1", "*"])
    def test_exceptions(
        self, service: FaultService, logging_proxy: LoggingProxy, monkeypatch: pytest.MonkeyPatch, entry: str
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", logging_proxy.url)
        monkeypatch.setenv("NO_PROXY", entry.format(service.address))
        assert read(service) == DATA
        assert logging_proxy.log == []

    @pytest.mark.parametrize("proxy", ["https://127.0.0.1:1", "socks5://user:topsecret@127.0.0.1:1"])
    def test_a_proxy_of_another_kind_is_refused_by_name(
        self, service: FaultService, monkeypatch: pytest.MonkeyPatch, proxy: str
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with taking(), pytest.raises(ValueError, match=r"HTTP_PROXY.*http://") as caught:
            read(service)
        assert "topsecret" not in str(caught.value)

    def test_one_that_is_not_there(self, service: FaultService, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:topsecret@127.0.0.1:{unused_port()}")
        with pytest.raises(ServiceResponseError, match="refused") as caught:
            read(service)
        assert "topsecret" not in str(caught.value)


PROGRAM = """
import sys
from azstoragetorch.io import BlobIO
try:
    print(len(BlobIO(sys.argv[1], 'rb', credential=False).read()))
except Exception as error:
    print(type(error).__name__, error)
"""


class TestCertificates:
    @pytest.fixture
    def service(self, loopback_tls: LoopbackTls) -> Iterator[FaultService]:
        with FaultService(ssl_context=loopback_tls.server_context) as service:
            service.put("c", "b", DATA)
            yield service

    @pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
    def test_a_file_of_authorities(self, service: FaultService, loopback_tls: LoopbackTls, variable: str) -> None:
        answer = run_python(PROGRAM, service.blob_url("c", "b"), **{variable: str(loopback_tls.ca_path)})
        assert answer == f"{len(DATA)}\n"

    @pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the names in the directory")
    @pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_DIR"])
    def test_a_directory(self, service: FaultService, loopback_tls: LoopbackTls, tmp_path: Path, variable: str) -> None:
        command = ["openssl", "x509", "-hash", "-noout", "-in", str(loopback_tls.ca_path)]
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / f"{name}.0").write_bytes(loopback_tls.ca_path.read_bytes())
        answer = run_python(PROGRAM, service.blob_url("c", "b"), **{variable: str(tmp_path)})
        assert answer == f"{len(DATA)}\n"

    def test_an_unknown_authority_is_an_error_at_once(self, service: FaultService) -> None:
        with taking():
            answer = run_python(PROGRAM, service.blob_url("c", "b"))
        assert answer.startswith("ServiceRequestError")
        assert "CERTIFICATE_VERIFY_FAILED" in answer
        assert service.log == []
        assert service.connections_opened == 1

    def test_a_file_that_is_not_there_is_named(self, service: FaultService) -> None:
        with taking():
            answer = run_python(PROGRAM, service.blob_url("c", "b"), REQUESTS_CA_BUNDLE="/no/such/file.pem")
        assert answer.startswith("ValueError REQUESTS_CA_BUNDLE")
        assert "/no/such/file.pem" in answer


def test_nothing_secret_is_logged_by_anybody(
    https_fault_service: FaultService, caplog: pytest.LogCaptureFixture
) -> None:
    """At DEBUG, by any logger. Those of the SDK and urllib3 log nothing, since they send no requests."""
    service = https_fault_service
    service.put("c", "b", DATA)
    service.script(Match(), [Status(503)], repeat=False)
    with caplog.at_level(logging.DEBUG):
        for url, credential in (
            (service.blob_url("c", "b", sv="1", sig="topsecret"), None),
            (service.blob_url("c", "b"), Token()),
        ):
            with BlobIO(url, "wb", credential=credential, transfer=QUICK) as blob:
                blob.write(DATA)
            with BlobIO(url, "rb", credential=credential, transfer=QUICK) as blob:
                blob.read()
            blob_client(url, credential=credential).version()
    records = [record for record in caplog.records if record.name.startswith(("azstoragetorch", "azure"))]
    assert {record.name.partition(".")[0] for record in records} == {"azstoragetorch"}
    assert any("GET" in record.getMessage() for record in records if record.name == "azstoragetorch")
    for record in caplog.records:
        assert "topsecret" not in f"{record.getMessage()} {vars(record)}"


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
