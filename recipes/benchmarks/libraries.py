"""The libraries that are compared, each used as its own documentation shows it, with 16 requests at once where it asks.

This runs in the virtual environment of one library and imports no other. A method that a library has no counterpart
for is missing from its class, and shows as a dash in the report.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONCURRENCY = 16  # of one transfer: the default of azstoragetorch, and what the others are told
SAMPLES_AT_ONCE = 32
BATCH = 32
MiB = 1 << 20
RANGE = 16 << 10  # bytes of a small range


@dataclass(frozen=True)
class Place:
    """A container, and the SAS that opens it; without one it is open to everybody."""

    account_url: str
    container: str
    sas: str | None

    @property
    def url(self) -> str:
        return f"{self.account_url}/{self.container}"


class _BlobIO:
    """What both packages called azstoragetorch have."""

    def __init__(self, place: Place) -> None:
        from azure.core.credentials import AzureSasCredential

        self.place = place
        self.options: dict[str, Any] = {"credential": AzureSasCredential(place.sas) if place.sas else False}

    def open(self, name: str, mode: Any) -> Any:
        from azstoragetorch.io import BlobIO

        return BlobIO(f"{self.place.url}/{name}", mode, **self.options)

    def read(self, name: str) -> int:
        with self.open(name, "rb") as blob:
            return len(blob.read())

    def stream(self, name: str) -> int:
        total = 0
        with self.open(name, "rb") as blob:
            while data := blob.read(MiB):
                total += len(data)
        return total

    def write(self, name: str, data: bytes) -> None:
        with self.open(name, "wb") as blob:
            blob.write(data)

    def save(self, name: str, state: dict[str, Any]) -> None:
        import torch

        with self.open(name, "wb") as blob:
            torch.save(state, blob)

    def load(self, name: str) -> dict[str, Any]:
        import torch

        with self.open(name, "rb") as blob:
            return torch.load(blob)

    def samples(self, prefix: str) -> int:
        from torch.utils.data import DataLoader

        from azstoragetorch.datasets import IterableBlobDataset

        dataset = IterableBlobDataset.from_container_url(self.place.url, prefix=prefix, **self.options)
        return sum(
            len(sample["data"]) for batch in DataLoader(dataset, batch_size=BATCH, collate_fn=list) for sample in batch
        )

    def names(self, prefix: str) -> int:
        from azstoragetorch.datasets import BlobDataset

        return len(BlobDataset.from_container_url(self.place.url, prefix=prefix, **self.options))


class Published(_BlobIO):
    requirements = ("azstoragetorch==0.2.0",)
    title = "azstoragetorch 0.2"


class Ours(_BlobIO):
    requirements = ()
    title = "azstoragetorch"

    def read_with(self, name: str, concurrency: int) -> int:
        from azstoragetorch import TransferConfig
        from azstoragetorch.io import BlobIO

        transfer = TransferConfig(max_concurrency=concurrency)
        with BlobIO(f"{self.place.url}/{name}", "rb", transfer=transfer, **self.options) as blob:
            return len(blob.read())

    def checkpoint_save(self, name: str, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        from azstoragetorch.checkpoint import BlobStorageWriter

        dcp.save(state, storage_writer=BlobStorageWriter(f"{self.place.url}/{name}", **self.options), no_dist=True)

    def checkpoint_load(self, name: str, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        from azstoragetorch.checkpoint import BlobStorageReader

        dcp.load(state, storage_reader=BlobStorageReader(f"{self.place.url}/{name}", **self.options), no_dist=True)

    def save_tensors(self, name: str, state: dict[str, Any]) -> None:
        from azstoragetorch.safetensors import save_file

        save_file(state, f"{self.place.url}/{name}", **self.options)

    def tensors(self, name: str) -> dict[str, Any]:
        from azstoragetorch.safetensors import load_file

        return load_file(f"{self.place.url}/{name}", **self.options)

    def tensors_into(self, name: str, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        from azstoragetorch.safetensors import HuggingFaceBlobReader

        folder = f"{self.place.url}/{name.rpartition('/')[0]}"
        dcp.load(state, storage_reader=HuggingFaceBlobReader(folder, **self.options), no_dist=True)


class Sdk:
    requirements = ("azure-storage-blob", "safetensors")
    title = "azure-storage-blob"

    def __init__(self, place: Place) -> None:
        from azure.core.credentials import AzureSasCredential
        from azure.storage.blob import ContainerClient

        credential = AzureSasCredential(place.sas) if place.sas else None
        self.container = ContainerClient(place.account_url, place.container, credential=credential)

    def read(self, name: str) -> int:
        return self.read_with(name, CONCURRENCY)

    def read_with(self, name: str, concurrency: int) -> int:
        return len(self.container.download_blob(name, max_concurrency=concurrency).readall())

    def write(self, name: str, data: bytes) -> None:
        self.container.upload_blob(name, data, overwrite=True, max_concurrency=CONCURRENCY)

    def save(self, name: str, state: dict[str, Any]) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        self.container.upload_blob(name, buffer, overwrite=True, max_concurrency=CONCURRENCY)

    def load(self, name: str) -> dict[str, Any]:
        import torch

        return torch.load(io.BytesIO(self.container.download_blob(name, max_concurrency=CONCURRENCY).readall()))

    @contextmanager
    def downloaded(self, name: str) -> Iterator[Path]:
        """A local copy."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name.rpartition("/")[2])
            with path.open("wb") as file:
                self.container.download_blob(name, max_concurrency=CONCURRENCY).readinto(file)
            yield path

    def tensors(self, name: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        with self.downloaded(name) as path:
            return load_file(path)

    def tensors_into(self, name: str, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        with self.downloaded(name) as path:
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path.parent)), no_dist=True)

    def samples(self, prefix: str) -> int:
        names = self.container.list_blob_names(name_starts_with=prefix)
        with ThreadPoolExecutor(SAMPLES_AT_ONCE) as pool:
            return sum(pool.map(lambda name: len(self.container.download_blob(name).readall()), names))

    def names(self, prefix: str) -> int:
        return sum(1 for _ in self.container.list_blobs(name_starts_with=prefix))


