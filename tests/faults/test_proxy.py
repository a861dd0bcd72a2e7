"""The proxy forwards requests and logs them; the clients are those of the standard library and the SDK."""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import time
from collections.abc import Iterator

import pytest
from azure.core.exceptions import ServiceRequestError
from azure.storage.blob import ContainerClient

from .faults import Stall, Torn
from .fixtures import LoopbackTls
from .proxy import LoggingProxy
from .service import FaultService

CONTENT = bytes(range(256)) * 5000
TIMEOUT = 60  # seconds


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("data", "blob", CONTENT)
    return fault_service


@pytest.fixture
def https_service(https_fault_service: FaultService) -> FaultService:
    https_fault_service.put("data", "blob", CONTENT)
    return https_fault_service


@pytest.fixture
def connection(logging_proxy: LoggingProxy) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(logging_proxy.host, logging_proxy.port, timeout=TIMEOUT)
    yield connection
    connection.close()


def test_an_absolute_request(
    service: FaultService, logging_proxy: LoggingProxy, connection: http.client.HTTPConnection
) -> None:
    url = service.blob_url("data", "blob", x="1")
    connection.request("GET", url, headers={"Proxy-Authorization": "Basic x", "x-ms-range": "bytes=5-"})
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (206, CONTENT[5:])
    (asked,) = logging_proxy.log
    assert (asked.method, asked.target, asked.status) == ("GET", url, 206)
    (arrived,) = service.log
    assert arrived.target == "/devstoreaccount1/data/blob?x=1"
    assert "proxy-authorization" not in arrived.headers


def test_a_body_passes_through(
    service: FaultService, logging_proxy: LoggingProxy, connection: http.client.HTTPConnection
) -> None:
    headers = {"x-ms-blob-type": "BlockBlob"}
    connection.request("PUT", service.blob_url("data", "new"), CONTENT, headers)
    assert connection.getresponse().status == 201
    assert service.get("data", "new") == CONTENT


def test_a_tunnel(https_service: FaultService, logging_proxy: LoggingProxy, loopback_tls: LoopbackTls) -> None:
    context = ssl.create_default_context(cafile=str(loopback_tls.ca_path))
    connection = http.client.HTTPSConnection(logging_proxy.host, logging_proxy.port, context=context, timeout=TIMEOUT)
    connection.set_tunnel(https_service.host, https_service.port)
    for _ in range(3):
        connection.request("GET", "/data/blob")
        assert connection.getresponse().read() == CONTENT
    connection.close()
    assert [(asked.method, asked.target, asked.status) for asked in logging_proxy.log] == [
        ("CONNECT", https_service.address, 200)
    ]
    assert https_service.connections_opened == 1


def test_a_route_stands_in_for_a_name_server(https_service: FaultService, loopback_tls: LoopbackTls) -> None:
    """The host name of a real account, verified with the certificate, is routed to the service on loopback."""
    host = "account.blob.core.windows.net"
    context = ssl.create_default_context(cafile=str(loopback_tls.ca_path))
    with LoggingProxy(routes={f"{host}:443": https_service.address}) as proxy:
        connection = http.client.HTTPSConnection(proxy.host, proxy.port, context=context, timeout=TIMEOUT)
        connection.set_tunnel(host, 443)
        connection.request("GET", "/data/blob")
        assert connection.getresponse().read() == CONTENT
        connection.close()
        assert proxy.log[0].target == f"{host}:443"


def test_the_sdk_finds_its_way(
    service: FaultService,
    https_service: FaultService,
    logging_proxy: LoggingProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, logging_proxy.url)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for each in (service, https_service):
        with ContainerClient(each.url, "data", retry_total=0) as client:
            assert client.download_blob("blob").readall() == CONTENT
    assert [asked.method for asked in logging_proxy.log] == ["GET", "CONNECT"]


def test_credentials(service: FaultService) -> None:
    good = "Basic " + base64.b64encode(b"user:secret").decode()
    with LoggingProxy(user="user", password="secret") as proxy:
        for sent, status in [
            ({}, 407),
            ({"Proxy-Authorization": "Basic x"}, 407),
            ({"Proxy-Authorization": good}, 200),
        ]:
            connection = http.client.HTTPConnection(proxy.host, proxy.port, timeout=TIMEOUT)
            connection.request("GET", service.blob_url("data", "blob"), headers=sent)
            answer = connection.getresponse()
            assert answer.status == status
            assert ("Proxy-Authenticate" in answer.headers) == (status == 407)
            answer.read()
            connection.close()
        assert [asked.status for asked in proxy.log] == [407, 407, 200]
    assert len(service.log) == 1


def test_the_proxy_itself_over_tls(service: FaultService, loopback_tls: LoopbackTls) -> None:
    context = ssl.create_default_context(cafile=str(loopback_tls.ca_path))
    with LoggingProxy(ssl_context=loopback_tls.server_context) as proxy:
        connection = http.client.HTTPSConnection(proxy.host, proxy.port, context=context, timeout=TIMEOUT)
        connection.request("GET", service.blob_url("data", "blob"))
        assert connection.getresponse().read() == CONTENT
        connection.close()


def test_nobody_behind_the_proxy(
    service: FaultService, logging_proxy: LoggingProxy, connection: http.client.HTTPConnection
) -> None:
    with service.refusing_connections():
        connection.request("GET", service.blob_url("data", "blob"))
        assert connection.getresponse().status == 502


def test_faults_reach_through(
    service: FaultService, logging_proxy: LoggingProxy, connection: http.client.HTTPConnection
) -> None:
    service.script("get_blob", [Torn(after=100)])
    connection.request("GET", service.blob_url("data", "blob"))
    with pytest.raises(http.client.IncompleteRead) as cut:
        connection.getresponse().read()
    assert cut.value.partial == CONTENT[:100]


def test_close_does_not_wait_for_anybody(service: FaultService, logging_proxy: LoggingProxy) -> None:
    service.script("get_blob", [Stall(60)])
    with (
        socket.create_connection((logging_proxy.host, logging_proxy.port), TIMEOUT) as idle,
        socket.create_connection((logging_proxy.host, logging_proxy.port), TIMEOUT) as stalled,
    ):
        stalled.sendall(f"GET {service.blob_url('data', 'blob')} HTTP/1.1\r\n\r\n".encode())
        service.wait_for_requests(1)
        start = time.monotonic()
        logging_proxy.close()
        assert time.monotonic() - start < 30
        assert idle.recv(1) == b""
    assert logging_proxy.open_connections == 0
    service.wait_until_idle()


def test_the_sdk_says_when_the_proxy_is_gone(service: FaultService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the tests above: without the proxy the SDK cannot reach the service."""
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with LoggingProxy() as proxy, proxy.refusing_connections():
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with ContainerClient(service.url, "data", retry_total=0) as client, pytest.raises(ServiceRequestError):
            client.download_blob("blob")
    assert service.log == []
