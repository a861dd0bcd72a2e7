"""Tars as other programs write them: old checksums, padded records, sparse files, all compressions.

Whatever GNU tar and Python's tarfile read is read, byte for byte; inconsistent tars raise an error that says why.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import azstoragetorch.datapipes  # noqa: F401 - registers the functional names
from azstoragetorch._samples.tar import walk
from azstoragetorch.datapipes._base import IterableWrapper
from azstoragetorch.io import BlobIO
from tests.faults import FaultService
from tests.test_datapipes_tar import Plain, make_tar, members, read_stream

MiB = 1 << 20
BLOCK = 512


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK)


def file(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def with_checksum(header: bytes, *, is_signed: bool = False, form: bytes = b"%06o\0 ") -> bytes:
    counted = header[:148] + b" " * 8 + header[156:]
    total = sum(counted) - (256 * sum(byte > 127 for byte in counted) if is_signed else 0)
    return header[:148] + form % total + header[156:]


END = bytes(2 * BLOCK)


# -- headers -----------------------------------------------------------------------------------------------------------


def test_records_padded_with_nuls_are_read() -> None:
    packed = pax(record("path", "long/name") + bytes(40)) + file("x", b"data") + END
    assert members(packed) == {"long/name": b"data"}


def test_a_checksum_over_signed_bytes_is_right() -> None:
    """Some old systems sum the bytes of a header as signed characters; GNU tar accepts both sums."""
    block = with_checksum(file("größe.txt", b"")[:BLOCK], is_signed=True)
    assert block != file("größe.txt", b"")
    assert members(block + END) == {"größe.txt": b""}
    wrong = block[:20] + b"!" + block[21:]
    with pytest.raises(tarfile.ReadError, match="url is not a tar"):
        members(wrong + END)


@pytest.mark.parametrize(
    "size", [b"00000000004\0", b"4\0garbage!!!", b"      4 \0\0\0\0", b"00000000004 ", b"4\0000000\0\0\0\0\0"]
)
def test_a_size_ends_at_its_nul(size: bytes) -> None:
    whole = file("x", b"data")
    header = with_checksum(whole[:124] + size.ljust(12, b"\0")[:12] + whole[136:BLOCK])
    assert members(header + whole[BLOCK:] + END) == {"x": b"data"}


def test_a_name_that_looks_like_a_compressed_stream_is_a_name() -> None:
    for name in ("BZh9.txt", "](", "PK"):
        assert members(file(name, b"data") + END) == {name: b"data"}


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 5000 + b" path=x\n",
        b"0 path=x\n",
        b"99 path=x\n",
        b"10 path=xy",
        b"8 path\nx\n",
        b" path=x\n",
        b"\xd9\xa3 path=x\n",
        record("path", "x") + b"-1 a=b\n",
    ],
)
def test_records_that_are_damaged_are_an_error(records: bytes) -> None:
    with pytest.raises(
        tarfile.ReadError, match=r"url is a damaged tar: the header at byte 0 is wrong: (a|the length of a) record"
    ):
        members(pax(records) + file("x", b"data") + END)


def test_records_of_other_programs_cost_no_memory() -> None:
    """A thousand headers with unknown keys, and a path that is reset."""
    others = b"".join(pax(record(f"vendor.{n}", "v" * 600), tarfile.XGLTYPE) for n in range(1000))
    packed = others + pax(record("path", "all"), tarfile.XGLTYPE) + file("x", b"1")
    packed += pax(record("path", "")) + file("y", b"2") + END
    assert members(packed) == {"all": b"1", "y": b"2"}


# -- holes -------------------------------------------------------------------------------------------------------------

SPARSE_FORMS = {
    "old": ["--format=gnu"],
    "0.0": ["--format=posix", "--sparse-version=0.0"],
    "0.1": ["--format=posix", "--sparse-version=0.1"],
    "1.0": ["--format=posix", "--sparse-version=1.0"],
}
CONTENTS: dict[str, tuple[int, list[int]]] = {  # size, and the offsets of 4 KiB of data
    "all-hole": (3 * MiB, []),
    "one": (1 * MiB, [512 * 1024]),
    "at-the-end": (1 * MiB, [MiB - 4096]),
    "at-the-start": (1 * MiB + 5, [0]),
    "many": (8 * MiB, list(range(0, 8 * MiB, 128 * 1024))),
    "large": (40 * MiB, [0, 20 * MiB, 40 * MiB - 4096]),
}


@pytest.fixture(scope="module")
def holes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder of sparse files, and their contents."""
    folder = tmp_path_factory.mktemp("holes")
    (folder / "0-plain.txt").write_bytes(b"before")
    for name, (size, places) in CONTENTS.items():
        with (folder / name).open("wb") as out:
            out.truncate(size)
            for place in places:
                out.seek(place)
                out.write(place.to_bytes(4, "big") * 1023 + b"last")
    (folder / "z-plain.txt").write_bytes(b"after")
    return folder, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_holes_are_filled_with_zeros(holes: tuple[Path, dict[str, bytes]], form: str) -> None:
    """Each sparse format of GNU tar, packed by GNU tar itself; the files around them are also right."""
    folder, contents = holes
    command = ["tar", "-S", *SPARSE_FORMS[form], "--sort=name", "-cf", "-", "-C", folder, *contents]
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(packed) < 4 * MiB
    found = members(packed)
    assert list(found) == list(contents)
    for name, data in contents.items():
        assert found[name] == data, name


