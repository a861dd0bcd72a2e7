"""Datasets of blobs, map-style and iterable, which read ahead, in order, in each worker.

A dataset consists of a listing or a list of URLs, stored as columns, and a transform. The order of samples is computed
from positions, so every process can compute which samples remain.
"""

from __future__ import annotations

from azstoragetorch.datasets._blobs import Blob, BlobSample
from azstoragetorch.datasets._contents import ListingInfo
from azstoragetorch.datasets._iterable import IterableBlobDataset
from azstoragetorch.datasets._iteration import merge_states
from azstoragetorch.datasets._map import BlobDataset

__all__ = ["Blob", "BlobDataset", "BlobSample", "IterableBlobDataset", "ListingInfo", "merge_states"]
