"""Our writer and reader, those of torch, and one of each pass the same suite, since they share one format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from azstoragetorch import TransferConfig
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter
from tests.azurite.container import Container
from tests.conformance.checkpoint_storage import CheckpointStorageSuite, Door, Place
from tests.faults import FaultService
from tests.support import QUICK


@dataclass
class Folder:
    """Files, with torch's writer and reader."""

    path: Path

    def writer(self, folder: str = "run", **options: Any) -> Any:
        return dcp.FileSystemWriter(self.path / folder, **options)

    def reader(self, folder: str = "run") -> Any:
        return dcp.FileSystemReader(self.path / folder)

    def writer_id(self, folder: str) -> str:
        return str(self.path / folder)

    reader_id = writer_id

    def carry(self) -> None: ...

    def names(self, folder: str = "run") -> list[str]:
        return [path.name for path in (self.path / folder).iterdir()]

    def get(self, name: str, folder: str = "run") -> bytes:
        return (self.path / folder / name).read_bytes()

    def put(self, name: str, data: bytes, folder: str = "run") -> None:
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        (self.path / folder / name).write_bytes(data)

    def remove(self, name: str, folder: str = "run") -> None:
        (self.path / folder / name).unlink()

    def folders(self) -> list[str]:
        return [path.name for path in self.path.iterdir()] if self.path.exists() else []


@dataclass
class Blobs:
    """Blobs, with our writer and reader."""

    url: str
    credential: Any = False
    transfer: TransferConfig | None = None

    def writer(self, folder: str = "run", **options: Any) -> Any:
        return BlobStorageWriter(
            self.writer_id(folder),
            credential=self.credential,
            transfer=self.transfer,
            blobs_per_rank=1,
            **options,
        )

    def reader(self, folder: str = "run") -> Any:
        return BlobStorageReader(self.writer_id(folder), credential=self.credential, transfer=self.transfer)

    def writer_id(self, folder: str) -> str:
        return f"{self.url}/{folder}"

    reader_id = writer_id


@dataclass
class BlobDoor:
    """Bypasses our code: *list* returns the names of all blobs."""

    list: Callable[[], list[str]]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], object]
    delete: Callable[[str], object]

    def carry(self) -> None: ...

    def names(self, folder: str = "run") -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in self.list() if name.startswith(f"{folder}/")]

    def get(self, name: str, folder: str = "run") -> bytes:
        return self.read(f"{folder}/{name}")

    def put(self, name: str, data: bytes, folder: str = "run") -> None:
        self.write(f"{folder}/{name}", data)

    def remove(self, name: str, folder: str = "run") -> None:
        self.delete(f"{folder}/{name}")

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.list()})


@dataclass
class Crossed:
    """Written by one implementation, read by another."""

    written: Any
    read: Any

    def writer(self, folder: str = "run", **options: Any) -> Any:
        return self.written.writer(folder, **options)

    def reader(self, folder: str = "run") -> Any:
        return self.read.reader(folder)

    def writer_id(self, folder: str) -> str:
        return str(self.written.writer_id(folder))

    def reader_id(self, folder: str) -> str:
        return str(self.read.reader_id(folder))


class CrossedDoor:
    """Access to what is read; `carry` copies what was written, like a download or an upload."""

    def __init__(self, written: Any, read: Any) -> None:
        self._written, self._read = written, read
        self.names, self.get, self.put, self.remove = read.names, read.get, read.put, read.remove

    def carry(self) -> None:
        for folder in self._written.folders():
            names = self._written.names(folder)
            for name in names:
                self._read.put(name, self._written.get(name, folder), folder)
            for name in set(self._read.names(folder)) - set(names):
                self._read.remove(name, folder)


@pytest.fixture
def blob_door(fault_service: FaultService) -> BlobDoor:
    service = fault_service
    service.create_container("c")
    return BlobDoor(
        partial(service.names, "c"), partial(service.get, "c"), partial(service.put, "c"), partial(service.delete, "c")
    )


@pytest.fixture
def blobs(fault_service: FaultService, blob_door: BlobDoor) -> Blobs:
    return Blobs(fault_service.container_url("c"), transfer=QUICK)


class TestTorchsFileSystem(CheckpointStorageSuite):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return Folder(tmp_path)

    @pytest.fixture
    def door(self, tmp_path: Path) -> Door:
        return Folder(tmp_path)


class TestBlobStorage(CheckpointStorageSuite):
    """On the fault service, with the smallest parts and blocks."""

    @pytest.fixture
    def place(self, blobs: Blobs) -> Place:
        return blobs

    @pytest.fixture
    def door(self, blob_door: BlobDoor) -> Door:
        return blob_door


@pytest.mark.slow
class TestBlobStorageOnAzurite(CheckpointStorageSuite):
    """On Azurite, with the default configuration."""

    @pytest.fixture
    def place(self, container: Container) -> Place:
        return Blobs(container.url, container.sas_credential)

    @pytest.fixture
    def door(self, container: Container) -> Door:
        return BlobDoor(container.names, container.get, container.put, container.client.delete_blob)


class TestWrittenByTorch(CheckpointStorageSuite):
    """An uploaded checkpoint of torch's writer."""

    @pytest.fixture
    def place(self, tmp_path: Path, blobs: Blobs) -> Place:
        return Crossed(Folder(tmp_path), blobs)

    @pytest.fixture
    def door(self, tmp_path: Path, blob_door: BlobDoor) -> Door:
        return CrossedDoor(Folder(tmp_path), blob_door)


class TestReadByTorch(CheckpointStorageSuite):
    """A downloaded checkpoint of our writer."""

    @pytest.fixture
    def place(self, tmp_path: Path, blobs: Blobs) -> Place:
        return Crossed(blobs, Folder(tmp_path))

    @pytest.fixture
    def door(self, tmp_path: Path, blob_door: BlobDoor) -> Door:
        return CrossedDoor(blob_door, Folder(tmp_path))
