"""What surrounds a call does not change it: torch's modes and default devices, /dev/shm, a limit of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader

from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter
from azstoragetorch.datapipes import AzureBlobFileLister
from azstoragetorch.datasets import BlobDataset, IterableBlobDataset
from tests.checkpoint.test_surroundings import SURROUNDINGS
from tests.faults import FaultService

CONTENTS = [bytes([number]) * 10_000 for number in range(8)]


@pytest.fixture
def container_url() -> Iterator[str]:
    with FaultService() as service:
        service.create_container("data")
        for number, content in enumerate(CONTENTS):
            service.put("data", f"x/{number}", content)
        yield service.container_url("data")


def total(blob: Any) -> torch.Tensor:
    """What users do with a sample, on the CPU whatever the default device is."""
    return torch.frombuffer(bytearray(blob.reader().read()), dtype=torch.uint8).sum()


def datasets(url: str) -> list[Any]:
    options: dict[str, Any] = {"prefix": "x/", "credential": False, "transform": total}
    return [
        BlobDataset.from_container_url(url, **options),
        IterableBlobDataset.from_container_url(url, **options),
        IterableBlobDataset.from_container_url(url, **options, shuffle=True, seed=3),
    ]


def values(loaded: Any) -> list[int]:
    return sorted(int(value) for batch in loaded for value in batch)


EXPECTED = [10_000 * number for number in range(8)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_datasets_and_pipes_in_any_surroundings(name: str, workers: int, container_url: str) -> None:
    with SURROUNDINGS[name]():
        for dataset in datasets(container_url):
            generator = torch.Generator(device="cpu")
            found = DataLoader(dataset, batch_size=3, num_workers=workers, generator=generator)
            assert values(found) == EXPECTED
        if not workers:
            assert [int(dataset[2]) for dataset in datasets(container_url)[:1]] == [20_000]
        for reader in ("open_files_by_azure", "load_files_by_azure", "read_files_by_azure"):
            pipe = AzureBlobFileLister(f"{container_url}/x/", credential=False)
            pipe = getattr(pipe, reader)(credential=False)
            read = {
                url.rpartition("/")[2]: data if isinstance(data, bytes) else data.read()
                for url, data in DataLoader(pipe, batch_size=None, num_workers=workers, generator=generator)
            }
            assert read == {str(number): content for number, content in enumerate(CONTENTS)}
