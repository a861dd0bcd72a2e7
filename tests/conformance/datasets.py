"""What every dataset guarantees, of any style and from any source of blobs. Each style inherits this suite."""

from __future__ import annotations

import pickle
import warnings
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch.utils.data
from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import ClientAuthenticationError, ResourceNotFoundError

from azstoragetorch import TransferConfig
from azstoragetorch._engine.config import KiB
from azstoragetorch.datasets import Blob
from tests.azurite.container import Container
from tests.support import content

SMALL_PARTS = TransferConfig(part_size=64 * KiB, max_attempts=2, max_backoff=0.01)
NAMES = ["a b%2F?#ü//x/", "dir/ß", "plain", "zero", "zz/large"]
SIZES = [10, 1, 64 * KiB, 0, 200 * KiB + 7]
BLOBS = {name: content(size, seed) for seed, (name, size) in enumerate(zip(NAMES, SIZES, strict=True))}


def parts_of(blob: Blob) -> tuple[str, str, bytes, bytes, int | None]:
    """A transform that reads a blob twice, in pieces."""
    with blob.reader() as reader:
        head = reader.read(5)
        rest = reader.read()
    with blob.reader() as again:
        assert again.read() == head + rest
        assert again.size == len(head + rest)
    return blob.container_name, blob.blob_name, head, rest, blob.size


def name_of(blob: Blob) -> str:
    return blob.blob_name


class DatasetSuite(ABC):
    """A style provides *make* and *samples*."""

    @abstractmethod
    def make(self, container: Container, names: list[str], **options: Any) -> Any:
        """A dataset of these blobs, which are all blobs of the container."""

    @abstractmethod
    def samples(self, dataset: Any) -> list[Any]:
        """All samples, in order."""

    is_listed: bool

    @pytest.fixture
    def filled(self, container: Container) -> Container:
        for name, data in BLOBS.items():
            container.put(name, data)
        return container

    def everything(self, filled: Container, **options: Any) -> Any:
        return self.make(filled, NAMES, **{"credential": filled.key, "transfer": SMALL_PARTS, **options})

    def test_a_sample_is_url_and_data(self, filled: Container) -> None:
        samples = self.samples(self.everything(filled))
        assert samples == [{"url": filled.blob_url(name), "data": BLOBS[name]} for name in NAMES]

    def test_a_transform_gets_a_blob_that_can_be_read_again_and_in_pieces(self, filled: Container) -> None:
        samples = self.samples(self.everything(filled, transform=parts_of))
        assert [(name, head + rest) for _, name, head, rest, _ in samples] == list(BLOBS.items())
        assert {container for container, *_ in samples} == {filled.name}
        assert [size for *_, size in samples] == (SIZES if self.is_listed else [None] * len(SIZES))

    def test_a_second_epoch_is_like_the_first(self, filled: Container) -> None:
        dataset = self.everything(filled)
        assert self.samples(dataset) == self.samples(dataset)

    def test_a_blob_may_be_overwritten_between_epochs(self, filled: Container) -> None:
        dataset = self.everything(filled)
        self.samples(dataset)
        filled.put("plain", b"new")
        assert self.samples(dataset)[2]["data"] == b"new"

    def test_a_kept_blob_can_be_read_later_and_in_another_place(self, filled: Container) -> None:
        blobs = self.samples(self.everything(filled, transform=lambda blob: blob))
        assert [blob.reader().read() for blob in blobs] == list(BLOBS.values())
        assert "sig" not in repr(blobs)
        copies = [pickle.loads(pickle.dumps(blob)) for blob in blobs]
        assert [blob.url for blob in copies] == [filled.blob_url(name) for name in NAMES]

    def test_a_plain_pickle_has_no_secret_and_says_so_when_used(self, filled: Container) -> None:
        dataset = self.everything(filled)
        self.samples(dataset)
        data = pickle.dumps(dataset)
        assert filled.service.account_key.encode() not in data
        with pytest.raises(ValueError, match="create the object again with its credential"):
            self.samples(pickle.loads(data))

    def test_a_sas_credential_is_enough_and_shows_nowhere(self, filled: Container) -> None:
        sas = filled.sas("rl")
        dataset = self.everything(filled, credential=AzureSasCredential(sas))
        signature = sas.partition("sig=")[2].partition("&")[0]
        for text in (repr(dataset), str(self.samples(dataset)), pickle.dumps(dataset).decode("latin-1")):
            assert signature not in text

    def test_a_blob_that_is_gone_is_not_found(self, filled: Container) -> None:
        dataset = self.everything(filled)
        assert dataset.metadata.count
        filled.client.delete_blob("plain")
        with pytest.raises(ResourceNotFoundError, match="plain"):
            self.samples(dataset)

    def test_a_wrong_key_is_refused_on_first_use(self, filled: Container) -> None:
        with pytest.raises(ClientAuthenticationError, match="403"):
            self.samples(self.everything(filled, credential=AzureSasCredential("sv=2021-08-06&sig=AAAA")))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_loader_gets_every_blob_once(self, filled: Container, workers: int) -> None:
        dataset = self.everything(filled, transform=name_of)
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=workers)
        for _ in range(2):
            assert sorted(name for batch in loader for name in batch) == sorted(NAMES)

    def test_a_refusal_comes_out_of_a_worker_as_what_it_is(self, filled: Container) -> None:
        dataset = self.everything(filled)
        filled.client.delete_blob("plain")
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)
        # Listed datasets notice it when they list, unless they have listed before.
        if self.is_listed and isinstance(dataset, torch.utils.data.IterableDataset):
            assert len(list(loader)) == len(NAMES) - 1
            return
        with pytest.raises(ResourceNotFoundError, match=r"404.*plain|plain.*404"):
            list(loader)

    def test_wrong_arguments_are_named(self, filled: Container) -> None:
        with pytest.raises(TypeError, match="credential must be"):
            self.everything(filled, credential="sig=x")
        with pytest.raises(TypeError, match="transform must be callable"):
            self.everything(filled, transform="read")
        with pytest.raises(TypeError, match="transfer must be a TransferConfig"):
            self.everything(filled, transfer={"part_size": 1})
        with pytest.raises(TypeError, match="credentails"):
            self.everything(filled, credentails=None)
        with pytest.raises(ValueError, match="cache_bytes must be at least 1"):
            self.everything(filled, cache_bytes=0)

    def test_metadata_says_what_there_is(self, filled: Container) -> None:
        info = self.everything(filled).metadata
        assert (info.count, info.size) == (len(NAMES), sum(SIZES) if self.is_listed else None)
        assert info.fingerprint == self.everything(filled).metadata.fingerprint
        filled.put("one more", b"")
        if self.is_listed:
            assert info.fingerprint != self.everything(filled).metadata.fingerprint

    def test_an_empty_dataset_is_one(self, container: Container) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = self.make(container, [], credential=container.key)
            assert [self.samples(dataset), self.samples(dataset)] == [[], []]
        told = [str(entry.message) for entry in caught if entry.category is UserWarning]
        assert len(told) == (1 if self.is_listed else 0)
        assert all(container.url in text for text in told)
