"""``cp`` between blobs and paths of any kind: fifos, devices, links, folders, names that blobs cannot have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.azurite.container import Container
from tests.cli.conftest import Command, Ended, run_command
from tests.faults.service import FaultService
from tests.support import ROOT, content, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
MiB = 1 << 20


@pytest.fixture
def shell(container: Container) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run the command line in a separate process, with bytes as input and output."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "AZURE_STORAGE_KEY": container.service.account_key}
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [sys.executable, "-m", "azstoragetorch", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=240,
            check=False,
            **options,
        )

    return run


# A first copy imports all modules, since the other user might be unable to read this Python installation.
AS_NOBODY = """
import os, sys
from azstoragetorch.cli._app import run
source, url = sys.argv[1:]
assert run(["cp", "-r", source + "/closed", url + "/before"]) == 1
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(run(["cp", "-r", source, url]))
"""

Shell = Callable[..., subprocess.CompletedProcess[bytes]]


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".azstoragetorch*")]


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can read; those of pytest are private, and are made private again by every run."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


class TestSources:
    @pytest.mark.parametrize("name", ["-", "/dev/stdin"])
    @pytest.mark.parametrize("size", [0, 5, 20 * MiB])
    def test_standard_input_is_copied_to_its_end(
        self, container: Container, shell: Shell, name: str, size: int
    ) -> None:
        ended = shell("cp", name, container.blob_url("b"), input=content(size))
        assert ended.returncode == 0, ended.stderr
        assert container.get("b") == content(size)

    def test_a_fifo_is_copied_to_its_end(self, container: Container, command: Command, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        writer = threading.Thread(target=lambda: fifo.write_bytes(content(3 * MiB)))
        writer.start()
        ended = command("cp", fifo, container.blob_url("b"))
        writer.join()
        assert ended.code == 0, ended.err
        assert container.get("b") == content(3 * MiB)

    def test_a_file_without_a_length_is_copied_to_its_end(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        """Passed as an argument, or found in a folder."""
        assert command("cp", "/proc/version", container.blob_url("b")).code == 0
        assert container.get("b") == Path("/proc/version").read_bytes()
        (tmp_path / "version").symlink_to("/proc/version")
        assert command("cp", "-r", tmp_path, f"{container.url}/d").code == 0
        assert container.get("d/version") == Path("/proc/version").read_bytes()

    def test_a_device_is_copied_to_its_end(self, container: Container, command: Command) -> None:
        assert command("cp", "/dev/null", container.blob_url("b")).code == 0
        assert container.get("b") == b""

    def test_a_source_that_cannot_be_read_is_named(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(tmp_path / "socket"))
        for name, code in [("socket", 1), ("nothing", 3)]:
            ended = command("cp", tmp_path / name, container.blob_url("b"))
            assert ended.code == code
            assert name in ended.err
        server.close()
        assert container.names() == []

    def test_standard_input_has_no_name(self, container: Container, command: Command) -> None:
        for target in (container.url, f"{container.url}/folder/"):
            ended = command("cp", "-", target)
            assert ended.code == 2
            assert "no name" in ended.err


class TestFolders:
    def test_what_is_not_a_file_is_named_and_the_others_are_copied(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        (source / "sub").mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "x").write_bytes(b"x")
        (source / "good").write_bytes(b"1")
        (source / "sub" / "good").write_bytes(b"2")
        (source / "link-to-file").symlink_to("good")
        (source / "link-to-folder").symlink_to(tmp_path / "elsewhere")
        (source / "dangling").symlink_to("nowhere")
        os.mkfifo(source / "fifo")
        ended = command("cp", "-r", source, container.url)
        assert ended.code == 1
        assert container.names() == ["good", "link-to-file", "sub/good"]
        for name, word in [("link-to-folder", "--links"), ("dangling", "is a dangling link"), ("fifo", "fifo")]:
            assert any(name in line and word in line for line in ended.err.splitlines()), ended.err
        assert "3 failed" in ended.err

    def test_links_are_followed_or_left_out_as_asked_for(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "x").write_bytes(b"x")
        (source / "good").write_bytes(b"1")
        (source / "folder").symlink_to(tmp_path / "elsewhere")
        (source / "file").symlink_to("good")
        assert command("cp", "-r", "--links", "all", source, f"{container.url}/all").code == 0
        ended = command("cp", "-r", "--links", "none", source, f"{container.url}/none")
        assert ended.code == 0
        assert "2 skipped" in ended.err
        assert container.names() == ["all/file", "all/folder/x", "all/good", "none/good"]

    def test_a_link_to_a_folder_above_is_not_an_endless_walk(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        (tmp_path / "s" / "sub").mkdir(parents=True)
        (tmp_path / "s" / "sub" / "up").symlink_to("..")
        (tmp_path / "s" / "f").write_bytes(b"1")
        ended = command("cp", "-r", "--links", "all", tmp_path / "s", container.url)
        assert ended.code == 1
        assert "sub/up" in ended.err
        assert container.names() == ["f"]

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
    def test_folders_and_files_that_cannot_be_read_are_named(self, container: Container, public_folder: Path) -> None:
        source = public_folder / "source"
        for name in ("closed", "open"):
            (source / name).mkdir(parents=True)
            (source / name / "f").write_bytes(b"1")
        (source / "closed" / "dangling").symlink_to("nowhere")
        (source / "secret").write_bytes(b"1")
        (source / "secret").chmod(0o600)
        (source / "closed").chmod(0o700)
        ended = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(source), container.url],
            cwd=ROOT,
            env={**os.environ, "AZURE_STORAGE_KEY": container.service.account_key},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert ended.returncode == 1, ended.stderr
        assert container.names() == ["before/f", "open/f"]
        for name in ("closed", "secret"):
            assert any(name in line and "denied" in line for line in ended.stderr.splitlines()), ended.stderr

    @pytest.mark.parametrize("name", [b"bad\xff.txt", b"a" * 200 + b"/" + b"b" * 200], ids=["not UTF-8", "long"])
    def test_a_name_that_no_blob_has_is_named_and_the_others_are_copied(
        self, container: Container, command: Command, tmp_path: Path, name: bytes
    ) -> None:
        folders = b"/s" + (b"/" + b"c" * 200) * 4 * (b"/" in name)
        path = Path(os.fsdecode(os.fsencode(tmp_path) + folders + b"/" + name))
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1")
        (tmp_path / "s" / "good").write_bytes(b"2")
        ended = command("cp", "-r", tmp_path / "s", container.url)
        assert ended.code == 1
        assert ("bad\\udcff.txt" if b"/" not in name else "b" * 200) in ended.err
        assert container.names() == ["good"]
        assert "1 copied, 1 failed" in ended.err


class TestTargets:
    def test_devices_and_fifos_are_written_into(self, container: Container, command: Command, tmp_path: Path) -> None:
        container.put("b", content(3 * MiB))
        before = Path("/dev/null").stat()
        assert command("cp", container.blob_url("b"), "/dev/null").code == 0
        assert Path("/dev/null").stat().st_ino == before.st_ino
        fifo, got = tmp_path / "fifo", []
        os.mkfifo(fifo)
        reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
        reader.start()
        ended = command("cp", container.blob_url("b"), fifo)
        reader.join()
        assert ended.code == 0, ended.err
        assert got == [content(3 * MiB)]
        assert fifo.is_fifo()

    def test_a_full_device_is_an_error(self, container: Container, command: Command) -> None:
        container.put("b", b"1")
        ended = command("cp", container.blob_url("b"), "/dev/full")
        assert ended.code == 1
        assert "No space left" in ended.err

    @pytest.mark.parametrize("name", ["-", "/dev/stdout"])
    def test_standard_output_gets_the_bytes_and_nothing_else(
        self, container: Container, shell: Shell, name: str
    ) -> None:
        container.put("b", content(9 * MiB))
        ended = shell("cp", container.blob_url("b"), name)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == content(9 * MiB)
        assert shell("cp", container.blob_url("b"), name, "--json").returncode == 2

    @pytest.mark.parametrize("leads_to", ["file", "nothing"])
    def test_a_link_is_neither_followed_nor_replaced(
        self, container: Container, command: Command, tmp_path: Path, leads_to: str
    ) -> None:
        container.put("d/b", b"new")
        (tmp_path / "file").write_bytes(b"precious")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "b").symlink_to(tmp_path / leads_to)
        for arguments in (
            [container.blob_url("d/b"), tmp_path / "x" / "b"],
            [container.blob_url("d/b"), tmp_path / "x"],
            ["-r", f"{container.url}/d", tmp_path / "x"],
        ):
            ended = command("cp", *arguments)
            assert ended.code == 1
            assert "is a link to" in ended.err
        assert (tmp_path / "x" / "b").is_symlink()
        assert (tmp_path / "file").read_bytes() == b"precious"
        assert not (tmp_path / "nothing").exists()
        assert unfinished(tmp_path) == []

    def test_a_linked_folder_below_the_target_is_not_entered(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        """A target that is itself a link to a folder was passed by the user, and is followed."""
        container.put("d/sub/b", b"new")
        (tmp_path / "home").mkdir()
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "sub").symlink_to(tmp_path / "home")
        ended = command("cp", "-r", f"{container.url}/d", tmp_path / "x")
        assert ended.code == 1
        assert "sub is a link" in ended.err
        assert list((tmp_path / "home").iterdir()) == []
        assert command("cp", "-r", f"{container.url}/d/sub", tmp_path / "x" / "sub").code == 0
        assert (tmp_path / "home" / "b").read_bytes() == b"new"

    def test_fifos_and_folders_in_a_folder_are_refused(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        for name in ("fifo", "folder", "good"):
            container.put(f"d/{name}", b"1")
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "folder").mkdir()
        ended = command("cp", "-r", f"{container.url}/d", tmp_path)
        assert ended.code == 1
        assert (tmp_path / "good").read_bytes() == b"1"
        assert (tmp_path / "fifo").is_fifo()
        assert "fifo" in ended.err
        assert "folder is a folder" in ended.err
        assert unfinished(tmp_path) == []

    def test_a_blob_that_is_also_a_folder_is_left_out(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        for name in ("d/a", "d/a/b", "d/c"):
            container.put(name, name.encode())
        ended = command("cp", "-r", f"{container.url}/d", tmp_path / "x")
        assert ended.code == 1
        assert "d/a: not copied, because there are also blobs below" in ended.err
        assert (tmp_path / "x" / "a" / "b").read_bytes() == b"d/a/b"
        assert (tmp_path / "x" / "c").read_bytes() == b"d/c"
        assert unfinished(tmp_path) == []

    def test_markers_of_folders_become_folders(self, container: Container, command: Command, tmp_path: Path) -> None:
        for name in ("d/", "d/sub/", "d/empty/"):
            container.put(name, b"")
        container.put("d/sub/b", b"1")
        ended = command("cp", "-r", f"{container.url}/d", tmp_path / "x")
        assert ended.code == 0, ended.err
        assert (tmp_path / "x" / "sub" / "b").read_bytes() == b"1"
        assert list((tmp_path / "x" / "empty").iterdir()) == []
        assert command("cp", "-r", f"{container.url}/d", container.blob_url("e")).code == 0
        assert container.names() == ["d/", "d/empty/", "d/sub/", "d/sub/b", "e/", "e/empty/", "e/sub/", "e/sub/b"]

    def test_a_directory_is_not_an_empty_file(self, container: Container, command: Command, tmp_path: Path) -> None:
        container.client.upload_blob("d", b"", metadata={"hdi_isfolder": "true"})
        ended = command("cp", container.blob_url("d"), tmp_path / "x")
        assert ended.code == 2
        assert "--recursive" in ended.err

    @pytest.mark.parametrize("direction", ["<", ">"])
    def test_process_substitution(self, container: Container, tmp_path: Path, direction: str) -> None:
        """A shell passes ``/dev/fd/63``."""
        container.put("b", content(1 * MiB))
        url, out = container.blob_url("b"), tmp_path / "out"
        (tmp_path / "in").write_bytes(content(1 * MiB, seed=1))
        cp = f"{sys.executable} -m azstoragetorch cp"
        line = f"{cp} <(cat {tmp_path}/in) {url}" if direction == "<" else f"{cp} {url} >(cat > {out}; echo end)"
        ended = subprocess.run(
            ["bash", "-c", line],
            cwd=ROOT,
            env={**os.environ, "AZURE_STORAGE_KEY": container.service.account_key},
            capture_output=True,
            timeout=240,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        expected = content(1 * MiB, seed=1) if direction == "<" else content(1 * MiB)
        if direction == ">":
            wait_until(lambda: out.exists() and out.stat().st_size == MiB, timeout=240)
        assert (container.get("b") if direction == "<" else out.read_bytes()) == expected

    def test_a_target_with_a_slash_becomes_a_folder(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        container.put("b", b"1")
        assert command("cp", container.blob_url("b"), f"{tmp_path}/new/").code == 0
        assert (tmp_path / "new" / "b").read_bytes() == b"1"

    def test_a_file_that_is_replaced_hands_on_its_permissions(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        container.put("b", b"1")
        (tmp_path / "b").write_bytes(b"old")
        (tmp_path / "b").chmod(0o640)
        assert command("cp", container.blob_url("b"), tmp_path).code == 0
        assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640

    def test_a_file_cannot_be_the_folder(self, container: Container, command: Command, tmp_path: Path) -> None:
        container.put("d/b", b"1")
        (tmp_path / "file").write_bytes(b"old")
        ended = command("cp", "-r", f"{container.url}/d", tmp_path / "file")
        assert ended.code == 2
        assert "not a folder" in ended.err


class TestPlanted:
    """In a folder that other users can write to."""

    def test_an_unfinished_file_that_was_replaced_is_not_continued(
        self, fault_service: FaultService, command: Command, tmp_path: Path
    ) -> None:
        """Replaced with a link, or with another file of the same name; neither is changed."""
        from tests.cli.test_cp import interrupted_download

        for kind in ("link", "file", "hard link"):
            target = tmp_path / kind / "target"
            target.parent.mkdir()
            url, settings, _ = interrupted_download(fault_service, target, 1 * MiB)
            (name,) = unfinished(target.parent)
            part, precious = target.parent / name, tmp_path / f"{kind}-precious"
            precious.write_bytes(b"E" * MiB)
            planted = target.parent / "planted"
            if kind == "link":
                planted.symlink_to(precious)
            elif kind == "file":
                planted.write_bytes(b"E" * MiB)
            else:
                planted.hardlink_to(precious)
            planted.replace(part)
            ended = command("cp", url, target, "--anonymous", "--json", **settings)
            assert ended.code == 0, ended.err
            assert ended.records[-1]["summary"]["copied"] == 1
            assert target.read_bytes() == content(1 * MiB)
            assert precious.read_bytes() == b"E" * MiB

    def test_a_record_that_others_can_write_is_not_used(
        self, container: Container, command: Command, state_home: Path, tmp_path: Path
    ) -> None:
        folder = state_home / "azstoragetorch"
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        container.put("b", content(100))
        assert command("cp", container.blob_url("b"), tmp_path / "b").code == 0
        assert (tmp_path / "b").read_bytes() == content(100)
        assert list(folder.iterdir()) == []

    def test_nothing_is_left_where_records_were(
        self, container: Container, command: Command, state_home: Path, tmp_path: Path
    ) -> None:
        container.put("b", content(100))
        assert command("cp", container.blob_url("b"), tmp_path / "b").code == 0
        assert [path for path in state_home.rglob("*") if path.is_file()] == []


def test_without_a_home_it_copies(container: Container, tmp_path: Path) -> None:
    container.put("b", content(100))
    (tmp_path / "file").write_bytes(b"")
    key = container.service.account_key
    home = str(tmp_path / "file")
    ended: Ended = run_command(
        "cp", container.blob_url("b"), tmp_path / "b", AZURE_STORAGE_KEY=key, XDG_STATE_HOME=home, HOME=home
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "b").read_bytes() == content(100)