def sparse(size: int, numbers: list[int], data: bytes) -> bytes:
    fields = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "x",
        "GNU.sparse.realsize": str(size),
    }
    lines = b"".join(b"%d\n" % number for number in numbers)
    return (
        pax(b"".join(itertools.starmap(record, fields.items())))
        + file("y", lines + bytes(-len(lines) % BLOCK) + data)
        + END
    )


def sparse_old(size: bytes, pieces: list[tuple[bytes, bytes]], has_more: int, data: bytes) -> bytes:
    block = bytearray(file("x", bytes(len(data)), tarfile.GNUTYPE_SPARSE)[:BLOCK])
    block[386:482] = b"".join(part for piece in pieces for part in piece).ljust(96, b"\0")
    block[482] = has_more
    block[483:495] = size
    return with_checksum(bytes(block)) + data


def octal(number: int) -> bytes:
    return b"%011o\0" % number


def test_bytes_behind_the_pieces_of_a_sparse_file_are_passed_over() -> None:
    assert members(sparse(8, [1, 2, 3], b"abc+more")) == {"x": b"\0\0abc\0\0\0"}
    assert members(sparse_old(octal(8), [(octal(2), octal(3))], 0, b"abc".ljust(BLOCK, b"\0")) + END) == {
        "x": b"\0\0abc\0\0\0"
    }


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (sparse(8, [2, 4, 2, 0, 2], b"abcd"), "its map of holes is not in order"),
        (sparse(8, [1, 7, 2], b"ab"), "its map of holes ends at byte 9 of 8"),
        (sparse(8, [1, 0, 5], b"ab"), "describes more than the 2 bytes that are stored"),
        (sparse(8, [1 << 40, 0, 5], b"ab"), "its map of holes does not end"),
        (sparse(8, [], b"x" * 2000), "its map of holes does not end"),
        (sparse(1 << 59, [1, 0, 2], b"ab"), "which no temporary file can hold"),
        (sparse(1 << 61, [1, 0, 2], b"ab"), "its size with holes is '2305843009213693952'"),
        (pax(record("GNU.sparse.major", "2")) + file("x", b""), "unknown version '2'.''"),
        (pax(record("GNU.sparse.map", "0,5,7") + record("GNU.sparse.size", "9")) + file("x", b""), "without a"),
        (pax(record("GNU.sparse.map", "9" * 5000) + record("GNU.sparse.size", "9")) + file("x", b""), "map of holes"),
        (pax(record("GNU.sparse.map", "0,5")) + file("x", b"12345"), "its size with holes is ''"),
        (pax(record("GNU.sparse.numbytes", "5") + record("GNU.sparse.offset", "0")) + file("x", b""), "not in order"),
        (sparse_old(octal(8), [(b"99999999999\0", octal(3))], 0, bytes(BLOCK)), "impossible number"),
        (sparse_old(b"\xff" * 12, [], 0, b""), "impossible number"),
        (sparse_old(octal(8), [], 1, (bytes(504) + b"\1" + bytes(7)) * 7000), "its map of holes does not end"),
    ],
)  # fmt: skip
def test_a_map_of_holes_that_cannot_be_is_an_error(packed: bytes, words: str) -> None:
    with pytest.raises(tarfile.ReadError, match=f"url is a damaged tar: the header at byte .*{words}"):
        members(packed)


# -- compressed tars ---------------------------------------------------------------------------------------------------

PLAIN = {"0.txt": b"first", "1.bin": os.urandom(300_000), "2.bin": bytes(5 * MiB), "3.txt": b"last"}


