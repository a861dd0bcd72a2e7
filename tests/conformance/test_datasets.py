"""The guarantees of all datasets, for each style and each source of blobs, on Azurite."""

from __future__ import annotations

from typing import Any

from azstoragetorch.datasets import BlobDataset, IterableBlobDataset
from tests.azurite.container import Container
from tests.conformance.datasets import DatasetSuite


class _Map:
    def samples(self, dataset: Any) -> list[Any]:
        single = [dataset[index] for index in range(len(dataset))]
        batched = dataset.__getitems__(range(len(dataset)))
        assert repr(single) == repr(batched)
        return single


class _Iterable:
    def samples(self, dataset: Any) -> list[Any]:
        return list(dataset)


class _Listed:
    is_listed = True
    kind: Any

    def make(self, container: Container, names: list[str], **options: Any) -> Any:
        return self.kind.from_container_url(container.url, **options)


class _Named:
    is_listed = False
    kind: Any

    def make(self, container: Container, names: list[str], **options: Any) -> Any:
        return self.kind.from_blob_urls([container.blob_url(name) for name in names], **options)


class TestMapOfContainer(_Map, _Listed, DatasetSuite):
    kind = BlobDataset


class TestMapOfUrls(_Map, _Named, DatasetSuite):
    kind = BlobDataset


class TestIterableOfContainer(_Iterable, _Listed, DatasetSuite):
    kind = IterableBlobDataset


class TestIterableOfUrls(_Iterable, _Named, DatasetSuite):
    kind = IterableBlobDataset
