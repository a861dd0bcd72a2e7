"""Tar pipes read the tars of other programs, and write tars that other programs read."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import azstoragetorch.datapipes  # noqa: F401 - registers the functional names
from azstoragetorch import TransferConfig
from azstoragetorch._samples.tar import walk
from azstoragetorch.datapipes._base import IterableWrapper
from azstoragetorch.exceptions import BlobChangedError
from tests.azurite.container import Container
from tests.faults import FaultService

MiB = 1 << 20
SMALL = TransferConfig(part_size=1 * MiB, memory_limit=8 * MiB)


def make_tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def members(packed: bytes) -> dict[str, bytes]:
    found = {}
    for member in walk(io.BytesIO(packed), "url"):
        if isinstance(member.data, bytes):
            found[member.name] = member.data
        else:
            with member.data as stream:
                found[member.name] = stream.read()
    return found


def expand(service: FaultService, packed: bytes, **options: Any) -> Any:
    service.put("data", "shard.tar", packed)
    source = IterableWrapper([service.blob_url("data", "shard.tar")])
    return source.open_files_by_azure(credential=False, **options).expand_blob_tar()


FILES = {
    "0.txt": b"",
    "train/1.jpg": b"x" * 511,
    "ümläut/2 3.jpg": b"y" * 512,
    "deep/" * 40 + "n" * 120: b"z" * 513,  # too long for a plain header
    "4.bin": os.urandom(5 * MiB),
    "5": b"end",
}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_come_in_order_with_any_name_and_size(fault_service: FaultService, form: int, mode: str) -> None:
    url = fault_service.blob_url("data", "shard.tar")
    found = [(path, stream.read()) for path, stream in expand(fault_service, make_tar(FILES, form, mode))]
    assert found == [(f"{url}/{name}", data) for name, data in FILES.items()]


def test_names_in_ustar_prefixes() -> None:
    name = "a" * 90 + "/" + "b" * 90
    assert members(make_tar({name: b"data"}, tarfile.USTAR_FORMAT)) == {name: b"data"}


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "v7", "oldgnu"])
def test_what_tar_itself_packs(tmp_path: Path, form: str) -> None:
    """GNU tar in each of its formats; directories and links are skipped."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_bytes(bytes([number]) * number * 400)
    (folder / "link.txt").symlink_to("1.txt")
    (folder / "sub").mkdir()
    packed = tmp_path / "a.tar"
    subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", packed, "-C", folder, "."], check=True)
    expected = {f"./{number}.txt": bytes([number]) * number * 400 for number in range(5)}
    assert members(packed.read_bytes()) == expected


def test_global_pax_headers_and_unknown_types_are_passed_over() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as tar:
        odd = tarfile.TarInfo("odd")
        odd.type, odd.size = b"Z", 700
        tar.addfile(odd, io.BytesIO(b"o" * 700))
        plain = tarfile.TarInfo("plain")
        plain.size = 3
        tar.addfile(plain, io.BytesIO(b"abc"))
    assert members(packed.getvalue()) == {"plain": b"abc"}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("ab/ü.", min_size=1, max_size=150).filter(lambda n: n.strip("/") == n), st.binary(max_size=1500)
    )
)
def test_it_reads_what_the_standard_library_writes(files: dict[str, bytes]) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert members(make_tar(files, form)) == files


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xd8 no tar" * 100, bytes(511), b"\x1f\x8b" + bytes(600)])
def test_what_is_not_a_tar_is_an_error_that_names_the_url(fault_service: FaultService, content: bytes) -> None:
    with pytest.raises(tarfile.ReadError, match=fault_service.blob_url("data", "shard.tar")):
        list(expand(fault_service, content))


def test_a_tar_that_was_cut_anywhere_is_an_error(fault_service: FaultService) -> None:
    """In a header, in a file, between files, and before the end marker; it never ends silently."""
    packed = make_tar({"0.txt": b"x" * 700, "1.txt": b"y" * 10})
    end = 512 + 1024 + 512 + 512
    for cut in [1, 511, 512, 600, 1536, 1537, 2047, 2048, 2050, 2559, end]:
        with pytest.raises(tarfile.ReadError, match=r"url is (a truncated|not a) tar"):
            members(packed[:cut])
    assert len(members(packed[: end + 512])) == 2
    with pytest.raises(tarfile.ReadError, match=r"data/shard\.tar is a truncated tar"):
        list(expand(fault_service, packed[:1000]))


def test_a_cut_gzip_is_an_error() -> None:
    packed = make_tar({"0.bin": random.Random(0).randbytes(100_000)}, mode="w:gz")
    with pytest.raises(tarfile.ReadError, match="url: the compressed tar is truncated"):
        members(packed[:50_000])


