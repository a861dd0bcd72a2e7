"""What Python and its libraries expect from a binary file. Every implementation passes the same suite."""

from __future__ import annotations

import collections
import csv
import gzip
import io
import lzma
import pickle
import random
import shutil
import tarfile
import zipfile
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image


class Files(Protocol):
    """One file, with access to its bytes that bypasses the implementation."""

    def open(self, mode: str) -> Any:
        """The implementation under test: mode ``rb`` or ``wb``."""
        ...

    def put(self, data: bytes) -> None: ...

    def get(self) -> bytes: ...


TEXT = "".join(f"line {number} äöü€😀\n" for number in range(2000))
DATA = random.Random(0).randbytes(200_000)


class BinaryFileSuite:
    """Inherit from this suite and provide the fixture ``files``."""

    # -- as defined by Python

    @pytest.mark.parametrize("data", [b"", b"x", b"0123456789", DATA], ids=len)
    def test_reads_what_is_there(self, files: Files, data: bytes) -> None:
        files.put(data)
        with files.open("rb") as file:
            assert file.read() == data
            assert file.read() == b""
            assert file.read(5) == b""
            assert file.readline() == b""
            assert file.readinto(bytearray(5)) == 0
            assert list(file) == []

    @pytest.mark.parametrize("data", [b"", b"x", b"0123456789", DATA], ids=len)
    @pytest.mark.parametrize("step", [1, 3, 8192, 70_000, 10_000_000])
    def test_writes_what_it_is_given(self, files: Files, data: bytes, step: int) -> None:
        step = max(step, len(data) // 500)
        with files.open("wb") as file:
            for start in range(0, len(data), step):
                piece = data[start : start + step]
                assert file.write(piece) == len(piece)
                assert file.tell() == start + len(piece)
        assert files.get() == data

    def test_writing_replaces_all(self, files: Files) -> None:
        files.put(DATA)
        with files.open("wb") as file:
            file.write(b"short")
        assert files.get() == b"short"

    @pytest.mark.parametrize(
        ("offset", "whence", "place"),
        [
            (0, 0, 0),
            (5, 0, 5),
            (3, 1, 13),
            (-3, 1, 7),
            (0, 1, 10),
            (0, 2, 100),
            (-100, 2, 0),
            (-1, 2, 99),
            (50, 2, 150),
            (1000, 0, 1000),
        ],
    )
    def test_seeks(self, files: Files, offset: int, whence: int, place: int) -> None:
        files.put(DATA[:100])
        with files.open("rb") as file:
            file.seek(10)
            assert file.seek(offset, whence) == place
            assert file.tell() == place
            assert file.read(7) == DATA[:100][place : place + 7]

    @pytest.mark.parametrize(("offset", "whence"), [(-1, 0), (0, 7)])
    def test_does_not_seek_to_nowhere(self, files: Files, offset: int, whence: int) -> None:
        files.put(DATA[:100])
        with files.open("rb") as file:
            file.seek(10)
            with pytest.raises((ValueError, OSError)):
                file.seek(offset, whence)
            assert file.tell() == 10

    def test_reads_any_number_of_bytes(self, files: Files) -> None:
        files.put(DATA)
        with files.open("rb") as file:
            assert file.read(0) == b""
            assert file.read(10) == DATA[:10]
            assert len(file.read1(100)) in range(1, 101)
            file.seek(10)
            buffer = bytearray(20)
            assert file.readinto(buffer) == 20
            assert buffer == DATA[10:30]
            assert file.readinto(memoryview(buffer)[5:10]) == 5
            assert buffer[5:10] == DATA[30:35]
            assert file.read(None) == DATA[35:]

    @pytest.mark.parametrize("kind", ["int32", "float64"])
    def test_reads_into_arrays(self, files: Files, kind: str) -> None:
        values = np.arange(1000, dtype=kind)
        files.put(values.tobytes())
        target = np.zeros_like(values)
        with files.open("rb") as file:
            assert file.readinto(target) == values.nbytes
        assert (target == values).all()

    def test_reads_lines(self, files: Files) -> None:
        data = b"one\ntwo\n\nlast without end"
        files.put(data)
        lines = data.splitlines(keepends=True)
        with files.open("rb") as file:
            assert [file.readline(), file.readline(2), file.readline(-1)] == [b"one\n", b"tw", b"o\n"]
            file.seek(0)
            assert list(file) == lines
            file.seek(0)
            assert file.readlines() == lines
            file.seek(0)
            assert file.readlines(4) == lines[:1] or file.tell() > 0
            file.seek(0)
            assert next(file) == b"one\n"
            assert iter(file) is file
            assert file.read() == data[4:]

    def test_writes_lines(self, files: Files) -> None:
        with files.open("wb") as file:
            file.writelines([b"one\n", bytearray(b"two"), memoryview(b"three")])
            file.writelines(iter([b"four"]))
        assert files.get() == b"one\ntwothreefour"

    @pytest.mark.parametrize(
        "data",
        [
            bytearray(b"bytearray"),
            memoryview(b"memoryview"),
            memoryview(b"0123456789")[2:5],
            memoryview(np.arange(10, dtype=np.int64)),
            np.arange(10, dtype=np.float32),
            np.arange(20, dtype=np.int16).reshape(4, 5),
            np.zeros((0, 3)),
            np.array(7, dtype=np.int64),
        ],
        ids=lambda data: f"{type(data).__name__}-{memoryview(data).nbytes}",
    )
    def test_writes_the_bytes_of_any_buffer(self, files: Files, data: Any) -> None:
        """Bytes, not elements."""
        with files.open("wb") as file:
            assert file.write(data) == memoryview(data).nbytes
        assert files.get() == memoryview(data).tobytes()

    @pytest.mark.parametrize("data", ["text", None, 5, ["x"], 1.5])
    def test_takes_nothing_but_bytes(self, files: Files, data: Any) -> None:
        with files.open("wb") as file:
            with pytest.raises(TypeError):
                file.write(data)
            file.write(b"good")
        assert files.get() == b"good"

    def test_is_closed_once_and_for_all(self, files: Files) -> None:
        files.put(DATA)
        for mode in ("rb", "wb"):
            file = files.open(mode)
            assert not file.closed
            file.close()
            assert file.closed
            file.close()
            operations = {
                "rb": ["read", "readline", "tell", "readable", "seekable", "__enter__", "__next__"],
                "wb": ["tell", "flush", "writable", "__enter__"],
            }
            for name in operations[mode]:
                with pytest.raises(ValueError, match=r"closed|uninitialized"):
                    getattr(file, name)()
            with pytest.raises(ValueError, match="closed"):
                file.write(b"x") if mode == "wb" else file.seek(0)

    def test_leaves_its_block_closed(self, files: Files) -> None:
        files.put(DATA)
        with files.open("rb") as file:
            pass
        assert file.closed

    def test_is_a_buffered_file(self, files: Files) -> None:
        files.put(DATA)
        with files.open("rb") as file:
            assert isinstance(file, io.BufferedIOBase)
            assert file.readable()
            assert file.seekable()
            assert not file.isatty()
            with pytest.raises(io.UnsupportedOperation):
                io.BufferedIOBase.detach(file)

    # -- as used by libraries

    @pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
    def test_torch(self, files: Files, new_format: bool) -> None:
        state = {
            "weight": torch.arange(30_000, dtype=torch.float32).reshape(100, 300),
            "half": torch.ones(7, dtype=torch.bfloat16),
            "view": torch.arange(100)[10:20],
            "empty": torch.empty(0),
            "step": 7,
        }
        with files.open("wb") as file:
            torch.save(state, file, _use_new_zipfile_serialization=new_format)
        for options in ({"weights_only": True}, {"weights_only": True, "mmap": False}, {"map_location": "cpu"}):
            with files.open("rb") as file:
                loaded = torch.load(file, **options)
            assert loaded.keys() == state.keys()
            assert all(torch.equal(loaded[key], state[key]) for key in ("weight", "half", "view", "empty"))  # type: ignore[arg-type]

    def test_several_torch_objects_in_a_row(self, files: Files) -> None:
        with files.open("wb") as file:
            for number in range(3):
                torch.save({"n": number}, file, _use_new_zipfile_serialization=False)
        with files.open("rb") as file:
            assert [torch.load(file)["n"] for _ in range(3)] == [0, 1, 2]

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP"])
    def test_pillow(self, files: Files, form: str) -> None:
        image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
        with files.open("wb") as file:
            image.save(file, form)
        with files.open("rb") as file:
            loaded = Image.open(file)
            loaded.load()
        assert loaded.size == (64, 64)
        if form != "JPEG":
            assert loaded.tobytes() == image.tobytes()

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_zipfile(self, files: Files, compression: int) -> None:
        with files.open("wb") as file, zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr("a/ä.txt", TEXT)
            with archive.open("data", "w") as member:
                member.write(DATA)
        with files.open("rb") as file, zipfile.ZipFile(file) as archive:
            assert archive.namelist() == ["a/ä.txt", "data"]
            assert archive.read("data") == DATA
            assert archive.read("a/ä.txt").decode() == TEXT
            with archive.open("data") as member:
                member.seek(1000)
                assert member.read(10) == DATA[1000:1010]
            assert archive.testzip() is None

    @pytest.mark.parametrize("form", ["", ":gz", ":xz", "|", "|gz"])
    def test_tarfile(self, files: Files, form: str) -> None:
        with files.open("wb") as file, tarfile.open(fileobj=file, mode=f"w{form}") as archive:
            for number, data in enumerate((DATA, b"", b"x" * 513)):
                member = tarfile.TarInfo(f"folder/{number}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        with files.open("rb") as file, tarfile.open(fileobj=file, mode=f"r{form}") as archive:
            sizes = []
            for member in archive:
                extracted = archive.extractfile(member)
                assert extracted is not None
                sizes.append(len(extracted.read()))
        assert sizes == [len(DATA), 0, 513]

    def test_gzip(self, files: Files) -> None:
        with files.open("wb") as file, gzip.open(file, "wt", encoding="utf-8") as text:
            text.write(TEXT)
        with files.open("rb") as file, gzip.open(file, "rt", encoding="utf-8") as text:
            assert text.read() == TEXT

    def test_lzma(self, files: Files) -> None:
        with files.open("wb") as file, lzma.open(file, "wb") as packed:
            packed.write(DATA)
        with files.open("rb") as file, lzma.open(file, "rb") as packed:
            assert packed.read() == DATA

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("kind", ["<f4", ">i8", "bool", "datetime64[s]", "S5"])
    def test_numpy(self, files: Files, kind: str, order: Any) -> None:
        array = np.asarray(np.arange(6000).reshape(60, 100).astype(kind), order=order)
        with files.open("wb") as file:
            np.save(file, array)
            np.save(file, array[::2, ::3])
        with files.open("rb") as file:
            assert (np.load(file) == array).all()
            assert (np.load(file) == array[::2, ::3]).all()

    def test_numpy_archives(self, files: Files) -> None:
        with files.open("wb") as file:
            np.savez_compressed(file, a=np.arange(1000), b=np.eye(10))
        with files.open("rb") as file, np.load(file) as archive:
            assert (archive["b"] == np.eye(10)).all()
            assert (archive["a"] == np.arange(1000)).all()

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickle(self, files: Files, protocol: int) -> None:
        value = {"bytes": DATA, "bytearray": bytearray(DATA[:1000]), "array": np.arange(10_000), "text": TEXT}
        with files.open("wb") as file:
            pickle.dump(value, file, protocol)
            pickle.dump(collections.OrderedDict(a=1), file, protocol)
        with files.open("rb") as file:
            loaded = pickle.load(file)
            assert pickle.load(file) == {"a": 1}
        assert all(loaded[key] == value[key] for key in ("bytes", "bytearray", "text"))
        assert (loaded["array"] == value["array"]).all()

    def test_parquet_with_pandas(self, files: Files) -> None:
        frame = pd.DataFrame({"number": range(5000), "text": [f"row {number}" for number in range(5000)]})
        with files.open("wb") as file:
            frame.to_parquet(file)
        with files.open("rb") as file:
            assert pd.read_parquet(file).equals(frame)
        with files.open("rb") as file:
            assert list(pd.read_parquet(file, columns=["number"])["number"]) == list(range(5000))

    def test_parquet_with_pyarrow(self, files: Files) -> None:
        table = pa.table({"number": list(range(5000)), "square": [number**2 for number in range(5000)]})
        with files.open("wb") as file:
            pq.write_table(table, file, row_group_size=1000)
        with files.open("rb") as file:
            parquet = pq.ParquetFile(file)
            assert parquet.num_row_groups == 5
            assert parquet.read_row_group(3, columns=["square"])["square"][0].as_py() == 3000**2
            assert parquet.read().equals(table)

    def test_csv_with_pandas(self, files: Files) -> None:
        frame = pd.DataFrame({"a": range(100), "b": ["ä,b"] * 100})
        with files.open("wb") as file:
            frame.to_csv(file, index=False)
        with files.open("rb") as file:
            assert pd.read_csv(file).equals(frame)

    def test_text(self, files: Files) -> None:
        with io.TextIOWrapper(files.open("wb"), encoding="utf-8", newline="") as text:
            text.write(TEXT)
            csv.writer(text).writerow(["a", "b,c"])
        assert files.get() == TEXT.encode() + b'a,"b,c"\r\n'
        with io.TextIOWrapper(files.open("rb"), encoding="utf-8") as text:
            assert [text.readline() for _ in range(3)] == TEXT.splitlines(keepends=True)[:3]
            cookie = text.tell()
            rest = text.read()
            text.seek(cookie)
            assert text.read() == rest == "".join(TEXT.splitlines(keepends=True)[3:]) + 'a,"b,c"\n'

    def test_copying(self, files: Files) -> None:
        with files.open("wb") as file:
            shutil.copyfileobj(io.BytesIO(DATA), file)
        target = io.BytesIO()
        with files.open("rb") as file:
            shutil.copyfileobj(file, target)
        assert target.getvalue() == files.get() == DATA
