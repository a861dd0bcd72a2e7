"""The Azurite fixtures: credentials, isolation, shutdown."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.storage.blob import ContainerClient

from recipes.azurite import run_azurite
from tests.azurite.container import Container
from tests.azurite.token import AzuriteTokenCredential


def is_listening(account_url: str) -> bool:
    parts = urllib.parse.urlsplit(account_url)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=240).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_sas_opens_a_private_container(container: Container) -> None:
    container.put("a b%2F?#ü//x/", b"data")
    with urllib.request.urlopen(container.blob_sas_url("a b%2F?#ü//x/"), timeout=240) as answer:
        assert answer.read() == b"data"
    assert container.names() == ["a b%2F?#ü//x/"]


def test_a_private_container_is_closed_without_a_credential(container: Container) -> None:
    container.put("x", b"data")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(container.blob_url("x"), timeout=240)


def test_a_public_container_is_open_to_anybody(public_container: Container) -> None:
    public_container.put("x", b"data")
    with urllib.request.urlopen(public_container.blob_url("x"), timeout=240) as answer:
        assert answer.read() == b"data"


def test_a_token_opens_the_https_service(https_container: Container, token_credential: AzuriteTokenCredential) -> None:
    https_container.put("x", b"data")
    with ContainerClient.from_container_url(https_container.url, credential=token_credential) as client:
        assert client.download_blob("x").readall() == b"data"
    assert token_credential.scopes_asked == [("https://storage.azure.com/.default",)]


@pytest.mark.parametrize("flaw", [{"lifetime": -10.0}, {"audience": "https://example.com"}])
def test_a_wrong_token_does_not_open_it(https_container: Container, flaw: dict[str, object]) -> None:
    credential = AzuriteTokenCredential(**flaw)  # type: ignore[arg-type]
    with (
        ContainerClient.from_container_url(https_container.url, credential=credential) as client,
        pytest.raises(ClientAuthenticationError),
    ):
        client.get_container_properties()


def test_it_ends_with_its_block() -> None:
    with pytest.raises(KeyError), run_azurite() as service:
        assert is_listening(service.account_url)
        raise KeyError
    assert not is_listening(service.account_url)


def test_it_ends_with_a_parent_that_is_killed() -> None:
    program = "from recipes.azurite import run_azurite\nimport time\nwith run_azurite() as service:\n"
    program += "    print(service.account_url, flush=True)\n    time.sleep(600)\n"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        account_url = parent.stdout.readline().strip()
        assert is_listening(account_url)
        parent.kill()
    deadline = time.monotonic() + 60
    while is_listening(account_url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_missing_azurite_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURITE", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="make setup"), run_azurite():
        pass


def test_one_that_fails_to_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.js"
    broken.write_text("throw new Error('the disk is on fire')")
    monkeypatch.setenv("AZURITE", str(broken))
    with pytest.raises(RuntimeError, match="the disk is on fire"), run_azurite():
        pass