def test_a_damaged_header_is_an_error() -> None:
    packed = bytearray(make_tar({"0.txt": b"x", "1.txt": b"y"}))
    packed[1024 + 20] ^= 1
    with pytest.raises(tarfile.ReadError, match="url is a damaged tar: the header at byte 1024 is wrong"):
        members(bytes(packed))


def header(kind: bytes = tarfile.REGTYPE, size: int = 0, pax: dict[str, str] | None = None) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size, info.pax_headers = kind, size, pax or {}
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (
            header(tarfile.XHDTYPE, 1 << 30),
            "the header at byte 0 is wrong: this extended header claims 1073741824 bytes",
        ),
        (header(size=1 << 62), "url is not a tar"),
        (header(pax={"size": "-1"}), "its size is '-1'"),
        (header(pax={"size": "9" * 19}), "its size is '9999999999999999999'"),
        (header(pax={"size": "9" * 5000}), "its size is '999999999999999999999999999999'"),
        (header(size=20 * MiB) + bytes(18 * MiB), "18874368 of 20971520 bytes into 'x'"),
    ],
    ids=["header", "size", "negative", "huge", "5,000 digits", "large and cut"],
)
def test_what_a_header_claims_is_checked(packed: bytes, words: str) -> None:
    with pytest.raises(tarfile.ReadError, match=words):
        members(packed)


def test_sizes_in_extended_headers_count() -> None:
    assert members(header(pax={"size": "5"}) + b"12345".ljust(512, b"\0") + bytes(1024)) == {"x": b"12345"}


def test_long_targets_of_links_are_passed_over() -> None:
    long_link = header(tarfile.GNUTYPE_LONGLINK, 200) + b"y" * 200 + bytes(312) + header(tarfile.SYMTYPE)
    assert members(long_link + make_tar({"0": b"data"})) == {"0": b"data"}


class Plain:
    """A stream that only has `read`, and fails at the end."""

    def __init__(self, data: bytes, error: OSError | None = None) -> None:
        self._data = io.BytesIO(data)
        self._error = error

    def read(self, size: int) -> bytes:
        data = self._data.read(size)
        if not data and self._error is not None:
            raise self._error
        return data


def test_a_stream_that_can_only_read_will_do() -> None:
    packed = make_tar({"0": b"data", "1": bytes(3 * MiB)})
    assert {member.name: member.data for member in walk(Plain(packed), "url")} == {"0": b"data", "1": bytes(3 * MiB)}


def test_an_error_of_the_stream_is_not_taken_for_one_of_the_tar() -> None:
    with pytest.raises(ConnectionResetError):
        list(walk(Plain(make_tar({"0": b"data"})[:512], ConnectionResetError(104, "reset")), "url"))


def test_an_error_in_a_worker_keeps_its_type_and_url(fault_service: FaultService) -> None:
    with pytest.raises(tarfile.ReadError, match=r"data/shard\.tar is not a tar"):
        list(DataLoader(expand(fault_service, b"no tar" * 1000).map(str), num_workers=1))


def test_text_is_not_a_tar() -> None:
    with pytest.raises(TypeError, match="url"):
        list(IterableWrapper([("url", io.StringIO("text"))]).expand_blob_tar())
    with pytest.raises(TypeError, match="url"):
        list(IterableWrapper([("url", "text")]).expand_blob_tar())


def test_a_blob_opened_as_text_is_not_a_tar(fault_service: FaultService) -> None:
    with pytest.raises(TypeError, match=r"data/shard\.tar: a tar needs a binary stream, not text"):
        list(expand(fault_service, make_tar({"0.bin": b"\xff" * 100}), mode="rt"))


# -- streams -----------------------------------------------------------------------------------------------------------


def test_streams_stay_readable_and_large_members_are_read_on_demand(fault_service: FaultService) -> None:
    """A member above 16 MiB is a file that reads from the blob; its bytes are fetched only on demand."""
    big = random.Random(0).randbytes(40 * MiB)
    packed = make_tar({"0.txt": b"first", "big.bin": big, "1.txt": b"last"})
    streams = {stream.name: stream for _, stream in expand(fault_service, packed, transfer=SMALL)}
    assert sum(request.sent for request in fault_service.requests("get_blob")) < 30 * MiB
    assert streams["1.txt"].read() == b"last"
    large = streams["big.bin"]
    assert large.seekable()
    assert large.seek(-5, 2) == len(big) - 5
    assert large.read() == big[-5:]
    large.seek(10 * MiB)
    assert large.read(100) == big[10 * MiB : 10 * MiB + 100]
    large.seek(0)
    assert large.read() == big
    assert large.read() == b""
    with pytest.raises(ValueError, match="negative position -1"):
        large.seek(-1)
    assert streams["0.txt"].read() == b"first"


