"""What each operation does, on Azurite and on a service with scripted faults; the SDK is the second way in."""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import fsspec
import pandas as pd
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import pytest
import requests
import torch
from azure.core.credentials import AccessToken
from azure.core.exceptions import AzureError, HttpResponseError, ResourceNotFoundError
from fsspec.callbacks import Callback
from fsspec.generic import rsync

from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.scope import Scope
from azstoragetorch._files.server_copy import copy_on_server
from azstoragetorch.exceptions import AZStorageTorchError, BlobChangedError
from azstoragetorch.filesystem import AzureBlobFile, AzureBlobFileSystem, install
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container
from tests.faults import FaultService, Hold, LostAnswer, Match, Status
from tests.filesystem.places import connection_string, on_azurite, on_faults
from tests.support import QUICK, blob_client, content, run_threads


class Token:
    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        return AccessToken("token", 2**40)


@pytest.fixture
def fs(fault_service: FaultService) -> AzureBlobFileSystem:
    return on_faults(fault_service)


class TestReading:
    @pytest.mark.parametrize("size", [0, 1, 65_536, 300_001])
    def test_whole_files(self, fs: AzureBlobFileSystem, size: int, tmp_path: Path) -> None:
        data = content(size)
        fs.pipe_file("c/dir/x", data)
        assert fs.cat_file("c/dir/x") == data
        with fs.open("c/dir/x") as file:
            assert isinstance(file, AzureBlobFile)
            assert (file.size, file.read(), file.path) == (size, data, "c/dir/x")
            assert file.info() == {"name": "c/dir/x", "size": size, "type": "file", "etag": file.etag}
        fs.get_file("c/dir/x", tmp_path / "new/x")
        assert (tmp_path / "new/x").read_bytes() == data
        stream = io.BytesIO()
        fs.get_file("c/dir/x", stream)
        assert stream.getvalue() == data

    @pytest.mark.parametrize("start", [None, 0, 1, 70_000, 99_999, 100_000, 200_000, -1, -70_000, -200_000])
    @pytest.mark.parametrize("end", [None, 0, 1, 70_000, 99_999, 200_000, -1, -70_000])
    def test_slices(self, fs: AzureBlobFileSystem, start: int | None, end: int | None) -> None:
        data = content(100_000)
        fs.pipe_file("c/x", data)
        assert fs.cat_file("c/x", start, end) == data[start:end]
        assert fs.cat_ranges(["c/x"], start, end) == [data[start:end]]

    def test_many_ranges_take_few_requests(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        data = {name: content(400_000, seed) for seed, name in enumerate(("c/a", "c/b"))}
        fs.pipe(data)
        fault_service.reset_log()
        wanted = [(name, at, at + 100) for at in range(0, 400_000, 2_000) for name in ("c/a", "c/b")]
        wanted += [("c/a", 0, 300_000), ("c/b", 399_990, 400_100), ("c/a", 50, 50), ("c/a", 150, 250)]
        paths, starts, ends = map(list, zip(*wanted, strict=True))
        found = fs.cat_ranges(paths, starts, ends)
        assert found == [data[path][start:end] for path, start, end in wanted]
        assert len(fault_service.requests()) < 30
        fault_service.reset_log()
        assert fs.cat_ranges(["c/a"] * 3, [0, 1000, 2000], [10, 1010, 2010], max_gap=0) == [
            data["c/a"][at : at + 10] for at in (0, 1000, 2000)
        ]
        assert len(fault_service.requests()) == 3

    def test_errors_of_ranges_are_returned_in_place(self, fs: AzureBlobFileSystem) -> None:
        fs.pipe_file("c/x", b"0123456789")
        found = fs.cat_ranges(["c/x", "c/no", "c/x", "c/no", "c"], [0, 0, 5, -3, 0], [2, 2, 7, None, 2])
        assert (found[0], found[2]) == (b"01", b"56")
        assert isinstance(found[1], FileNotFoundError)
        assert isinstance(found[1].__cause__, ResourceNotFoundError)
        assert isinstance(found[3], FileNotFoundError)
        assert isinstance(found[4], IsADirectoryError)
        with pytest.raises(FileNotFoundError, match="c/no"):
            fs.cat_ranges(["c/x", "c/no"], [0, 0], [2, 2], on_error="raise")
        with pytest.raises(ValueError, match="2 paths need as many starts"):
            fs.cat_ranges(["c/x", "c/x"], [0], [2, 2])

    def test_ranges_of_two_versions_never_mix(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe_file("c/x", content(400_000))
        client = fs.clients.container(fs.container(fs.place("c")).url).blob("x")
        overwritten = threading.Event()

        def overwrite(_request: Any) -> bool:
            if not overwritten.is_set():
                overwritten.set()
                fault_service.put("c", "x", content(400_000, 1))
            return False

        fault_service.script(Match("get_blob", nth=2, where=overwrite), [Status(500)])
        found = fs.cat_ranges(["c/x"] * 3, [0, 200_000, 390_000], [10, 200_010, 390_010])
        versions = (content(400_000), content(400_000, 1))
        kept = [item for item in found if isinstance(item, bytes)]
        assert any(
            all(item in (data[0:10], data[200_000:200_010], data[390_000:390_010]) for item in kept)
            for data in versions
        )
        assert all(isinstance(item, OSError) for item in found if not isinstance(item, bytes))
        assert client.version() is not None

    def test_cat_of_many(self, fs: AzureBlobFileSystem) -> None:
        files = {f"c/d/{number}": content(number) for number in range(30)} | {"c/d/sub/x": b"x"}
        fs.pipe(files)
        assert fs.cat("c/d", recursive=True) == files
        assert fs.cat(["c/d/1", "c/d/2"]) == {name: files[name] for name in ("c/d/1", "c/d/2")}
        assert fs.cat("c/d/?") == {f"c/d/{number}": files[f"c/d/{number}"] for number in range(10)}
        assert fs.cat("c/d/3") == files["c/d/3"]
        with pytest.raises(FileNotFoundError):
            fs.cat(["c/d/1", "c/no"])
        assert fs.cat(["c/d/1", "c/no"], on_error="omit") == {"c/d/1": files["c/d/1"]}
        assert isinstance(fs.cat(["c/d/1", "c/no"], on_error="return")["c/no"], FileNotFoundError)

    def test_an_open_file_sees_one_version(self, fs: AzureBlobFileSystem) -> None:
        fs.pipe_file("c/x", content(300_000))
        with fs.open("c/x") as file:
            fs.pipe_file("c/x", content(300_000, 1))
            with pytest.raises(OSError, match="overwritten while it was being read") as raised:
                file.read()
        assert raised.value.errno == errno.ESTALE
        assert isinstance(raised.value.__cause__, BlobChangedError)

    def test_an_older_version_by_path(self) -> None:
        with FaultService(versioning=True) as service:
            fs = on_faults(service)
            fs.pipe_file("c/x", b"old")
            version = fs.blob(fs.place("c/x")).get_properties().headers["x-ms-version-id"]
            fs.pipe_file("c/x", b"new")
            assert fs.cat_file(f"c/x?versionid={version}") == b"old"
            assert fs.open(f"c/x?versionid={version}").read() == b"old"
            assert fs.info(f"c/x?versionid={version}")["size"] == 3
            assert fs.cat_file("c/x") == b"new"
            with pytest.raises(ValueError, match="can only be read"):
                fs.open(f"c/x?versionid={version}", "wb")

    def test_opening_takes_one_request(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe_file("c/x", b"data")
        fault_service.reset_log()
        with fs.open("c/x") as file:
            assert file.read() == b"data"
        assert [request.operation for request in fault_service.requests()] == ["get_blob"]

    def test_progress_is_reported(self, fs: AzureBlobFileSystem, tmp_path: Path) -> None:
        files = {f"c/d/{number}": content(100_000, number) for number in range(5)}
        fs.pipe(files)
        seen: list[tuple[int | None, int]] = []

        class Children(Callback):  # type: ignore[misc]  # fsspec is not typed
            def branched(self, path_1: Any, path_2: Any, **options: Any) -> Callback:
                return Child()

        class Child(Callback):  # type: ignore[misc]
            def close(self) -> None:
                seen.append((self.size, self.value))

        callback = Children()
        fs.get("c/d/", str(tmp_path / "d"), recursive=True, callback=callback)
        assert (callback.size, callback.value) == (6, 6)  # with the directory
        assert seen.count((100_000, 100_000)) == 5
        callback = Children()
        fs.put(str(tmp_path / "d"), "c/e", recursive=True, callback=callback)
        assert fs.cat("c/e", recursive=True) == {name.replace("/d/", "/e/"): data for name, data in files.items()}
        assert callback.value == callback.size


class TestWriting:
    def test_an_exception_commits_nothing(self, fs: AzureBlobFileSystem) -> None:
        fs.pipe_file("c/x", b"old")
        with pytest.raises(RuntimeError), fs.open("c/x", "wb") as file:
            file.write(content(200_000))
            raise RuntimeError
        with pytest.raises(RuntimeError), fs.open("c/x", "w") as file:
            file.write("text")
            raise RuntimeError
        assert fs.cat_file("c/x") == b"old"

    def test_create_only(self, fs: AzureBlobFileSystem, tmp_path: Path) -> None:
        fs.pipe_file("c/x", b"old")
        (tmp_path / "f").write_bytes(b"new")
        for create in (
            lambda: fs.pipe_file("c/x", b"new", mode="create"),
            lambda: fs.open("c/x", "xb"),
            lambda: fs.put_file(tmp_path / "f", "c/x", mode="create"),
        ):
            with pytest.raises(FileExistsError) as raised:
                create()
            assert raised.value.filename == "c/x"
        with fs.open("c/y", "xb") as file:  # created by somebody else in the meantime
            file.write(b"new")
            fs.pipe_file("c/y", b"theirs")
            with pytest.raises(FileExistsError):
                file.close()
        assert (fs.cat_file("c/x"), fs.cat_file("c/y")) == (b"old", b"theirs")
        fs.put_file(tmp_path / "f", "c/z", mode="create")
        assert fs.cat_file("c/z") == b"new"

    def test_buffers_of_any_type(self, fs: AzureBlobFileSystem) -> None:
        for value in (bytearray(b"data"), memoryview(b"data"), torch.tensor([1, 2], dtype=torch.int16).numpy()):
            fs.pipe_file("c/x", value)
            assert fs.cat_file("c/x") == bytes(value)
        with pytest.raises(TypeError):
            fs.pipe_file("c/x", "text")

    def test_touch(self, fs: AzureBlobFileSystem) -> None:
        fs.touch("c/x", truncate=False)
        assert fs.cat_file("c/x") == b""
        fs.pipe_file("c/x", b"data")
        with pytest.raises(NotImplementedError):
            fs.touch("c/x", truncate=False)
        assert fs.cat_file("c/x") == b"data"
        fs.touch("c/x")
        assert fs.cat_file("c/x") == b""

    def test_a_lost_response_is_found_out(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fault_service.script(Match("put_blob"), [LostAnswer()])
        fs.pipe_file("c/x", b"data", mode="create")
        assert fs.cat_file("c/x") == b"data"


class TestTransactions:
    def test_commits_at_the_end(self, fs: AzureBlobFileSystem, tmp_path: Path) -> None:
        fs.pipe_file("c/a", b"old")
        (tmp_path / "f").write_bytes(b"3")
        with fs.transaction:
            with fs.open("c/a", "wb") as file:
                file.write(content(200_000))
            fs.pipe({"c/b": b"2", "c/d/e": b"4"})
            fs.put_file(tmp_path / "f", "c/c")
            assert fs.cat_file("c/a") == b"old"
            assert fs.find("c") == ["c/a"]
        assert fs.find("c") == ["c/a", "c/b", "c/c", "c/d/e"]
        assert fs.cat_file("c/a") == content(200_000)
        fs.pipe_file("c/a", b"after")
        assert fs.cat_file("c/a") == b"after"

    def test_an_exception_discards_everything(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe_file("c/a", b"old")
        with pytest.raises(RuntimeError), fs.transaction:
            with fs.open("c/a", "wb") as file:
                file.write(content(200_000))
            fs.pipe_file("c/b", b"2")
            raise RuntimeError
        assert fs.cat("c", recursive=True) == {"c/a": b"old"}
        assert not fault_service.requests("put_block_list")

    def test_a_file_that_was_left_by_an_exception_is_not_committed(self, fs: AzureBlobFileSystem) -> None:
        with fs.transaction:
            with pytest.raises(RuntimeError), fs.open("c/a", "wb") as file:
                file.write(b"half")
                raise RuntimeError
            fs.pipe_file("c/b", b"2")
        assert fs.find("c") == ["c/b"]

    def test_an_open_file_is_not_committed(self, fs: AzureBlobFileSystem) -> None:
        file = fs.open("c/a", "wb", autocommit=False)
        file.write(b"data")
        with pytest.raises(ValueError, match="is still open"):
            file.commit()
        file.close()
        assert not fs.exists("c/a")
        file.commit()
        file.commit()
        file.discard()
        assert fs.cat_file("c/a") == b"data"

    def test_discard(self, fs: AzureBlobFileSystem) -> None:
        file = fs.open("c/a", "wb", autocommit=False)
        file.write(content(200_000))
        file.close()
        file.discard()
        file.commit()
        assert not fs.exists("c/a")


class TestListings:
    FILES = ("a", "a/b", "d/x", "d/s/y", "d/s/t/z", "e//f", "g/")

    @pytest.fixture
    def filled(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> AzureBlobFileSystem:
        for name in self.FILES:
            fault_service.put("c", name, b"" if name.endswith("/") else b"12")
        return fs

    def test_find(self, filled: AzureBlobFileSystem) -> None:
        fs = filled
        assert fs.find("c") == ["c/a", "c/a/b", "c/d/s/t/z", "c/d/s/y", "c/d/x", "c/e//f"]
        assert fs.find("") == fs.find("c")
        assert fs.find("c/d", maxdepth=1) == ["c/d/x"]
        assert fs.find("c/d", maxdepth=2) == ["c/d/s/y", "c/d/x"]
        assert fs.find("c/d", maxdepth=2, withdirs=True) == ["c/d", "c/d/s", "c/d/s/t", "c/d/s/y", "c/d/x"]
        assert fs.find("c/d", withdirs=True) == ["c/d", "c/d/s", "c/d/s/t", "c/d/s/t/z", "c/d/s/y", "c/d/x"]
        assert fs.find("c/d/x") == ["c/d/x"]
        assert fs.find("c/d", prefix="s") == ["c/d/s/t/z", "c/d/s/y"]
        assert fs.find("c/no") == fs.find("no") == fs.find("no/x") == []
        assert fs.find("c/g", withdirs=True) == ["c/g"]
        assert fs.du("c") == 12
        assert fs.du("c/d", total=False) == {"c/d/x": 2, "c/d/s/y": 2, "c/d/s/t/z": 2}
        for path in ("c", "c/d"):
            assert fs.find(path, detail=True) == {name: fs.info(name) for name in fs.find(path)}
        with pytest.raises(ValueError, match="maxdepth must be at least 1"):
            fs.find("c", maxdepth=0)

    def test_ls_and_info_agree(self, filled: AzureBlobFileSystem) -> None:
        fs = filled
        assert fs.ls("", detail=False) == ["c"]
        assert fs.ls("c", detail=False) == ["c/a", "c/a", "c/d", "c/e", "c/g"]
        for path in ("", "c", "c/d", "c/d/s", "c/e", "c/g"):
            assert all(entry == fs.info(entry["name"]) or entry["name"] == "c/a" for entry in fs.ls(path))
        assert fs.info("c/d/x") == {
            "name": "c/d/x",
            "size": 2,
            "type": "file",
            "etag": fs.info("c/d/x")["etag"],
            "last_modified": fs.modified("c/d/x"),
        }
        assert fs.info("c/d") == {"name": "c/d", "size": 0, "type": "directory"}
        assert fs.ls("c/d/x") == [fs.info("c/d/x")]
        assert fs.ls("c/g") == []
        assert (fs.isfile("c/a"), fs.isdir("c/a"), fs.info("c/a")["type"]) == (True, True, "file")
        assert (fs.isfile("c/g"), fs.isdir("c/g"), fs.exists("c/g")) == (False, True, True)
        assert (fs.isfile("c"), fs.isdir("c"), fs.isdir(""), fs.exists("")) == (False, True, True, True)
        assert not any((fs.exists("c/no"), fs.isdir("c/no"), fs.isfile("c/no"), fs.exists("no"), fs.isdir("no/x")))
        assert fs.sizes(["c/a", "c/d/x"]) == [2, 2]
        now = datetime.now(timezone.utc)
        assert abs((now - fs.created("c/a")).total_seconds()) < 3600
        checksum, ukey = fs.checksum("c/a"), fs.ukey("c/a")
        assert (checksum, ukey) == (fs.checksum("c/a"), fs.ukey("c/a"))
        fs.pipe_file("c/a", b"34")
        assert checksum != fs.checksum("c/a")
        assert ukey != fs.ukey("c/a")

    def test_glob_lists_only_what_can_match(self, filled: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs = filled
        assert fs.glob("c/d/*") == ["c/d/s", "c/d/x"]
        assert fs.glob("c/*/x") == ["c/d/x"]
        assert fs.glob("c/d/**/?") == ["c/d/s", "c/d/s/t", "c/d/s/t/z", "c/d/s/y", "c/d/x"]
        assert fs.glob("c/e/**") == ["c/e", "c/e/", "c/e//f"]
        assert fs.glob("c/d/[xy]") == ["c/d/x"]
        assert fs.glob("c*") == ["c"]
        assert fs.glob("c/a") == ["c/a"]
        assert fs.glob("c/no*") == []
        fault_service.reset_log()
        assert fs.glob("c/d/s/y*") == ["c/d/s/y"]
        assert [request.query["prefix"] for request in fault_service.requests("list_blobs")] == ["d/s/y"]

    def test_listings_are_cached_until_something_changes(
        self, filled: AzureBlobFileSystem, fault_service: FaultService
    ) -> None:
        fs = filled
        fs.ls("c/d")
        fs.ls("c")
        fault_service.put("c", "d/other", b"")
        fault_service.reset_log()
        assert fs.ls("c/d", detail=False) == ["c/d/s", "c/d/x"]
        assert [names for _, _, names in fs.walk("c/d", maxdepth=1)] == [["x"]]
        assert not fault_service.requests()
        assert fs.exists("c/d/other")
        assert fs.ls("c/d", detail=False, refresh=True) == ["c/d/other", "c/d/s", "c/d/x"]
        fs.ls("c/d")[0]["name"] = "changed by the caller"
        assert fs.ls("c/d")[0]["name"] == "c/d/other"
        with fs.open("c/d/new", "wb") as file:
            file.write(b"")
        assert "c/d/new" in fs.ls("c/d", detail=False)
        fs.ls("c")
        fs.pipe_file("c/new/deep/x", b"")
        assert "c/new" in fs.ls("c", detail=False)
        fs.rm("c/new", recursive=True)
        assert "c/new" not in fs.ls("c", detail=False)
        other = on_faults(fault_service, use_listings_cache=False)
        other.ls("c/d")
        fault_service.put("c", "d/more", b"")
        assert "c/d/more" in other.ls("c/d", detail=False)

    def test_a_listing_that_was_overtaken_by_a_change_is_not_cached(
        self, filled: AzureBlobFileSystem, fault_service: FaultService
    ) -> None:
        fs, gate = filled, threading.Event()
        fault_service.script(Match("list_blobs"), [Hold(gate)])

        def work(number: int) -> None:
            if number:
                fs.ls("c/d")
                return
            fault_service.wait_for_requests(1, "list_blobs")
            fs.pipe_file("c/d/new", b"")
            gate.set()

        run_threads(2, work)
        assert "c/d" not in fs.dircache
        fs.ls("c/d")
        assert "c/d" in fs.dircache

    def test_an_account_with_directories(self) -> None:
        with FaultService(hierarchical=True) as service:
            fs = on_faults(service)
            fs.pipe({"c/d/s/x": b"1", "c/d/y": b"2"})
            service.put("c", "empty", b"", metadata={"hdi_isfolder": "true"})
            assert fs.find("c") == ["c/d/s/x", "c/d/y"]
            assert fs.find("c", withdirs=True) == ["c", "c/d", "c/d/s", "c/d/s/x", "c/d/y", "c/empty"]
            assert fs.ls("c", detail=False) == ["c/d", "c/empty"]
            assert fs.ls("c/empty") == []
            for path in ("c/d", "c/empty"):
                assert (fs.isdir(path), fs.isfile(path), fs.info(path)["type"]) == (True, False, "directory")
                with pytest.raises(IsADirectoryError):
                    fs.open(path)
                with pytest.raises(IsADirectoryError):
                    fs.cat_file(path)
            fs.rmdir("c/empty")
            assert not service.exists("c", "empty")
            fs.mv("c/d", "c/e", recursive=True)
            assert service.names("c") == ["e", "e/s", "e/s/x", "e/y"]
            fs.rm("c/e", recursive=True)
            assert service.names("c") == []

    def test_names_that_no_request_can_have_are_not_followed(
        self, fs: AzureBlobFileSystem, fault_service: FaultService, tmp_path: Path
    ) -> None:
        for name in ("d/../../../evil", "d/../../up/x/y"):
            fault_service.put("c", name, b"evil")
        with pytest.raises(ValueError, match=r"segment|outside the destination"):
            fs.get("c/d", str(tmp_path / "in/in"), recursive=True)
        assert {path.name for path in tmp_path.rglob("*")} <= {"in"}

    def test_a_credential_that_cannot_list(self, container: Container) -> None:
        container.put("d/x", b"1")
        options = {"connection_string": None, "sas_token": container.sas("r")}
        fs = on_azurite(container, account_host=container.service.account_url, **options)
        assert fs.exists(f"{container.name}/d/x")
        assert not fs.exists(f"{container.name}/no")
        with pytest.raises(PermissionError, match="403") as raised:
            fs.ls(container.name)
        assert isinstance(raised.value.__cause__, HttpResponseError)
        with pytest.raises(PermissionError):
            fs.pipe_file(f"{container.name}/d/x", b"2")


class TestChanges:
    def test_rm(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe({f"c/d/{number}": b"" for number in range(20)} | {"c/e/x": b"", "c/e/s/y": b"", "c/d.txt": b""})
        with pytest.raises(IsADirectoryError):
            fs.rm("c/d")
        with pytest.raises(FileNotFoundError):
            fs.rm("c/no")
        with pytest.raises(FileNotFoundError):
            fs.rm("c/no", recursive=True)
        with pytest.raises(IsADirectoryError):
            fs.rm_file("c/d")
        fs.rm(["c/d/1", "c/d/2"])
        fs.rm("c/d/1?")
        assert fs.find("c/d") == [f"c/d/{number}" for number in (0, 3, 4, 5, 6, 7, 8, 9)]
        fs.rm("c/e", recursive=True, maxdepth=1)
        assert fs.find("c/e") == ["c/e/s/y"]
        fs.rm("c/d", recursive=True)
        assert fs.find("c") == ["c/d.txt", "c/e/s/y"]
        with pytest.raises(PermissionError):
            fs.rm("", recursive=True)
        fs.rm("c", recursive=True)
        assert fs.ls("") == []

    def test_copies_are_made_by_the_service(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe({f"c/d/{number}": content(1000, number) for number in range(5)})
        fault_service.reset_log()
        fs.copy("c/d/", "c/e/", recursive=True)
        assert fs.cat("c/e", recursive=True) == {f"c/e/{number}": content(1000, number) for number in range(5)}
        assert len(fault_service.requests("copy_blob")) == 5
        fs.cp_file("c/d/1", "c/d/1")
        with pytest.raises(FileNotFoundError):
            fs.cp_file("c/no", "c/x")
        with pytest.raises(FileNotFoundError):
            fs.copy("c/no", "c/x")

    def test_a_large_copy_is_made_in_blocks(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        """With what describes the source: content headers, metadata, and MD5."""
        fault_service.store.max_copied_at_once = 1000
        fault_service.put("c", "a", content(250_000), metadata={"owner": "me"})
        source, target = (fs.blob(fs.place(path)) for path in ("c/a", "c/b"))
        found = source.get_properties()
        copy_on_server(source, target, found, Scope(), at_once=1000, block_size=65_536)
        assert fault_service.get("c", "b") == content(250_000)
        assert len(fault_service.requests("put_block_from_url")) == 4
        assert target.get_properties().headers["x-ms-meta-owner"] == "me"

    def test_where_blocks_cannot_be_copied_bytes_pass_through_here(self, container: Container) -> None:
        """As on Azurite, which does not implement it."""
        container.put("a", content(250_000))
        source, target = (blob_client(container.blob_sas_url(name)) for name in ("a", "b"))
        copy_on_server(source, target, source.get_properties(), Scope(), at_once=1000, block_size=65_536)
        assert container.get("b") == content(250_000)

    def test_mv(self, fs: AzureBlobFileSystem) -> None:
        fs.pipe({"c/d/x": b"1", "c/d/s/y": b"2", "c/f": b"3"})
        fs.mv("c/f", "c/g")
        fs.mv("c/d", "c/e", recursive=True)
        assert fs.cat("c", recursive=True) == {"c/e/x": b"1", "c/e/s/y": b"2", "c/g": b"3"}
        fs.mv("c/g", "c/g")
        fs.mv("c/g", "azt://c/g/")
        assert fs.cat_file("c/g") == b"3"
        with pytest.raises(FileNotFoundError):
            fs.mv("c/no", "c/x")

    def test_mv_never_deletes_what_was_not_copied(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe({"c/d/x": b"1", "c/d/y": b"2"})

        def overwrite(request: Any) -> bool:
            if request.blob == "d/x":
                fault_service.put("c", "d/x", b"newer")
                fault_service.put("c", "d/z", b"new")
            return False

        fault_service.script(Match("delete", where=overwrite), [Status(500)])
        with pytest.raises(OSError, match="was overwritten while it was being moved"):
            fs.mv("c/d", "c/e", recursive=True)
        fault_service.clear_script()
        assert fs.cat_file("c/d/x") == b"newer"
        assert fs.cat_file("c/d/z") == b"new"
        assert fs.cat("c/e", recursive=True) == {"c/e/x": b"1", "c/e/y": b"2"}

    def test_a_failed_copy_moves_nothing(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe({"c/d/x": b"1", "c/d/y": b"2"})
        fault_service.script(Match("copy_blob", nth=2), [Status(403)], repeat=True)
        with pytest.raises(PermissionError):
            fs.mv("c/d", "c/e", recursive=True)
        assert fs.find("c/d") == ["c/d/x", "c/d/y"]

    def test_containers(self, container: Container) -> None:
        fs, name = on_azurite(container), f"{container.name}-new"
        with pytest.raises(FileNotFoundError):
            fs.mkdir(f"{name}/d", create_parents=False)
        fs.mkdir(name)
        assert name in fs.ls("", detail=False)
        assert (fs.isdir(name), fs.ls(name)) == (True, [])
        with pytest.raises(FileExistsError):
            fs.mkdir(name)
        with pytest.raises(FileExistsError):
            fs.makedirs(name)
        fs.makedirs(name, exist_ok=True)
        fs.makedirs(f"{name}/a/b")
        fs.pipe_file(f"{name}/a/x", b"")
        with pytest.raises(FileExistsError):
            fs.mkdir(f"{name}/a")
        for path in (name, f"{name}/a"):
            with pytest.raises(OSError, match="not empty") as raised:
                fs.rmdir(path)
            assert raised.value.errno == errno.ENOTEMPTY
        with pytest.raises(NotADirectoryError):
            fs.rmdir(f"{name}/a/x")
        fs.rm(f"{name}/a", recursive=True)
        fs.rmdir(f"{name}/a")
        fs.rmdir(name)
        assert not fs.exists(name)
        with pytest.raises(FileNotFoundError):
            fs.rmdir(name)

    def test_signed_urls(self, container: Container) -> None:
        fs = on_azurite(container)
        fs.pipe_file(f"{container.name}/a b", b"data")
        url = fs.sign(f"{container.name}/a b")
        assert requests.get(url, timeout=240).content == b"data"
        assert requests.delete(url, timeout=240).status_code == 403
        other = on_azurite(
            container, connection_string=None, account_host=container.service.account_url, sas_token=container.sas()
        )
        with pytest.raises(NotImplementedError, match="can sign a URL, not a SAS"):
            other.sign(f"{container.name}/a b")

    def test_urls_signed_for_an_identity(self, https_fault_service: FaultService) -> None:
        service = https_fault_service
        service.require_token("token")
        fs = on_faults(service, credential=Token(), anon=None)
        url = fs.sign("c/a b", expiration=600)
        parsed = parse_blob_url(url)
        assert (parsed.blob, parsed.sas is not None) == ("a b", True)
        query = {name: values[0] for name, values in parse_qs(url.partition("?")[2]).items()}
        assert (query["sp"], query["sr"], query["skoid"], query["sktid"]) == ("r", "b", "oid", "tid")
        assert (datetime.fromisoformat(query["se"].replace("Z", "+00:00")) - datetime.now(timezone.utc)).seconds <= 600
        assert "token" not in url


class TestErrors:
    """Each is fsspec's, names URL and reason, and is chained from the error of Azure or of this package."""

    @pytest.mark.parametrize(
        ("operation", "kind"),
        [
            (lambda fs: fs.open("c/no"), FileNotFoundError),
            (lambda fs: fs.open("c/no", "r"), FileNotFoundError),
            (lambda fs: fs.cat_file("c/no"), FileNotFoundError),
            (lambda fs: fs.cat_file("c/no", 1, 2), FileNotFoundError),
            (lambda fs: fs.info("c/no"), FileNotFoundError),
            (lambda fs: fs.info("no/x"), FileNotFoundError),
            (lambda fs: fs.ls("c/no"), FileNotFoundError),
            (lambda fs: fs.ls("no"), FileNotFoundError),
            (lambda fs: fs.pipe_file("no/x", b""), FileNotFoundError),
            (lambda fs: fs.created("c/no"), FileNotFoundError),
            (lambda fs: fs.get_file("c/no", "/nowhere"), FileNotFoundError),
            (lambda fs: fs.mkdir("c"), FileExistsError),
        ],
    )
    def test_of_the_service(
        self, fs: AzureBlobFileSystem, operation: Callable[[AzureBlobFileSystem], Any], kind: type[OSError]
    ) -> None:
        with pytest.raises(kind, match=r"http://127\.0\.0\.1:\d+/devstoreaccount1/\w+") as raised:
            operation(fs)
        assert type(raised.value) is kind
        assert isinstance(raised.value.__cause__, (AzureError, AZStorageTorchError))

    @pytest.mark.parametrize(
        ("operation", "kind"),
        [
            (lambda fs: fs.open("c/d"), IsADirectoryError),
            (lambda fs: fs.open("c"), IsADirectoryError),
            (lambda fs: fs.open("c", "wb"), IsADirectoryError),
            (lambda fs: fs.pipe_file("c", b""), IsADirectoryError),
            (lambda fs: fs.cat_file("c"), IsADirectoryError),
            (lambda fs: fs.get_file("c/d", io.BytesIO()), IsADirectoryError),
            (lambda fs: fs.open("c/d/x", "ab"), NotImplementedError),
            (lambda fs: fs.open("c/d/x", "r+b"), NotImplementedError),
            (lambda fs: fs.open("c/d/x", "rb", blocksize=3), TypeError),
            (lambda fs: fs.pipe_file("c/x", b"", mode="append"), ValueError),
        ],
    )
    def test_of_arguments(
        self, fs: AzureBlobFileSystem, operation: Callable[[AzureBlobFileSystem], Any], kind: type[Exception]
    ) -> None:
        fs.pipe_file("c/d/x", b"data")
        with pytest.raises(kind):
            operation(fs)

    @pytest.mark.parametrize(
        ("status", "kind"), [(401, PermissionError), (403, PermissionError), (503, OSError), (400, OSError)]
    )
    def test_by_status(
        self, fs: AzureBlobFileSystem, fault_service: FaultService, status: int, kind: type[OSError]
    ) -> None:
        fs.pipe_file("c/x", content(200_000))
        fault_service.script(Match(), [Status(status)], repeat=True)
        with fs.open("c/y", "wb") as file:
            with pytest.raises(kind, match=str(status)) as raised:
                file.write(content(400_000))
                file.close()
            file.discard()
        assert isinstance(raised.value.__cause__, AZStorageTorchError)
        for read in (lambda: fs.cat_file("c/x"), lambda: fs.open("c/x"), lambda: fs.exists("c/x"), lambda: fs.ls("c")):
            with pytest.raises(kind, match=str(status)) as raised:
                read()
            assert isinstance(raised.value.__cause__, HttpResponseError)

    def test_while_a_file_is_read(self, fs: AzureBlobFileSystem, fault_service: FaultService) -> None:
        fs.pipe_file("c/x", content(1_000_000))
        with fs.open("c/x") as file:
            file.read(10)
            fault_service.delete("c", "x")
            with pytest.raises(FileNotFoundError, match="404"):
                file.seek(900_000)
                file.read(10)

    def test_a_service_that_cannot_be_reached(self) -> None:
        host = "http://127.0.0.1:1/devstoreaccount1"
        fs = AzureBlobFileSystem(account_host=host, anon=True, transfer=QUICK, skip_instance_cache=True)
        with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:1/devstoreaccount1/c/x"):
            fs.cat_file("c/x")


class TestWithOthers:
    def test_torch(self, fs: AzureBlobFileSystem) -> None:
        state = {str(number): torch.randn(100) for number in range(50)}
        with fs.open("c/model.pt", "wb") as file:
            torch.save(state, file)
        with fs.open("c/model.pt") as file:
            found = torch.load(file)
        assert all(torch.equal(found[name], state[name]) for name in state)

    @pytest.mark.skipif(fsspec.__version__ < "2025.7", reason="pandas needs a newer fsspec")
    def test_pandas_and_pyarrow(self, container: Container, tmp_path: Path) -> None:
        install()
        options = {"connection_string": connection_string(container)}
        table = pd.DataFrame({"number": range(1000), "text": [f"row {number}" for number in range(1000)]})
        url = f"abfs://{container.name}/table.parquet"
        table.to_parquet(url, storage_options=options)
        pd.testing.assert_frame_equal(pd.read_parquet(url, storage_options=options), table)
        table.to_csv(f"{url}.csv", index=False, storage_options=options)
        pd.testing.assert_frame_equal(pd.read_csv(f"{url}.csv", storage_options=options), table)
        fs = on_azurite(container)
        arrow = pyarrow.Table.from_pandas(table.assign(part=table["number"] % 3))
        root = f"{container.name}/dataset"
        pyarrow.parquet.write_to_dataset(arrow, root, partition_cols=["part"], filesystem=fs)
        found = pyarrow.dataset.dataset(root, filesystem=fs, partitioning="hive")
        assert found.count_rows() == 1000
        assert found.to_table(filter=pyarrow.dataset.field("part") == 1).num_rows == 333
        whole = pyarrow.parquet.read_table(f"{container.name}/table.parquet", filesystem=fs, columns=["number"])
        assert whole.column("number").to_pylist() == list(range(1000))
        handler = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
        handler.create_dir(f"{container.name}/new", recursive=True)
        kinds = {info.base_name: info.type for info in handler.get_file_info(pyarrow.fs.FileSelector(container.name))}
        assert kinds["dataset"] == pyarrow.fs.FileType.Directory

    def test_rsync(self, fs: AzureBlobFileSystem, tmp_path: Path) -> None:
        """fsspec's generic file system copies between two file systems."""
        (tmp_path / "s").mkdir()
        (tmp_path / "s/a").write_bytes(b"1")
        (tmp_path / "b").write_bytes(b"2")
        url = str(fs.unstrip_protocol("c/copy"))
        from fsspec.generic import GenericFileSystem, set_generic_fs

        install()
        set_generic_fs("file")
        set_generic_fs("azt", account_host=fs.account.account_url, anon=True, transfer=QUICK)
        generic = GenericFileSystem(default_method="generic", skip_instance_cache=True)
        rsync(f"file://{tmp_path}", url, fs=generic)
        assert fs.cat("c/copy", recursive=True) == {"c/copy/b": b"2", "c/copy/s/a": b"1"}
        assert generic.cat_file(f"{url}/b") == b"2"

    def test_a_mapper(self, fs: AzureBlobFileSystem) -> None:
        mapper = fs.get_mapper("c/map")
        mapper["a/b"] = b"1"
        mapper.setitems({"c": b"2", "d": b"3"})
        assert sorted(mapper) == ["a/b", "c", "d"]
        assert mapper.getitems(["c", "no"], on_error="omit") == {"c": b"2"}
        assert "no" not in mapper
        with pytest.raises(KeyError):
            mapper["no"]
        del mapper["c"]
        assert sorted(mapper) == ["a/b", "d"]

    def test_threads(self, fs: AzureBlobFileSystem) -> None:
        def work(number: int) -> bool:
            path = f"c/t/{number}"
            for turn in range(5):
                fs.pipe_file(path, content(70_000, turn))
                assert path in fs.ls("c/t", detail=False)
                with fs.open(path) as file:
                    assert file.read() == content(70_000, turn)
            return True

        assert all(run_threads(8, work))

    def test_what_is_written_is_read_by_blobio_and_the_reverse(self, container: Container) -> None:
        fs, path = on_azurite(container), f"{container.name}/a b%20#?.bin"
        fs.pipe_file(path, b"data")
        with BlobIO(container.blob_sas_url("a b%20#?.bin"), "rb", credential=False) as blob:
            assert blob.read() == b"data"
        assert container.names() == ["a b%20#?.bin"]
