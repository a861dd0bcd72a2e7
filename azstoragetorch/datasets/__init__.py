"""Datasets of blobs: map-style and iterable, with reads that run ahead, in order, inside each worker.

A dataset is a listing (or a list of URLs), kept as columns, and a transform. Fetching is the core's; which sample
comes when is planned by position, so that any process can say what is left.
"""

from __future__ import annotations

from azstoragetorch.datasets._blobs import Blob, BlobSample
from azstoragetorch.datasets._contents import ListingInfo
from azstoragetorch.datasets._iterable import IterableBlobDataset, merge_states
from azstoragetorch.datasets._map import BlobDataset

__all__ = ["Blob", "BlobDataset", "BlobSample", "IterableBlobDataset", "ListingInfo", "merge_states"]
