"""``cp`` of several sources and globs, the copied properties, and messages after an interrupt."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from azure.storage.blob import ContentSettings, StandardBlobTier

from azstoragetorch._files.record import Record
from tests.azurite.container import Container
from tests.cli.conftest import Command
from tests.cli.test_cp import interrupted_download
from tests.faults.faults import Hold, Match
from tests.faults.service import FaultService
from tests.support import ROOT, content, wait_until

KiB, MiB = 1 << 10, 1 << 20


class TestSeveralSources:
    def test_files_and_blobs_go_into_a_folder(self, container: Container, command: Command, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(name.encode())
        assert command("cp", tmp_path / "a", tmp_path / "b", f"{container.url}/d/").code == 0
        assert container.names() == ["d/a", "d/b"]
        urls = [container.blob_url(name) for name in ("d/a", "d/b")]
        assert command("cp", *urls, f"{tmp_path}/down/").code == 0
        assert (tmp_path / "down" / "b").read_bytes() == b"b"
        assert command("cp", *urls, container.url).code == 0
        assert container.names() == ["a", "b", "d/a", "d/b"]

    def test_folders_keep_their_names(self, container: Container, command: Command, tmp_path: Path) -> None:
        for name in ("x/f", "y/g", "h"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"1")
        ended = command("cp", "-r", *(tmp_path / name for name in ("x", "y", "h")), f"{container.url}/d/")
        assert ended.code == 0, ended.err
        assert container.names() == ["d/h", "d/x/f", "d/y/g"]
        ended = command("cp", "-r", f"{container.url}/d/x", f"{container.url}/d/y/", f"{tmp_path}/down/")
        assert ended.code == 0, ended.err
        assert (tmp_path / "down" / "y" / "g").read_bytes() == b"1"

    def test_the_target_has_to_be_a_folder(self, container: Container, command: Command, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(b"1")
        for target in (container.blob_url("x"), "-"):
            ended = command("cp", tmp_path / "a", tmp_path / "b", target)
            assert ended.code == 2
        assert container.names() == []

    def test_one_that_is_missing_does_not_stop_the_others(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        (tmp_path / "a").write_bytes(b"1")
        ended = command("cp", tmp_path / "missing", tmp_path / "a", container.url)
        assert ended.code == 1
        assert "missing" in ended.err
        assert container.names() == ["a"]

    def test_two_of_one_name_do_not_overwrite_each_other(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        for name in ("x/f", "y/f"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(name.encode())
        ended = command("cp", tmp_path / "x" / "f", tmp_path / "y" / "f", container.url)
        assert ended.code == 1
        assert "same target" in ended.err
        assert container.get("f") == b"x/f"


class TestGlobs:
    NAMES = ("t/a.tar", "t/b.tar", "t/c.txt", "t/deep/d.tar", "u/a.tar", "run-1/x", "run-2/x")

    @pytest.mark.parametrize(
        ("arguments", "found"),
        [
            (["{url}/t/*.tar"], ["a.tar", "b.tar"]),
            (["{url}/t/**.tar"], ["a.tar", "b.tar", "deep/d.tar"]),
            (["{url}/*/a.tar"], ["t/a.tar", "u/a.tar"]),
            (["-r", "{url}/run-*"], ["run-1/x", "run-2/x"]),
            (["{url}/t/c.txt", "{url}/u/*"], ["a.tar", "c.txt"]),
        ],
    )
    def test_what_matches_is_copied(
        self, container: Container, command: Command, tmp_path: Path, arguments: list[str], found: list[str]
    ) -> None:
        for name in self.NAMES:
            container.put(name, name.encode())
        ended = command("cp", *(argument.format(url=container.url) for argument in arguments), f"{tmp_path}/x/")
        assert ended.code == 0, ended.err
        copied = [path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*") if path.is_file()]
        assert sorted(map(str, copied)) == found

    def test_nothing_that_matches_is_an_error(self, container: Container, command: Command, tmp_path: Path) -> None:
        container.put("a", b"1")
        for verb in (["cp"], ["rm", "--yes"], ["ls"]):
            ended = command(*verb, f"{container.url}/x*", *([f"{tmp_path}/x/"] if verb == ["cp"] else []))
            assert ended.code == 3
        assert container.names() == ["a"]

    def test_a_star_that_is_percent_encoded_is_a_name(
        self, container: Container, command: Command, tmp_path: Path
    ) -> None:
        for name in ("a*", "ab"):
            container.put(name, name.encode())
        assert command("cp", f"{container.url}/a%2A", f"{tmp_path}/").code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["a*"]

    def test_ls_and_rm_take_globs(self, container: Container, command: Command) -> None:
        for name in self.NAMES:
            container.put(name, b"1")
        assert command("ls", f"{container.url}/t/*.tar").out.splitlines() == ["t/a.tar", "t/b.tar"]
        assert command("rm", "--yes", f"{container.url}/t/**.tar").code == 0
        assert container.names() == ["run-1/x", "run-2/x", "t/c.txt", "u/a.tar"]


class TestRemoving:
    def test_a_blob_and_a_folder(self, container: Container, command: Command) -> None:
        for name in ("a", "ab", "a/b", "a/c/d", "e"):
            container.put(name, b"1")
        assert command("rm", "--yes", container.blob_url("a")).code == 0
        assert container.names() == ["a/b", "a/c/d", "ab", "e"]
        ended = command("rm", "-r", "--yes", container.blob_url("a"), "--json")
        assert ended.code == 0
        assert {record["url"] for record in ended.records} == {container.blob_url(f"a/{x}") for x in ("b", "c/d")}
        assert container.names() == ["ab", "e"]

    def test_it_asks_and_a_dry_run_deletes_nothing(self, container: Container, command: Command) -> None:
        container.put("a/b", b"1")
        ended = command("rm", "-r", container.blob_url("a"))
        assert ended.code == 2
        assert "--yes" in ended.err
        ended = command("rm", "-r", "--dry-run", container.blob_url("a"))
        assert (ended.code, ended.out) == (0, f"would delete {container.blob_url('a/b')}  (1 B)\n")
        assert command("rm", container.url, "--yes").code == 2
        assert container.names() == ["a/b"]

    def test_what_is_missing_is_named_and_the_others_are_deleted(self, container: Container, command: Command) -> None:
        container.put("a", b"1")
        ended = command("rm", "--yes", container.blob_url("missing"), container.blob_url("a"))
        assert ended.code == 3
        assert "missing" in ended.err
        assert container.names() == []

    def test_what_cannot_be_deleted_is_named(self, container: Container, command: Command) -> None:
        for name in ("a", "b"):
            container.put(name, b"1")
        container.client.get_blob_client("a").create_snapshot()
        ended = command("rm", "-r", "--yes", container.url)
        assert ended.code == 1
        assert "/a" in ended.err
        assert "1 deleted, 1 failed" in ended.err
        assert container.names() == ["a"]


class TestWhatACopyKeeps:
    @pytest.mark.parametrize("size", [100, 3 * MiB])
    def test_content_headers_and_metadata(self, container: Container, command: Command, size: int) -> None:
        settings = ContentSettings("text/csv", "gzip", "de", 'attachment; filename="x"', "no-store")
        container.client.upload_blob("a", content(size), content_settings=settings, metadata={"Key": "value"})
        small = {"AZSTORAGETORCH_BLOCK_SIZE": str(MiB)}
        assert command("cp", container.blob_url("a"), container.blob_url("b"), **small).code == 0
        found = container.client.get_blob_client("b").get_blob_properties()
        kept = found.content_settings
        assert (kept.content_type, kept.content_encoding, kept.content_language) == ("text/csv", "gzip", "de")
        assert (kept.content_disposition, kept.cache_control) == ('attachment; filename="x"', "no-store")
        assert found.metadata == {"Key": "value"}
        assert container.client.download_blob("b", decompress=False).readall() == content(size)
        ended = command("cp", container.blob_url("a"), container.blob_url("b"), "--json")
        assert ended.records[-1]["summary"]["skipped"] == 1
        container.client.get_blob_client("b").set_blob_metadata({"Key": "other"})
        assert command("cp", container.blob_url("a"), container.blob_url("b")).code == 0
        assert container.client.get_blob_client("b").get_blob_properties().metadata == {"Key": "value"}

    @pytest.mark.parametrize("size", [100, 3 * MiB])
    def test_the_access_tier_and_index_tags(self, container: Container, command: Command, size: int) -> None:
        """The tier unless --no-tier says otherwise, the tags if --tags asks for them."""
        tags = {"set": "train + test", "a b": "x=y:z/1", "empty": ""}
        container.client.upload_blob("a", content(size), tags=tags, standard_blob_tier=StandardBlobTier.COOL)
        small = {"AZSTORAGETORCH_BLOCK_SIZE": str(MiB)}
        a, b, c = (container.client.get_blob_client(name) for name in ("a", "b", "c"))
        assert command("cp", a.url, b.url, **small).code == 0
        assert (b.get_blob_properties().blob_tier, b.get_blob_tags()) == ("Cool", {})
        assert command("cp", a.url, c.url, "--no-tier", "--tags", **small).code == 0
        assert (c.get_blob_properties().blob_tier_inferred, c.get_blob_tags()) == (True, tags)
        for options, skipped in (([], 1), (["--tags"], 0), (["--tags"], 1)):
            ended = command("cp", a.url, b.url, *options, "--json", **small)
            assert ended.records[-1]["summary"]["skipped"] == skipped, options
        assert (b.get_blob_properties().blob_tier, b.get_blob_tags()) == ("Cool", tags)

    def test_index_tags_that_are_not_copied_are_reported(self, container: Container, command: Command) -> None:
        """By a copy and by one that is skipped; not if there are none, nor if they are copied."""
        for name, tags in (("f/a", {"key": "value"}), ("f/b", {"key": "value"}), ("f/c", None)):
            container.client.upload_blob(name, name.encode(), tags=tags)
        assert command("cp", "-r", container.blob_url("f"), container.blob_url("copies"), "--tags").code == 0
        for target in ("new", "new"):
            ended = command("cp", "-r", container.blob_url("f"), container.blob_url(target))
            assert ended.code == 0
            assert "index tags of 2 blobs were not copied: pass --tags to copy them" in ended.err
        ended = command("cp", "-r", container.blob_url("f"), container.blob_url("newer"), "--json")
        assert ended.records[-1]["summary"]["index_tags_not_copied"] == 2
        for options in (["--tags"], []):
            name = "f" if options else "f/c"
            ended = command(
                "cp", *(["-r"] if options else []), *options, container.blob_url(name), container.blob_url("t")
            )
            assert (ended.code, "index tags" in ended.err) == (0, False)

    def test_tags_that_may_not_be_read_fail_the_copy(self, container: Container, command: Command) -> None:
        container.client.upload_blob("a", b"data", tags={"key": "value"})
        may_not = f"{container.blob_url('a')}?{container.sas('r')}"
        ended = command("cp", "--tags", may_not, container.blob_url("b"))
        assert ended.code != 0
        assert "GET (tags)" in ended.err
        assert container.names() == ["a"]
        assert command("cp", may_not, container.blob_url("b")).code == 0

    def test_a_wrong_stored_md5_can_be_passed(self, container: Container, command: Command, tmp_path: Path) -> None:
        container.put("blob", content(300_000))
        container.client.get_blob_client("blob").set_http_headers(ContentSettings(content_md5=bytearray(16)))
        for target in (tmp_path / "f", container.blob_url("copy")):
            ended = command("cp", container.blob_url("blob"), target)
            assert ended.code == 1
            assert "--no-check-md5" in ended.err
            assert command("cp", "--no-check-md5", container.blob_url("blob"), target).code == 0
        assert (tmp_path / "f").read_bytes() == container.get("copy") == content(300_000)


class TestCutShort:
    def test_an_interrupted_download_says_what_is_kept(self, fault_service: FaultService, tmp_path: Path) -> None:
        _, _, said = interrupted_download(fault_service, tmp_path / "f", 4 * MiB, part=1 * MiB)
        (line,) = said.strip().splitlines()
        kept = Record.kept_bytes(tmp_path / "f") / MiB
        assert kept >= 1
        assert line == f"azstoragetorch: interrupted; run it again to resume ({kept:.1f} MiB of 4.0 MiB kept)"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupted_upload_says_what_is_kept(
        self, fault_service: FaultService, tmp_path: Path, number: signal.Signals
    ) -> None:
        """Complete files are counted, files with staged blocks are not. One line, not one per connection."""
        fault_service.allow_anonymous()
        fault_service.create_container("data")
        for name in ("a", "b", "c"):
            (tmp_path / name).write_bytes(content(2 * MiB, seed=ord(name)))
        url, hold = fault_service.container_url("data"), Hold(threading.Event())
        fault_service.script(Match("put_block", path="/(b|c)$"), [hold], repeat=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "azstoragetorch", "cp", "-r", str(tmp_path), url, "--anonymous"],
            cwd=ROOT,
            env={**os.environ, "AZSTORAGETORCH_BLOCK_SIZE": str(512 * KiB)},
            stderr=subprocess.PIPE,
            text=True,
        )
        # Two are copied at once: when the last one starts, the first one has ended.
        for name in "bc":
            wait_until(lambda name=name: bool(fault_service.requests("put_block", path=f"/{name}$")), timeout=240)
        process.send_signal(number)
        _, said = process.communicate(timeout=240)
        hold.gate.set()
        assert process.returncode == 128 + number
        (line,) = said.strip().splitlines()
        assert line == "azstoragetorch: interrupted; run it again to resume (2.0 MiB of 6.0 MiB kept)"

    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs a small disk")
    def test_a_full_disk_is_one_error(self, container: Container, command: Command, tmp_path: Path) -> None:
        small = tmp_path / "small"
        small.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=False).returncode:
            pytest.skip("this system does not mount a small disk")
        try:
            for number in range(20):
                container.put(f"d/{number:02d}", content(500 * KiB))
            ended = command("cp", "-r", f"{container.url}/d", small)
            assert ended.code == 1
            errors = [line for line in ended.err.splitlines() if line.startswith("azstoragetorch: ")]
            assert len(errors) == 1, ended.err
            assert re.search(r"No space left.*run it again", errors[0])
            assert all(path.stat().st_size == 500 * KiB for path in small.iterdir() if path.name[0] != ".")
        finally:
            subprocess.run(["umount", small], check=True)
