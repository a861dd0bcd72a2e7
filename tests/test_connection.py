"""Connections: exceptions from proxies, and headers that cannot become a second request."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from azure.core.credentials import AccessToken, AzureSasCredential
from hypothesis import given
from hypothesis import strategies as st

from azstoragetorch._blob.connection import Connection, Origin, is_exception, proxy_for
from azstoragetorch._blob.service import Request
from azstoragetorch._engine.ranges import ByteRange
from azstoragetorch._engine.scope import Scope
from tests.faults import FaultService
from tests.support import QUICK, blob_client, container_client, content

INJECTION = "x\r\nx-evil: 1\r\n\r\nDELETE /c/b HTTP/1.1"
BYTE = memoryview(bytearray(1))
CONTROLS = [*map(chr, range(0x20)), "\x7f"]


@pytest.fixture(autouse=True)
def no_proxies_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


class TestExceptions:
    """NO_PROXY has the same meaning as for curl and requests."""

    @pytest.mark.parametrize(
        ("entries", "host"),
        [
            ("*", "example.com"),
            ("other.com,*", "example.com"),
            ("example.com", "example.com"),
            ("example.com", "EXAMPLE.com"),
            ("EXAMPLE.COM", "example.com"),
            ("example.com", "blob.example.com"),
            (".example.com", "blob.example.com"),
            (".example.com", "example.com"),
            ("*.example.com", "blob.example.com"),
            ("example.com.", "example.com"),
            ("example.com", "example.com."),
            ("example.com", "example.com:8443"),
            ("example.com:8443", "example.com:8443"),
            ("example.com:443", "example.com"),
            ("a.com, example.com", "example.com"),
            ("a.com example.com", "example.com"),
            (" example.com ,", "example.com"),
            ("localhost", "localhost:10000"),
            ("windows.net", "account.blob.core.windows.net"),
            ("127.0.0.1", "127.0.0.1"),
            ("127.0.0.1", "127.0.0.1:10000"),
            ("127.0.0.1:10000", "127.0.0.1:10000"),
            ("127.0.0.0/8", "127.9.9.9:10000"),
            ("10.0.0.0/8", "10.1.2.3"),
            ("10.1.2.3/8", "10.200.0.1"),  # bits after the prefix are ignored
            ("192.168.0.0/255.255.0.0", "192.168.7.7"),
            ("0.0.0.0/0", "8.8.8.8"),
            ("::1", "[::1]"),
            ("::1", "[::1]:10000"),
            ("[::1]", "[::1]:10000"),
            ("[::1]:10000", "[::1]:10000"),
            ("0:0:0:0:0:0:0:1", "[::1]"),
            ("FD00::1", "[fd00::1]"),
            ("fd00::/8", "[fd12:3456::1]:443"),
        ],
    )
    def test_these_are_reached_directly(self, entries: str, host: str) -> None:
        assert is_exception("https", host, entries)

    @pytest.mark.parametrize(
        ("entries", "host"),
        [
            ("", "example.com"),
            (" , ", "example.com"),
            (".", "example.com"),
            ("*.", "example.com"),
            ("example.com", "badexample.com"),
            ("example.com", "example.com.evil.org"),
            ("blob.example.com", "example.com"),
            ("ample.com", "example.com"),
            ("example.com:8443", "example.com"),
            ("example.com:8443", "example.com:443"),
            ("127.0.0.1:10000", "127.0.0.1:10001"),
            ("127.0.0.1", "127.0.0.10"),
            ("0.0.1", "127.0.0.1"),
            ("10.0.0.0/8", "11.0.0.1"),
            ("10.0.0.0/33", "10.0.0.1"),
            ("10.0.0.0/8", "10.example.com"),
            ("10.0.0.0/8", "[::1]"),
            ("::1", "[::2]"),
            ("[::1]:1", "[::1]:2"),
            ("fd00::/8", "10.0.0.1"),
            ("::1", "localhost"),
        ],
    )
    def test_these_are_not(self, entries: str, host: str) -> None:
        assert not is_exception("https", host, entries)

    @given(st.text(alphabet="0123456789abcdef.:[]/*, -\u00e9", max_size=30))
    def test_no_value_is_an_error(self, entries: str) -> None:
        for host in ("example.com", "10.0.0.1:80", "[::1]:80"):
            is_exception("http", host, entries)

    @pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
    def test_the_variables(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
        assert proxy_for("https", "10.1.2.3") is not None
        monkeypatch.setenv(name, "10.0.0.0/8,::1")
        assert proxy_for("https", "10.1.2.3") is None
        assert proxy_for("https", "[::1]:443") is None
        assert proxy_for("https", "account.blob.core.windows.net") is not None


class TestProxies:
    @pytest.mark.parametrize("url", ["http://proxy:3128", "proxy:3128", " http://proxy:3128\n"])
    def test_forms(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        monkeypatch.setenv("https_proxy", url)
        found = proxy_for("https", "example.com")
        assert found is not None
        assert (found.host, found.port, found.headers) == ("proxy", 3128, {})

    @pytest.mark.parametrize(
        "url",
        [
            "http://pro\nxy:1",
            "http://pro xy:1",
            "http://proxy\x00:1",
            "http://user:top\rsecret@proxy:1",
            "http://user:topsecret%0d%0a@proxy:1",
            "http://us%00er:topsecret@proxy:1",
            "http://user:topsecret@proxy:port",
            "http://user:topsecret@proxy:99999",
            "http://user:topsecret@:1",
            "http://user:topsecret@[::1",
        ],
    )
    def test_an_odd_one_is_refused_by_its_name_without_its_login(
        self, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": url})
        with pytest.raises(ValueError, match="HTTPS_PROXY or ALL_PROXY") as caught:
            proxy_for("https", "example.com")
        assert "topsecret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


class Token:
    def __init__(self, token: str) -> None:
        self.token = token

    def get_token(self, *scopes: str, **options: object) -> AccessToken:
        return AccessToken(self.token, int(time.time() + 3600))


@pytest.fixture
def service(fault_service: FaultService) -> FaultService:
    fault_service.put("c", "b", content(200_000))
    return fault_service


class TestOneRequest:
    """External data in any part of a request cannot become a second request or another header."""

    @pytest.mark.parametrize("character", CONTROLS, ids=lambda character: f"{ord(character):#04x}")
    @pytest.mark.parametrize("part", ["method", "path", "SAS", "name", "value"])
    def test_a_control_character_is_refused_in_every_part(self, part: str, character: str) -> None:
        method, path, sas, name, value = (
            f"a{character}b" if part == this else "a" for this in ("method", "path", "SAS", "name", "value")
        )
        connection = Connection(Origin.of("http", "127.0.0.1:1", QUICK))
        with pytest.raises(ValueError, match="control character"):
            connection._head(method, f"/{path}?sig={sas}", {name: value})

    @pytest.mark.parametrize("part", ["path", "SAS", "name", "value"])
    def test_and_what_http_cannot_carry(self, part: str) -> None:
        path, sas, name, value = ("\u20ac" if part == this else "a" for this in ("path", "SAS", "name", "value"))
        connection = Connection(Origin.of("http", "127.0.0.1:1", QUICK))
        with pytest.raises(ValueError, match="HTTP cannot carry") as caught:
            connection._head("GET", f"/{path}?sig={sas}", {name: value})
        assert caught.value.__context__ is None  # it would contain the value

    @given(st.text(st.characters(codec="latin-1"), max_size=20), st.text(st.characters(codec="latin-1"), max_size=20))
    def test_a_head_has_the_lines_that_it_was_made_of_or_is_refused(self, name: str, value: str) -> None:
        connection = Connection(Origin.of("http", "127.0.0.1:1", QUICK))
        try:
            head = connection._head("GET", "/c/b", {name: value})
        except ValueError:
            assert any(character in name + value for character in CONTROLS)
        else:
            assert head.split(b"\r\n")[3:] == [f"{name}: {value}".encode("latin-1"), b"", b""]
            assert not any(byte < 0x20 or byte == 0x7F for line in head.split(b"\r\n") for byte in line)

    def test_the_error_names_the_header_and_shows_no_value(self) -> None:
        connection = Connection(Origin.of("http", "127.0.0.1:1", QUICK))
        with pytest.raises(ValueError, match=r"'GET' '/c/b' was not sent: If-Match contains a line break") as caught:
            connection._head("GET", "/c/b?sig=topsecret", {"x-ms-version": "1", "If-Match": "topsecret\n"})
        assert "topsecret" not in str(caught.value)

    @pytest.mark.parametrize("host", ["exa\r\nmple.com", "exa\x00mple.com", "exa mple.com", "example.com\x7f"])
    def test_hosts(self, host: str) -> None:
        with pytest.raises(ValueError, match="the host has a space or"):
            Connection(Origin.of("http", host, QUICK))

    def test_a_host_in_a_url(self) -> None:
        with pytest.raises(ValueError):
            blob_client("http://exa\x00mple.com/account/c/b").version()

    @pytest.mark.parametrize(
        "use",
        [
            lambda url: blob_client(url).fetch(
                ByteRange(0, 1), [memoryview(bytearray(1))], etag=INJECTION, scope=Scope()
            ),
            lambda url: blob_client(url).delete(etag=INJECTION),
            lambda url: blob_client(url).replace(b"new", etag=INJECTION),
            lambda url: blob_client(url, credential=AzureSasCredential(f"sig={INJECTION}")).version(),
            lambda url: blob_client(url).service.send(
                Request("GET", blob_client(url).url, headers={"x-ms-client-request-id": INJECTION})
            ),
            lambda url: blob_client(url).service.send(
                Request("PUT", blob_client(url).url, f"comp=block&blockid={INJECTION}", body=b"")
            ),
            lambda url: commit(url, {"x-ms-blob-content-type": INJECTION}),
            lambda url: commit(url, {"x-ms-meta-a": INJECTION}),
            lambda url: commit(url, {f"x-ms-meta-{INJECTION}": "a"}),
        ],
        ids=["read", "delete", "put", "sas", "request id", "block id", "content type", "metadata", "metadata's name"],
    )
    def test_callers_that_pass_what_they_were_given(self, service: FaultService, use: Callable[[str], Any]) -> None:
        with pytest.raises(Exception, match="line break"):
            use(service.blob_url("c", "b"))
        assert service.log == []
        assert service.get("c", "b") == content(200_000)

    @pytest.mark.parametrize("token", [INJECTION, "a\nb", "a\x00b", "a\u20acb"])
    def test_tokens(self, https_fault_service: FaultService, token: str) -> None:
        with pytest.raises(ValueError, match="line break") as caught:
            blob_client(https_fault_service.blob_url("c", "b"), credential=Token(token)).version()
        assert token not in str(caught.value)
        assert https_fault_service.log == []

    @pytest.mark.parametrize("name", ["a\r\nb", "a\x00b", INJECTION, "\x7f"])
    def test_names_are_encoded_and_stay_names(self, service: FaultService, name: str) -> None:
        blob = container_client(service.container_url("c")).blob(name)
        blob.put(b"new")
        assert blob.read()[0] == b"new"
        assert {entry.blob for entry in service.log} == {name}
        assert service.exists("c", "b")


def commit(url: str, properties: dict[str, str]) -> None:
    writer = blob_client(url).writer()
    try:
        writer.write(memoryview(b"new"))
        writer.commit(properties=properties)
    finally:
        writer.abort()