def test_large_members_of_other_streams_go_through_a_file(tmp_path: Path) -> None:
    big = random.Random(1).randbytes(17 * MiB)
    packed = make_tar({"big.bin": big, "1.txt": b"last"})
    for content in (packed, gzip.compress(packed, 1)):
        streams = [stream for _, stream in IterableWrapper([("url", io.BytesIO(content))]).expand_blob_tar()]
        assert [stream.read() for stream in streams] == [big, b"last"]
    assert next(iter(IterableWrapper([("url", packed)]).expand_blob_tar()))[1].read() == big


def test_a_tar_that_is_overwritten_while_it_streams_is_an_error(fault_service: FaultService) -> None:
    packed = make_tar({f"{number}.bin": bytes(200_000) for number in range(100)})
    samples = iter(expand(fault_service, packed, transfer=TransferConfig(part_size=1 * MiB, read_ahead=0)))
    next(samples)
    fault_service.put("data", "shard.tar", packed)
    with pytest.raises(BlobChangedError, match=r"data/shard\.tar"):
        list(samples)


# -- samples -----------------------------------------------------------------------------------------------------------


def test_files_are_grouped_as_webdataset_does(container: Container) -> None:
    """The key ends at the first dot of the last segment; the extension is lower-case; a sample does not span tars."""
    one = {"a.b/0.jpg": b"0", "a.b/0.seg.PNG": b"1", "a.b/1.cls": b"2", "README": b"-", ".hidden": b"-", "x/.jpg": b"-"}
    container.put("one.tar", make_tar(one))
    container.put("two.TAR", make_tar({"a.b/1.cls": b"3"}))
    urls = [container.blob_url(name) for name in ("one.tar", "two.TAR")]
    source = IterableWrapper(urls).open_files_by_azure(credential=container.key)
    samples = [
        {"__key__": "a.b/0", "__url__": urls[0], "jpg": b"0", "seg.png": b"1"},
        {"__key__": "a.b/1", "__url__": urls[0], "cls": b"2"},
        {"__key__": "a.b/1", "__url__": urls[1], "cls": b"3"},
    ]
    assert list(source.expand_blob_tar().group_blob_samples()) == samples
    assert list(source.expand_blob_tar().map(read_stream).group_blob_samples()) == samples


def read_stream(file: tuple[str, Any]) -> tuple[str, bytes]:
    return file[0], file[1].read()


def test_what_is_about_the_tar_is_in_no_sample() -> None:
    """WebDataset stores metadata about the tar in folders with underscores around their names."""
    packed = make_tar({"__index__/all.json": b"-", "0.txt": b"0", "__x.txt": b"1", "a/__b__/2.txt": b"2"})
    samples = IterableWrapper([("url.tar", packed)]).expand_blob_tar().group_blob_samples()
    assert [(sample["__key__"], sample["txt"]) for sample in samples] == [
        ("0", b"0"),
        ("__x", b"1"),
        ("a/__b__/2", b"2"),
    ]


def test_blobs_that_are_in_no_tar_are_grouped_by_their_folder(container: Container) -> None:
    for name in ("x/0.jpg", "x/0.json", "y/0.json"):
        container.put(name, name.encode())
    listed = IterableWrapper([container.url]).list_files_by_azure(credential=container.key)
    assert list(listed.read_files_by_azure(credential=container.key).group_blob_samples()) == [
        {"__key__": "0", "__url__": f"{container.url}/x", "jpg": b"x/0.jpg", "json": b"x/0.json"},
        {"__key__": "0", "__url__": f"{container.url}/y", "json": b"y/0.json"},
    ]


def test_an_extension_twice_is_an_error() -> None:
    packed = make_tar({"0.jpg": b"0", "0.JPG": b"1"})
    with pytest.raises(ValueError, match=r"url\.tar/0\.JPG: the sample '0' has the extension 'jpg' twice"):
        list(IterableWrapper([("url.tar", packed)]).expand_blob_tar().group_blob_samples())


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_by_workers_each_sample_once(container: Container, workers: int) -> None:
    for shard in range(5):
        container.put(f"{shard}.tar", make_tar({f"{shard}-{number}.txt": b"x" for number in range(4)}))
    listed = IterableWrapper([container.url]).list_files_by_azure("*.tar", credential=container.key)
    opened = listed.shuffle().shard_blobs().open_files_by_azure(credential=container.key, prefetch=1)
    samples = opened.expand_blob_tar().group_blob_samples()
    keys = [sample["__key__"] for sample in DataLoader(samples, num_workers=workers, batch_size=None)]
    assert sorted(keys) == [f"{shard}-{number}" for shard in range(5) for number in range(4)]
