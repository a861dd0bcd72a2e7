"""The fault service and the proxy, a new one for each test."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from azstoragetorch._blob.admission import forget_admissions

from .proxy import LoggingProxy
from .service import FaultService


@dataclass(frozen=True, slots=True)
class LoopbackTls:
    """TLS for servers on loopback, and the file with which clients trust it."""

    server_context: ssl.SSLContext
    ca_path: Path  # PEM, for REQUESTS_CA_BUNDLE or SSL_CERT_FILE


@pytest.fixture(autouse=True)
def _no_service_throttles() -> None:
    """A port that a service of an earlier test had, and the throttling with it, can be given to this test's."""
    forget_admissions()


@pytest.fixture(scope="session")
def loopback_tls(tmp_path_factory: pytest.TempPathFactory) -> LoopbackTls:
    """A certificate for loopback and for the host names of real accounts."""
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", "127.0.0.1", "*.blob.core.windows.net")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    ca_path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_path))
    return LoopbackTls(context, ca_path)


@pytest.fixture
def fault_service() -> Iterator[FaultService]:
    """An empty service over http that needs no credential."""
    with FaultService() as service:
        yield service


@pytest.fixture
def https_fault_service(loopback_tls: LoopbackTls, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultService]:
    """A service over https; this process and its children trust its authority."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(loopback_tls.ca_path))
    with FaultService(ssl_context=loopback_tls.server_context) as service:
        yield service


@pytest.fixture
def logging_proxy() -> Iterator[LoggingProxy]:
    """A proxy without credentials; the test sets `HTTPS_PROXY` and similar variables."""
    with LoggingProxy() as proxy:
        yield proxy
