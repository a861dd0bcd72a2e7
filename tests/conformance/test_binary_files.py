"""`BlobIO` is a binary file like `io.BytesIO` and a local file: all pass the same suite."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from azstoragetorch import TransferConfig
from azstoragetorch.io import BlobIO
from tests.azurite.container import Container
from tests.conformance.binary_files import BinaryFileSuite, Files
from tests.faults import FaultService
from tests.support import QUICK


@dataclass
class LocalFiles:
    path: Path

    def open(self, mode: str) -> Any:
        return self.path.open(mode)

    def put(self, data: bytes) -> None:
        self.path.write_bytes(data)

    def get(self) -> bytes:
        return self.path.read_bytes()


class MemoryFiles:
    data = b""

    def open(self, mode: str) -> Any:
        if mode == "rb":
            return io.BytesIO(self.data)
        files = self

        class Kept(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    files.data = self.getvalue()
                super().close()

        return Kept()

    def put(self, data: bytes) -> None:
        self.data = data

    def get(self) -> bytes:
        return self.data


@dataclass
class ServiceBlobs:
    """On the fault service, with the smallest parts and blocks."""

    service: FaultService
    transfer: TransferConfig = QUICK

    def open(self, mode: Any) -> BlobIO:
        return BlobIO(self.service.blob_url("c", "b"), mode, credential=False, transfer=self.transfer)

    def put(self, data: bytes) -> None:
        self.service.put("c", "b", data)

    def get(self) -> bytes:
        return self.service.get("c", "b")


@dataclass
class AzuriteBlobs:
    """On Azurite, with the default configuration."""

    container: Container

    def open(self, mode: Any) -> BlobIO:
        return BlobIO(self.container.blob_sas_url("b"), mode)

    def put(self, data: bytes) -> None:
        self.container.put("b", data)

    def get(self) -> bytes:
        return self.container.get("b")


class TestLocalFile(BinaryFileSuite):
    @pytest.fixture
    def files(self, tmp_path: Path) -> Files:
        return LocalFiles(tmp_path / "file")


class TestBytesIO(BinaryFileSuite):
    @pytest.fixture
    def files(self) -> Files:
        return MemoryFiles()


class TestBlobIO(BinaryFileSuite):
    @pytest.fixture
    def files(self, fault_service: FaultService) -> Files:
        fault_service.create_container("c")
        return ServiceBlobs(fault_service)


class TestBlobIOOnAzurite(BinaryFileSuite):
    @pytest.fixture
    def files(self, container: Container) -> Files:
        return AzuriteBlobs(container)
