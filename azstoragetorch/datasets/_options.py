"""The keyword arguments of all ways to make a dataset, for type checkers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.manifest import IfChanged
from azstoragetorch._samples.names import InvalidNames
from azstoragetorch._samples.sharding import Even
from azstoragetorch._samples.workers import ShardBy
from azstoragetorch.datasets._contents import ListingProgress
from azstoragetorch.datasets._iteration import OnError

if TYPE_CHECKING:  # a torch without torch.distributed has no such class
    from torch.distributed import ProcessGroup


class ReadOptions(TypedDict, total=False):
    """Keyword arguments of all ways to make a dataset, for type checkers."""

    credential: Credential
    transfer: TransferConfig | None
    cache_dir: str | os.PathLike[str] | None
    cache_bytes: int


class ListOptions(ReadOptions, total=False):
    """Keyword arguments of all datasets of a container, for type checkers."""

    prefix: str | None
    progress: ListingProgress | None
    invalid_names: InvalidNames
    include_folder_markers: bool
    share_listing: bool
    group: ProcessGroup | None


class ManifestOptions(ReadOptions, total=False):
    """Keyword arguments of all datasets of a manifest, for type checkers."""

    container_url: str | None
    if_changed: IfChanged


class _SampleOptions(TypedDict, total=False):
    shuffle: bool
    seed: int
    shard_by: ShardBy
    rank: int | None
    world_size: int | None
    even: Even
    on_error: OnError


class IterableReadOptions(ReadOptions, _SampleOptions, total=False):
    """Keyword arguments of an iterable dataset of given blobs."""


class IterableListOptions(ListOptions, _SampleOptions, total=False):
    """Keyword arguments of an iterable dataset of a container."""


class IterableManifestOptions(ManifestOptions, _SampleOptions, total=False):
    """Keyword arguments of an iterable dataset of a manifest."""
