"""``cp``: copies are exact, atomic, and not repeated."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from azstoragetorch._files.record import Record
from tests.azurite.container import Container
from tests.cli.conftest import Command
from tests.faults.faults import Hold, Match
from tests.faults.service import FaultService
from tests.support import ROOT, content, wait_until

KiB, MiB = 1 << 10, 1 << 20
SMALL_PARTS = {
    "AZSTORAGETORCH_PART_SIZE": str(64 * KiB),
    "AZSTORAGETORCH_BLOCK_SIZE": str(64 * KiB),
    "AZSTORAGETORCH_MEMORY_LIMIT": str(4 * MiB),
}
SIZES = [0, 1, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, 1 * MiB + 7]


def statuses(command: Command, *arguments: object, **environment: str) -> dict[str, int]:
    ended = command("cp", *arguments, "--json", **environment)
    assert ended.code == 0, ended.err
    summary = ended.records[-1]["summary"]
    return {status: summary[status] for status in ("copied", "resumed", "skipped") if summary[status]}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".azstoragetorch")]


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(container: Container, command: Command, tmp_path: Path, size: int) -> None:
    """Upload a file, copy the blob to another, and download it; the second time nothing is copied."""
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(content(size))
    for status in ("copied", "skipped"):
        assert statuses(command, source, container.blob_url("a b#ü"), **SMALL_PARTS) == {status: 1}
        assert container.get("a b#ü") == content(size)
        assert statuses(command, container.blob_url("a b#ü"), container.blob_url("copy"), **SMALL_PARTS) == {status: 1}
        assert container.get("copy") == content(size)
        assert statuses(command, container.blob_url("copy"), target, **SMALL_PARTS) == {status: 1}
        assert target.read_bytes() == content(size)
    assert statuses(command, source, container.blob_url("copy"), "--force", **SMALL_PARTS) == {"copied": 1}
    assert leftovers(target.parent) == []


def test_what_was_uploaded_carries_its_md5(container: Container, command: Command, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content(1 * MiB))
    statuses(command, tmp_path / "f", container.blob_url("f"), **SMALL_PARTS)
    found = container.client.get_blob_client("f").get_blob_properties().content_settings.content_md5
    assert bytes(found) == hashlib.md5(content(1 * MiB)).digest()


def test_same_length_and_other_bytes_are_copied(container: Container, command: Command, tmp_path: Path) -> None:
    container.put("blob", content(1000, seed=1))
    (tmp_path / "f").write_bytes(content(1000, seed=2))
    assert statuses(command, container.blob_url("blob"), tmp_path / "f") == {"copied": 1}
    assert (tmp_path / "f").read_bytes() == content(1000, seed=1)
    (tmp_path / "f").write_bytes(content(1000, seed=3))
    assert statuses(command, tmp_path / "f", container.blob_url("blob")) == {"copied": 1}
    assert container.get("blob") == content(1000, seed=3)


def test_folders_both_ways(container: Container, command: Command, tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = {"a": 10, "deep/b": 200_000, "deep/er/c": 0, "ü #%/d": 70_000}
    for name, size in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content(size))
    assert statuses(command, "-r", source, f"{container.url}/up", **SMALL_PARTS) == {"copied": 4}
    assert sorted(container.names()) == sorted(f"up/{name}" for name in files)
    assert statuses(command, "-r", f"{container.url}/up/", container.blob_url("again"), **SMALL_PARTS) == {"copied": 4}
    assert statuses(command, "-r", f"{container.url}/again", tmp_path / "down", **SMALL_PARTS) == {"copied": 4}
    for name, size in files.items():
        assert (tmp_path / "down" / name).read_bytes() == content(size)
    (tmp_path / "down" / "a").write_bytes(b"changed")
    assert statuses(command, "-r", f"{container.url}/up", tmp_path / "down") == {"copied": 1, "skipped": 3}
    assert statuses(command, "-r", source, f"{container.url}/up") == {"skipped": 4}


def test_dry_run_copies_nothing(container: Container, command: Command, tmp_path: Path) -> None:
    container.put("a/b", b"123")
    ended = command("cp", "-r", f"{container.url}/a", tmp_path / "x", "--dry-run")
    assert ended.out == f"{container.url}/a/b -> {tmp_path / 'x' / 'b'}  (3 B)\n"
    assert not (tmp_path / "x").exists()


def test_names_that_are_not_paths_stay_out(container: Container, command: Command, tmp_path: Path) -> None:
    """The others are copied, and the exit code reports the failure."""
    container.put("d//etc/passwd", b"1")
    container.put("d/good", b"2")
    ended = command("cp", "-r", f"{container.url}/d", tmp_path / "x")
    assert ended.code == 1
    assert "no file can have this name" in ended.err
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["good"]


def test_one_that_fails_does_not_stop_the_others(container: Container, command: Command, tmp_path: Path) -> None:
    container.put("d/a", b"1")
    container.put("d/b", b"2")
    (tmp_path / "x" / "a").mkdir(parents=True)
    ended = command("cp", "-r", f"{container.url}/d", tmp_path / "x", "--json")
    assert ended.code == 1
    assert {record["status"] for record in ended.records[:-1]} == {"failed", "copied"}
    assert (tmp_path / "x" / "b").read_bytes() == b"2"


def test_a_file_goes_into_a_folder_by_its_name(container: Container, command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    assert statuses(command, tmp_path / "file", f"{container.url}/folder/") == {"copied": 1}
    assert statuses(command, tmp_path / "file", container.url) == {"copied": 1}
    assert container.names() == ["file", "folder/file"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["{here}", "{here}/x"], "URL"),
        (["{here}", "{url}/x"], "--recursive"),
        (["{url}", "{here}/x"], "--recursive"),
        (["{url}/folder", "{here}/x"], "--recursive"),
        (["{here}/file", "{url}/x?versionid=2024"], "names a snapshot or version"),
        (["-r", "{here}/file", "{url}/x"], "omit --recursive"),
        (["-r", "{url}/nothing", "{here}/x"], "no blob found"),
    ],
)
def test_mistakes_are_explained(
    container: Container, command: Command, tmp_path: Path, arguments: list[str], word: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    ended = command("cp", *(argument.format(url=container.url, here=tmp_path) for argument in arguments))
    assert ended.code in (2, 3)
    assert word in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_resumes(
    fault_service: FaultService, command: Command, tmp_path: Path, number: signal.Signals
) -> None:
    """Received bytes (after SIGKILL: bytes on disk) are not fetched again; no incomplete file has the final name."""
    fault_service.allow_anonymous()
    size, part = 24 * MiB, 1 * MiB
    if number == signal.SIGKILL:
        size, part = 160 * MiB, 4 * MiB  # recorded every 64 MiB
    data = content(size)
    fault_service.put("data", "blob", data)
    url = fault_service.blob_url("data", "blob")
    last = Match("get_blob", where=lambda request: request.range is not None and request.range[0] >= size - 2 * part)
    hold = Hold(threading.Event())
    rule = fault_service.script(last, [hold], repeat=True)
    target = tmp_path / "target"
    settings = {"AZSTORAGETORCH_PART_SIZE": str(part), "AZSTORAGETORCH_MAX_CONCURRENCY": "4"}
    process = subprocess.Popen(
        [sys.executable, "-m", "azstoragetorch.cli", "cp", url, str(target), "--anonymous"],
        cwd=ROOT,
        env={**os.environ, **settings},
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: sum(r.sent for r in fault_service.requests("get_blob")) >= size - 2 * part, timeout=240)
    wait_until(lambda: bool(leftovers(tmp_path)), timeout=240)
    if number == signal.SIGKILL:
        wait_until(lambda: Record.kept_bytes(target) >= 64 * MiB, timeout=240)
    process.send_signal(number)
    process.wait(60)
    assert not target.exists()
    hold.gate.set()
    rule.cancel()
    fault_service.wait_until_idle(60)
    fault_service.reset_log()
    assert statuses(command, url, target, "--anonymous", **settings) == {"resumed": 1}
    again = sum(request.sent for request in fault_service.requests("get_blob"))
    assert again <= (size - 64 * MiB if number == signal.SIGKILL else 8 * part)
    assert target.read_bytes() == data
    assert leftovers(tmp_path) == []


def interrupted_download(
    fault_service: FaultService, target: Path, size: int, part: int = 64 * KiB, number: int = signal.SIGINT
) -> tuple[str, dict[str, str], str]:
    """Download all but the last part of *size* bytes to *target*; return the URL, the settings and the output."""
    fault_service.allow_anonymous()
    fault_service.reset_log()
    fault_service.put("data", "blob", content(size))
    url = fault_service.blob_url("data", "blob")
    last = Match("get_blob", where=lambda request: request.range is not None and request.range[0] >= size - part)
    hold = Hold(threading.Event())
    rule = fault_service.script(last, [hold], repeat=True)
    settings = {"AZSTORAGETORCH_PART_SIZE": str(part), "AZSTORAGETORCH_MAX_CONCURRENCY": "4"}
    process = subprocess.Popen(
        [sys.executable, "-m", "azstoragetorch.cli", "cp", url, str(target), "--anonymous"],
        cwd=ROOT,
        env={**os.environ, **settings},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: sum(r.sent for r in fault_service.requests("get_blob")) >= size - part, timeout=240)
    process.send_signal(number)
    _, said = process.communicate(timeout=240)
    hold.gate.set()
    rule.cancel()
    fault_service.wait_until_idle(60)
    return url, settings, said


def test_a_new_version_is_downloaded_again(fault_service: FaultService, command: Command, tmp_path: Path) -> None:
    """The unfinished download of another version is not used, and is deleted."""
    url, settings, _ = interrupted_download(fault_service, tmp_path / "target", 1 * MiB)
    assert len(leftovers(tmp_path)) == 1
    fault_service.put("data", "blob", content(1 * MiB, seed=1))
    assert statuses(command, url, tmp_path / "target", "--anonymous", **settings) == {"copied": 1}
    assert (tmp_path / "target").read_bytes() == content(1 * MiB, seed=1)
    assert leftovers(tmp_path) == []


def test_bytes_that_were_damaged_are_not_kept(container: Container, command: Command, tmp_path: Path) -> None:
    """The MD5 of the blob does not match its bytes."""
    from azure.storage.blob import ContentSettings

    container.put("blob", content(300_000))
    container.client.get_blob_client("blob").set_http_headers(ContentSettings(content_md5=bytearray(16)))
    (tmp_path / "target").write_bytes(b"old")
    ended = command("cp", container.blob_url("blob"), tmp_path / "target")
    assert ended.code == 1
    assert "MD5" in ended.err
    assert (tmp_path / "target").read_bytes() == b"old"
    assert leftovers(tmp_path) == []
    ended = command("cp", container.blob_url("blob"), container.blob_url("copy"))
    assert ended.code == 1
    assert container.names() == ["blob"]


def test_two_downloads_to_one_file_do_not_mix(fault_service: FaultService, command: Command, tmp_path: Path) -> None:
    fault_service.allow_anonymous()
    fault_service.put("data", "blob", content(1 * MiB))
    url = fault_service.blob_url("data", "blob")
    hold = Hold(threading.Event())
    rule = fault_service.script("get_blob", [hold], repeat=True)
    first = subprocess.Popen(
        [sys.executable, "-m", "azstoragetorch.cli", "cp", url, str(tmp_path / "f"), "--anonymous"], cwd=ROOT
    )
    fault_service.wait_for_requests(1, "get_blob", timeout=240)
    ended = command("cp", url, tmp_path / "f", "--anonymous")
    assert ended.code == 1
    assert "another process" in ended.err
    hold.gate.set()
    rule.cancel()
    assert first.wait(60) == 0
    assert (tmp_path / "f").read_bytes() == content(1 * MiB)


def test_a_wrong_credential_stops_everything(container: Container, command: Command, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(b"x")
    ended = command("cp", "-r", tmp_path, container.url, AZURE_STORAGE_KEY="bm9uc2Vuc2U=")
    assert ended.code == 4
    assert ended.err.count("\n") < 5