def zstd_compress(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd", reason="the extra zstd is not installed")
    packed: bytes = zstd.compress(data)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "zst": zstd_compress,
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("trailing", [b"", bytes(700), b"\x1f", b"signature" * 100, b"\0\0not zeros"])
def test_bytes_behind_a_compressed_tar_are_ignored(packer: str, trailing: bytes) -> None:
    assert members(PACKERS[packer](make_tar(PLAIN)) + trailing) == PLAIN


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz", "zst"])
def test_a_tar_compressed_in_several_streams_is_one(packer: str) -> None:
    """As written by pigz, pbzip2, ``xz -T`` and pzstd, or by ``cat``; also with zeros between them."""
    packed = make_tar(PLAIN)
    pack = PACKERS[packer]
    assert members(pack(packed[:1000]) + pack(packed[1000:400_000]) + bytes(8) + pack(packed[400_000:])) == PLAIN


def test_a_frame_that_is_to_be_skipped_may_come_first() -> None:
    """As written by pzstd."""
    frame = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"\1\2\3\4"
    assert members(frame + zstd_compress(make_tar(PLAIN))) == PLAIN


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compressed_stream_need_not_seek(packer: str) -> None:
    packed = PACKERS[packer](make_tar({"0": b"data"}))
    assert {member.name: member.data for member in walk(Plain(packed), "url")} == {"0": b"data"}


@pytest.mark.parametrize("packer", PACKERS)
def test_a_compressed_tar_that_was_cut_or_changed_is_an_error(packer: str) -> None:
    packed = PACKERS[packer](make_tar({"0.bin": os.urandom(100_000)}))
    for cut in (3, 20, 1000, len(packed) // 2, len(packed) - 600):
        with pytest.raises(tarfile.ReadError, match="url"):
            members(packed[:cut])
    changed = bytearray(packed)
    changed[len(packed) // 3] ^= 0xFF
    changed[len(packed) // 3 + 1] ^= 0xFF
    if packer in ("gz", "bz2", "xz"):  # the others have no checksum by default
        with pytest.raises(tarfile.ReadError, match="url"):
            members(bytes(changed))


def test_a_window_that_memory_has_no_room_for_is_an_error() -> None:
    """Four bytes of an lzma header request 4 GiB."""
    packed = b"\x5d\0\0\0\xf0" + b"\xff" * 8 + PACKERS["lzma"](make_tar({"0": b"data"}))[13:]
    with pytest.raises(tarfile.ReadError, match=r"url: the compressed tar is truncated or damaged \(lzma\)"):
        members(packed)


WITHOUT = """
import importlib.abc, io, sys, tarfile
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {"_lzma", "_bz2", "lzma", "bz2", "backports.zstd", "compression.zstd", "_zstd"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
for name in ("_lzma", "_bz2", "lzma", "bz2"):
    sys.modules.pop(name, None)
import azstoragetorch.datapipes
from azstoragetorch._samples.tar import walk
assert not {"lzma", "bz2"} & set(sys.modules)
for begin in (b"BZh9", b"\\xfd7zXZ\\0", b"\\x5d\\0\\0\\0\\4", b"\\x28\\xb5\\x2f\\xfd"):
    try:
        list(walk(io.BytesIO(begin + bytes(600)), "url"))
    except tarfile.CompressionError as error:
        print(error)
"""


def test_a_python_without_lzma_and_bz2_reads_other_tars() -> None:
    """`import azstoragetorch.datapipes` works; only a tar that needs the module is an error that says what to do."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "url: the tar is compressed by bzip2: use a Python that was built with the module bz2",
        "url: the tar is compressed by xz: use a Python that was built with the module lzma",
        "url: the tar is compressed by lzma: use a Python that was built with the module lzma",
        "url: the tar is compressed by zstd: pip install backports.zstd",
    ]


# -- openings ----------------------------------------------------------------------------------------------------------


def test_a_tar_opened_twice_in_a_row_gives_its_samples_twice() -> None:
    """As in WebDataset; also a tar with one sample, and after a map that passes the path on."""
    packed = make_tar({"0.jpg": b"0", "0.cls": b"1"})
    sample = {"__key__": "0", "__url__": "url.tar", "jpg": b"0", "cls": b"1"}
    expanded = IterableWrapper([("url.tar", packed)] * 3).expand_blob_tar()
    assert list(expanded.group_blob_samples()) == [sample] * 3
    assert list(expanded.map(read_stream).group_blob_samples()) == [sample] * 3


def test_different_halves_of_a_sample_in_two_tars_of_one_name_stay_apart() -> None:
    source = IterableWrapper([("u.tar", make_tar({"0.jpg": b"0"})), ("u.tar", make_tar({"0.cls": b"1"}))])
    samples = list(source.expand_blob_tar().group_blob_samples())
    assert [set(sample) - {"__key__", "__url__"} for sample in samples] == [{"jpg"}, {"cls"}]


def test_a_tar_that_begins_in_mid_blob_is_read_from_there(fault_service: FaultService) -> None:
    """Large members are read from their position in the blob, wherever the stream started."""
    big = os.urandom(17 * MiB)
    fault_service.put("data", "behind.bin", b"#" * 1000 + make_tar({"big.bin": big, "1.txt": b"last"}))
    with BlobIO(fault_service.blob_url("data", "behind.bin"), "rb", credential=False) as blob:
        blob.seek(1000)
        streams = [stream for _, stream in IterableWrapper([("url", blob)]).expand_blob_tar()]
        assert [stream.read() for stream in streams] == [big, b"last"]