class _FileSystem:
    """What all file systems of fsspec have."""

    files: Any
    container: str

    def read(self, name: str) -> int:
        return len(self.files.cat_file(f"{self.container}/{name}"))

    def stream(self, name: str) -> int:
        """Read as pandas and others do: a piece at a time."""
        total = 0
        with self.files.open(f"{self.container}/{name}", "rb") as blob:
            while data := blob.read(MiB):
                total += len(data)
        return total

    def ranges(self, name: str, size: int, count: int) -> int:
        """*count* ranges of 16 KiB, spread over the blob of *size* bytes."""
        starts = [number * (size // count) for number in range(count)]
        ends = [start + min(RANGE, size // count) for start in starts]
        return sum(map(len, self.files.cat_ranges([f"{self.container}/{name}"] * count, starts, ends)))

    def write(self, name: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.container}/{name}", data)

    def save(self, name: str, state: dict[str, Any]) -> None:
        import torch

        with self.files.open(f"{self.container}/{name}", "wb") as blob:
            torch.save(state, blob)

    def load(self, name: str) -> dict[str, Any]:
        import torch

        with self.files.open(f"{self.container}/{name}", "rb") as blob:
            return torch.load(blob)

    def samples(self, prefix: str) -> int:
        self.files.invalidate_cache()
        names = self.files.find(f"{self.container}/{prefix}")
        return sum(
            len(data)
            for at in range(0, len(names), SAMPLES_AT_ONCE)
            for data in self.files.cat(names[at : at + SAMPLES_AT_ONCE]).values()
        )

    def names(self, prefix: str) -> int:
        self.files.invalidate_cache()
        return len(self.files.find(f"{self.container}/{prefix}"))


class FileSystem(_FileSystem):
    requirements = ()
    title = "azstoragetorch (fsspec)"

    def __init__(self, place: Place) -> None:
        from azstoragetorch.filesystem import AzureBlobFileSystem

        proof: dict[str, Any] = {"sas_token": place.sas} if place.sas else {"anon": True}
        self.files = AzureBlobFileSystem(account_host=place.account_url, **proof)
        self.container = place.container


class Adlfs(_FileSystem):
    requirements = ("adlfs",)
    title = "adlfs"

    def __init__(self, place: Place) -> None:
        from adlfs import AzureBlobFileSystem

        account = urlsplit(place.account_url)
        name = account.path.strip("/") or account.netloc.partition(".")[0]
        proof = f"SharedAccessSignature={place.sas}"
        if not place.sas:  # a connection string needs a key; a service that is open to everybody does not look at it
            proof = f"AccountKey={base64.b64encode(os.urandom(64)).decode()}"
        self.options = {"connection_string": f"BlobEndpoint={place.account_url};AccountName={name};{proof};"}
        self.files = AzureBlobFileSystem(**self.options, max_concurrency=CONCURRENCY, skip_instance_cache=True)
        self.container = place.container

    def read_with(self, name: str, concurrency: int) -> int:
        return len(self.files.cat_file(f"{self.container}/{name}", max_concurrency=concurrency))

    def checkpoint_save(self, name: str, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer = FsspecWriter(f"abfs://{self.container}/{name}", **self.options)
        dcp.save(state, storage_writer=writer, no_dist=True)

    def checkpoint_load(self, name: str, state: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        reader = FsspecReader(f"abfs://{self.container}/{name}", **self.options)
        dcp.load(state, storage_reader=reader, no_dist=True)


class Obstore:
    requirements = ("obstore",)
    title = "obstore"

    def __init__(self, place: Place) -> None:
        from obstore.store import AzureStore

        account = urlsplit(place.account_url)
        name = account.path.strip("/") or account.netloc.partition(".")[0]
        proof: dict[str, Any] = {"sas_key": place.sas} if place.sas else {"skip_signature": True}
        self.store = AzureStore(
            place.container,
            account_name=name,
            endpoint=place.account_url,
            client_options={
                "allow_http": account.scheme == "http",
                # It takes no authority of one's own, as a server for measuring has.
                "allow_invalid_certificates": "BENCHMARK_OWN_AUTHORITY" in os.environ,
            },
            **proof,
        )

    def read(self, name: str) -> int:
        return self.read_with(name, CONCURRENCY)

    def read_with(self, name: str, concurrency: int) -> int:
        """As many ranges at once; they are not joined, which would be another copy."""
        import obstore

        size = obstore.head(self.store, name)["size"]
        step = max(8 * MiB, -(-size // concurrency)) if size else 1
        starts = range(0, size, step)

        def fetch(start: int) -> Any:
            return obstore.get_range(self.store, name, start=start, end=min(size, start + step))

        with ThreadPoolExecutor(concurrency) as pool:
            return sum(map(len, list(pool.map(fetch, starts))))

    def write(self, name: str, data: bytes) -> None:
        import obstore

        obstore.put(self.store, name, data, max_concurrency=CONCURRENCY)

    def save(self, name: str, state: dict[str, Any]) -> None:
        import obstore
        import torch

        with obstore.open_writer(self.store, name, max_concurrency=CONCURRENCY) as blob:
            torch.save(state, blob)

    def load(self, name: str) -> dict[str, Any]:
        import obstore
        import torch

        return torch.load(io.BytesIO(obstore.get(self.store, name).bytes()))

    def samples(self, prefix: str) -> int:
        import obstore

        names = [meta["path"] for batch in obstore.list(self.store, prefix) for meta in batch]
        with ThreadPoolExecutor(SAMPLES_AT_ONCE) as pool:
            return sum(pool.map(lambda name: len(obstore.get(self.store, name).bytes()), names))

    def names(self, prefix: str) -> int:
        import obstore

        return sum(len(batch) for batch in obstore.list(self.store, prefix or None))


class RunAI:
    """Its client reaches only accounts of Azure: with a token of the environment, or the key or SAS that it gets."""

    requirements = ("runai-model-streamer[azure]",)
    title = "run:ai streamer"

    def __init__(self, place: Place) -> None:
        host = urlsplit(place.account_url).netloc
        os.environ["AZURE_STORAGE_ACCOUNT_NAME"] = host.partition(".")[0]
        if place.sas:
            os.environ["AZURE_STORAGE_SAS_TOKEN"] = place.sas
        self.container = place.container
        if host.endswith(".blob.core.windows.net"):
            self.tensors = self._tensors

    def _tensors(self, name: str) -> dict[str, Any]:
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_file(f"az://{self.container}/{name}")
            return dict(streamer.get_tensors())


LIBRARIES: dict[str, Callable[[Place], Any]] = {
    "ours": Ours,
    "filesystem": FileSystem,
    "published": Published,
    "sdk": Sdk,
    "adlfs": Adlfs,
    "obstore": Obstore,
    "runai": RunAI,
}
_DISTRIBUTIONS = {
    "ours": "azstoragetorch",
    "filesystem": "azstoragetorch",
    "published": "azstoragetorch",
    "sdk": "azure-storage-blob",
    "runai": "runai-model-streamer",
}


def version_of(library: str) -> str:
    """The installed version of *library*, and of Python."""
    return f"{version(_DISTRIBUTIONS.get(library, library))}, Python {sys.version.split()[0]}"
