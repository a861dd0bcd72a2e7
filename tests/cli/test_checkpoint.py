"""``checkpoint``: list, show, check, convert and remove what torch saved."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, _folder
from tests.azurite.container import Container
from tests.cli.conftest import Command
from tests.support import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
STATE = {"model": {"weight": torch.arange(1000.0).reshape(10, 100), "bias": torch.ones(7)}, "epoch": torch.tensor(3)}


def save(container: Container, name: str, state: dict[str, Any] = STATE) -> str:
    url = f"{container.url}/{name}"
    dcp.save(state, storage_writer=BlobStorageWriter(url, credential=container.key), no_dist=True)
    return url


def data_blob(container: Container, name: str) -> str:
    (found,) = [blob for blob in container.names() if blob.startswith(name) and blob.endswith(".distcp")]
    return found


def test_ls(container: Container, command: Command) -> None:
    urls = [save(container, f"run/step-{number}") for number in (900, 1000)]
    container.put("run/step-2000/__0_0.distcp", b"an interrupted save")
    assert command("checkpoint", "ls", f"{container.url}/run").out.splitlines() == urls
    assert command("checkpoint", "ls", f"{container.url}/run", "--latest", "--json").records == [{"url": urls[1]}]


def test_ls_shows_sizes_and_dates(container: Container, command: Command) -> None:
    url = save(container, "run/step-1")
    blobs = [blob for blob in container.client.list_blobs() if blob.name.startswith("run/step-1/")]
    saved = container.client.get_blob_client("run/step-1/.metadata").get_blob_properties().last_modified
    facts = {"url": url, "bytes": sum(blob.size for blob in blobs), "saved": saved.strftime("%Y-%m-%dT%H:%M:%SZ")}
    assert command("checkpoint", "ls", "-l", f"{container.url}/run", "--json").records == [facts]
    shown = command("checkpoint", "ls", "-H", f"{container.url}/run").out
    assert "KiB" in shown
    assert facts["saved"] in shown
    assert url in shown


def test_export_writes_into_devices_and_fifos(container: Container, command: Command, tmp_path: Path) -> None:
    url = save(container, "step")
    before = Path("/dev/null").stat()
    assert command("checkpoint", "export", url, "/dev/null").code == 0
    assert Path("/dev/null").stat().st_ino == before.st_ino
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    ended = command("checkpoint", "export", url, fifo)
    reader.join()
    assert ended.code == 0, ended.err
    assert torch.equal(torch.load(io.BytesIO(got[0]))["epoch"], STATE["epoch"])
    assert fifo.is_fifo()


def test_export_neither_follows_nor_replaces_a_link(container: Container, command: Command, tmp_path: Path) -> None:
    """It reports that before it reads the checkpoint; it does not replace a folder either."""
    url = save(container, "step")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "folder").mkdir()
    for name, word in [("link", "is a link to"), ("folder", "is a folder")]:
        ended = command("checkpoint", "export", url, tmp_path / name)
        assert ended.code == 1
        assert word in ended.err
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "precious"]


def test_a_full_disk_ends_an_export_with_an_error(container: Container, command: Command) -> None:
    url = save(container, "step")
    ended = command("checkpoint", "export", url, "/dev/full")
    assert ended.code == 1
    assert "No space left" in ended.err


def test_import_from_standard_input(container: Container, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "state.pt")
    url = f"{container.url}/step"
    with (tmp_path / "state.pt").open("rb") as file:
        ended = subprocess.run(
            [sys.executable, "-m", "azstoragetorch", "checkpoint", "import", "-", url],
            cwd=ROOT,
            env={**os.environ, "AZURE_STORAGE_KEY": container.service.account_key},
            stdin=file,
            capture_output=True,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    assert "step/.metadata" in container.names()


def test_import_of_a_legacy_file(container: Container, command: Command, tmp_path: Path) -> None:
    """The format of torch before zip files."""
    torch.save(STATE, tmp_path / "state.pth", _use_new_zipfile_serialization=False)
    ended = command("checkpoint", "import", tmp_path / "state.pth", f"{container.url}/step")
    assert ended.code == 0, ended.err
    assert command("checkpoint", "verify", f"{container.url}/step").code == 0


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."])
def test_import_of_something_else_is_an_error(
    container: Container, command: Command, tmp_path: Path, data: bytes
) -> None:
    """The error names it, for a file and for a blob."""
    (tmp_path / "state.pt").write_bytes(data)
    container.put("state.pt", data)
    for place in (tmp_path / "state.pt", container.blob_url("state.pt")):
        ended = command("checkpoint", "import", place, f"{container.url}/step")
        assert ended.code == 1, ended.err
        assert "state.pt" in ended.err
        assert len(ended.err.strip().splitlines()) == 1  # old releases of rich end a bar by an empty line
        if data == b"not a checkpoint":
            assert "neither a zip archive nor a pickle" in ended.err
            assert "--trust" not in ended.err, "that would not help"
    assert container.names() == ["state.pt"]


def test_inspect(container: Container, command: Command) -> None:
    url = save(container, "step")
    *entries, summary = command("checkpoint", "inspect", url, "--json").records
    assert {entry["key"]: (entry["type"], entry["shape"], entry["bytes"]) for entry in entries} == {
        "model.weight": ("float32", [10, 100], 4000),
        "model.bias": ("float32", [7], 28),
        "epoch": ("int64", [], 8),
    }
    assert summary["summary"]["bytes"] == 4036
    shown = command("checkpoint", "inspect", url).out
    assert "model.weight" in shown
    assert "10x100" in shown


def test_verify(container: Container, command: Command) -> None:
    url = save(container, "step")
    ended = command("checkpoint", "verify", url)
    assert (ended.code, ended.out[:7]) == (0, "3 good,"), ended.err


def test_verify_names_what_is_broken(container: Container, command: Command) -> None:
    url = save(container, "step")
    name = data_blob(container, "step")
    container.put(name, container.get(name)[:-3000])
    ended = command("checkpoint", "verify", url, "--json")
    assert ended.code == 1
    assert ended.records[-1]["summary"]["broken"] >= 1
    assert all(record["reason"] for record in ended.records[:-1])
    container.client.delete_blob(name)
    ended = command("checkpoint", "verify", url, "--json")
    assert ended.code == 1
    assert ended.records[-1]["summary"] == {"url": url, "good": 0, "broken": 3, "unchecked": 0, "compared": False}


def test_export_and_import(container: Container, command: Command, tmp_path: Path) -> None:
    """To a file and a blob that torch.load reads, and back from both."""
    url = save(container, "step")
    assert command("checkpoint", "export", url, tmp_path / "state.pt").code == 0
    assert command("checkpoint", "export", url, container.blob_url("state.pt")).code == 0
    for number, (loaded, source) in enumerate(
        [
            (torch.load(tmp_path / "state.pt"), tmp_path / "state.pt"),
            (torch.load(io.BytesIO(container.get("state.pt"))), container.blob_url("state.pt")),
        ]
    ):
        assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
        assert torch.equal(loaded["epoch"], STATE["epoch"])
        again = f"{container.url}/again-{number}"
        assert command("checkpoint", "import", source, again).code == 0
        target = {"model": {"weight": torch.zeros(10, 100), "bias": torch.zeros(7)}, "epoch": torch.tensor(0)}
        dcp.load(target, storage_reader=BlobStorageReader(again, credential=container.key), no_dist=True)
        assert torch.equal(target["model"]["weight"], STATE["model"]["weight"])
        assert torch.equal(target["epoch"], STATE["epoch"])
        assert command("checkpoint", "import", source, again).code == 1  # it exists
        assert command("checkpoint", "import", source, again, "--overwrite").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_export_of_a_few_keys(container: Container, command: Command, tmp_path: Path) -> None:
    url = save(container, "step")
    assert command("checkpoint", "export", url, tmp_path / "bias.pt", "--key", "model.bias").code == 0
    assert list(torch.load(tmp_path / "bias.pt")["model"]) == ["bias"]
    assert command("checkpoint", "export", url, tmp_path / "x.pt", "--key", "nothing").code == 3
    assert not (tmp_path / "x.pt").exists()


class Stranger:
    """An object that weights_only does not load."""


def test_verify_compares_with_digests_without_unpickling(container: Container, command: Command) -> None:
    url = container.blob_url("step")
    state = {"weight": torch.full((1000,), 3.0), "other": torch.ones(4), "config": Stranger()}
    dcp.save(state, storage_writer=BlobStorageWriter(url, credential=container.key, digests=True), no_dist=True)
    ended = command("checkpoint", "verify", url, "--json")
    assert ended.records[-1]["summary"] == {"url": url, "good": 3, "broken": 0, "unchecked": 0, "compared": True}
    ended = command("checkpoint", "inspect", url)
    assert "with digests" in ended.out + ended.err
    value = torch.tensor(3.0).numpy().tobytes()
    for name in container.names():  # a copy is not checked by ETags
        container.put(name.replace("step/", "copy/"), container.get(name).replace(100 * value, 99 * value + b"1234"))
    ended = command("checkpoint", "verify", container.blob_url("copy"), "--json")
    assert ended.code == 1
    (broken,) = [record for record in ended.records if record.get("status") == "broken"]
    assert broken["key"] == "weight"
    assert broken["reason"].count("blake3:") == 2
    assert ".distcp" in broken["reason"]
    for name in container.names():
        if name.endswith(".digests"):
            container.client.delete_blob(name)
    _folder._known.forget()
    ended = command("checkpoint", "verify", url)
    assert ended.code == 0
    assert "not compared" in ended.out + ended.err


def test_what_may_run_code_needs_trust(container: Container, command: Command, tmp_path: Path) -> None:
    url = save(container, "step", {"weight": torch.ones(3), "config": Stranger()})
    ended = command("checkpoint", "verify", url, "--json")
    assert ended.records[-1]["summary"] == {"url": url, "good": 1, "broken": 0, "unchecked": 1, "compared": False}
    assert command("checkpoint", "verify", url, "--trust", "--json").records[-1]["summary"]["good"] == 2
    ended = command("checkpoint", "export", url, tmp_path / "state.pt")
    assert ended.code == 1
    assert "--trust" in ended.err
    assert command("checkpoint", "export", url, tmp_path / "state.pt", "--trust").code == 0
    torch.save({"config": Stranger()}, tmp_path / "strange.pt")
    ended = command("checkpoint", "import", tmp_path / "strange.pt", f"{container.url}/new")
    assert ended.code == 1
    assert "--trust" in ended.err


def test_prune(container: Container, command: Command) -> None:
    for number in range(1, 5):
        save(container, f"run/step-{number}")
    url = f"{container.url}/run"
    assert command("checkpoint", "prune", url, "--keep", "2").code == 2  # no terminal to ask on
    assert len(command("checkpoint", "prune", url, "--keep", "2", "--dry-run").out.splitlines()) == 2
    assert len(command("checkpoint", "ls", url).out.splitlines()) == 4
    ended = command("checkpoint", "prune", url, "--keep", "2", "--yes", "--json")
    assert [record["url"][-1] for record in ended.records] == ["1", "2"]
    assert [line[-1] for line in command("checkpoint", "ls", url).out.splitlines()] == ["3", "4"]
    assert not any(name.startswith("run/step-1/") for name in container.names())


def test_mistakes_are_explained(container: Container, command: Command, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    ended = command("checkpoint", "import", tmp_path / "list.pt", f"{container.url}/new")
    assert (ended.code, "list.pt contains a list" in ended.err) == (1, True)
    ended = command("checkpoint", "prune", container.url)
    assert (ended.code, "--keep N, --incomplete" in ended.err) == (2, True)
    ended = command("checkpoint", "ls", f"{container.url}/nothing")
    assert (ended.code, ended.out, "no complete checkpoint" in ended.err) == (0, "", True)
    assert container.names() == []


def test_prune_of_leftovers(container: Container, command: Command) -> None:
    url = save(container, "run/step-1")
    left = f"run/step-2/{data_blob(container, 'run').rpartition('/')[2]}"
    container.put(left, b"")
    command("checkpoint", "prune", f"{container.url}/run", "--incomplete", "--yes")
    assert left in container.names()  # too young
    command("checkpoint", "prune", f"{container.url}/run", "--incomplete", "--min-age", "-1", "--yes")
    assert left not in container.names()
    ended = command("checkpoint", "prune", f"{container.url}/run", "--incomplete", "--yes")
    assert (ended.code, ended.out, ended.err.strip()) == (0, "", "nothing to delete")
    assert command("checkpoint", "verify", url).code == 0


def test_a_dry_run_shows_leftovers_and_keeps_them(container: Container, command: Command) -> None:
    url = save(container, "run/step-1")
    container.client.delete_blob("run/step-1/.metadata")
    before = container.names()
    options = ("--incomplete", "--min-age", "0")
    ended = command("checkpoint", "prune", f"{container.url}/run", *options, "--dry-run")
    assert ended.code == 0, ended.err
    assert ended.out.startswith(f"would delete {url}/")
    assert container.names() == before
    ended = command("checkpoint", "prune", f"{container.url}/run", *options)
    assert ended.code == 2
    assert "--yes" in ended.err
    assert container.names() == before
    assert command("checkpoint", "prune", f"{container.url}/run", *options, "--yes").code == 0
    assert container.names() == []
