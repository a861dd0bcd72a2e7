"""Read blobs with Ray tasks, in which the next blobs are fetched while one is transformed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._samples.fetching import client_of, fetch_heads_ahead
from azstoragetorch._samples.items import BlobInfo
from azstoragetorch._samples.sources import Listing
from azstoragetorch.datasets import Blob
from azstoragetorch.datasets._blobs import apply, check_transform
from azstoragetorch.ray._listing import SCHEMA
from azstoragetorch.ray._sending import check_sendable, clients_below

Transform: TypeAlias = Callable[[Blob], Mapping[str, Any]]

_BLOCK = 64 * MiB  # of blobs, after which a task hands on a block; a worker holds about two
_TASK = 256 * MiB  # of blobs at most; between two tasks Ray Data leaves a CPU idle for 0.1 to 0.2 s
_SMALL_TASK = 8 * MiB  # of blobs at least, so that the blobs of a task are in flight together
_TASKS_OF_CPU = 4  # with fewer tasks, some CPUs would wait long for the last ones
_REQUEST = 64 << 10  # bytes that could be read in the time that a request takes by itself


def read_blobs(
    blobs: str | Iterable[BlobInfo] | Dataset,
    *,
    transform: Transform | None = None,
    masks: str | Sequence[str] = (),
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    concurrency: int | None = None,
    num_cpus: float | None = None,
) -> Dataset:
    """A Ray dataset with a row for each blob: ``url`` and ``data``, or what *transform* returns.

    Tasks get about the same number of bytes each. In a task, the next blobs are fetched while one is transformed.

    Args:
        blobs: A URL, below which this process lists now, as for `list_blobs`; a sequence of
            :class:`~azstoragetorch.datapipes.BlobInfo`, such as a pipe that lists a manifest; or a dataset that
            `list_blobs` returned, perhaps filtered, which is neither listed nor held by this process: prefer it for
            millions of blobs.
        transform: Called with a :class:`~azstoragetorch.datasets.Blob`, returns a row: a mapping of names to values
            that Ray can store, such as numbers, strings, bytes, and NumPy arrays. Ray pickles the function.
        masks: Same as for `list_blobs`; only for a URL.
        credential: Same as for `list_blobs`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`. It is for each worker: its
            ``max_connections`` and ``memory_limit`` are of one process.
        concurrency: Maximum number of concurrent tasks; by default, Ray decides.
        num_cpus: CPUs that Ray reserves for a task; by default, one.

    Raises:
        ResourceNotFoundError: there is nothing at the URL.
        ValueError: a URL is not valid.
        TypeError: an argument has the wrong type, or the credential cannot be sent to a worker.
        AzureError: the service refused the request, or could not be reached.

    Tasks raise the same errors as datasets do: of the service, and of *transform*, with the URL of the blob. A blob of
    a manifest that was overwritten raises :class:`~azstoragetorch.exceptions.BlobChangedError`.
    """
    check_transform(transform)
    if isinstance(blobs, str):
        place, clients = clients_below(blobs, credential, transfer)
        known = list(Listing.of(masks, True, "skip", False).blobs(clients, place))
    else:
        clients = ClientFactory(credential, transfer)
        check_sendable(clients)
        known = [] if isinstance(blobs, Dataset) else [_checked(blob) for blob in blobs]
    reader = _Reader(clients, transform)
    if isinstance(blobs, Dataset):
        # Ray would run steps with equal resources as one, and so read all groups that came from one block in one task.
        grouped = blobs.map_batches(partial(_grouped, _TASK), batch_size=None, batch_format="pyarrow", num_cpus=0.1)
        options = {} if num_cpus is None else {"num_cpus": num_cpus}
        return grouped.repartition(target_num_rows_per_block=1).map_batches(
            reader.of_groups, batch_size=None, batch_format="pyarrow", concurrency=concurrency, **options
        )
    groups = balance(known, _count_of_tasks(sum(map(_cost, known)))) or [[]]
    return ray.data.read_datasource(
        _Blobs(groups, reader), concurrency=concurrency, num_cpus=num_cpus, override_num_blocks=len(groups)
    )


def _count_of_tasks(size: int) -> int:
    if not ray.is_initialized():
        ray.init()  # as Ray Data would do by itself
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return max(math.ceil(size / _TASK), min(math.ceil(size / _SMALL_TASK), cpus * _TASKS_OF_CPU))


def _cost(blob: BlobInfo) -> int:
    """What it takes to read *blob*, as a number of bytes."""
    return blob.size + _REQUEST


def balance(blobs: Sequence[BlobInfo], count: int) -> list[list[BlobInfo]]:
    """*blobs* in at most *count* groups, in order, none empty, that take about as long to read."""
    share = sum(map(_cost, blobs)) / max(1, count)
    groups: list[list[BlobInfo]] = []
    passed, group = 0.0, -1
    for blob in blobs:
        place = int((passed + _cost(blob) / 2) / share)  # where the middle of the blob is
        if place != group or not groups:
            groups.append([])
            group = place
        groups[-1].append(blob)
        passed += _cost(blob)
    return groups


def _grouped(most: int, table: pa.Table) -> pa.Table:
    """The blobs in *table* in groups of about *most* bytes, one for a task: a row for each group, as lists."""
    missing = set(SCHEMA.names) - set(table.column_names)
    if missing:
        raise ValueError(f"blobs: the dataset has no column {', '.join(sorted(missing))}: pass one of list_blobs")
    blobs = _blobs_of(table[name] for name in SCHEMA.names)
    groups = balance(blobs, math.ceil(sum(map(_cost, blobs)) / most))
    lists = [[[getattr(blob, name) for blob in group] for group in groups] for name in SCHEMA.names]
    return pa.table(lists, pa.schema([(field.name, pa.list_(field.type)) for field in SCHEMA]))


def _blobs_of(columns: Iterable[pa.Array]) -> list[BlobInfo]:
    return [BlobInfo(*row) for row in zip(*(column.to_pylist() for column in columns), strict=True)]


def _checked(blob: Any) -> BlobInfo:
    if not isinstance(blob, BlobInfo):
        raise TypeError(f"blobs must be a URL, a dataset of list_blobs, or BlobInfos, not {type(blob).__name__}")
    parse_blob_url(blob.url)
    return blob


class _Blobs(Datasource):  # type: ignore[misc]  # Ray need not be installed where types are checked
    """Reads blobs. Ray makes its tasks."""

    def __init__(self, groups: list[list[BlobInfo]], read: _Reader) -> None:
        super().__init__()
        self._groups = groups
        self._read = read

    def get_name(self) -> str:
        return "ReadBlobs"

    def estimate_inmemory_data_size(self) -> int:
        return sum(blob.size for group in self._groups for blob in group)

    def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[ReadTask]:  # noqa: ARG002 - Ray's
        tasks = []
        for group in self._groups:
            size = sum(blob.size for blob in group)
            known = BlockMetadata(num_rows=len(group), size_bytes=size, input_files=None, exec_stats=None)
            tasks.append(ReadTask(partial(self._read.blocks, group), known))
        return tasks


class _Reader:
    """In a worker: makes blocks of blobs."""

    def __init__(self, clients: ClientFactory, transform: Transform | None) -> None:
        self._clients = clients
        self._transform = transform

    def of_groups(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        """The rows for the blobs in *table*, which has a group of blobs in each row, as columns."""
        return self._columns(_blobs_of(table[name].combine_chunks().flatten() for name in SCHEMA.names))

    def blocks(self, blobs: list[BlobInfo]) -> Iterator[Block]:
        """The rows for *blobs*, as blocks."""
        for columns in self._columns(blobs):
            yield BlockAccessor.batch_to_block(columns)

    def _columns(self, blobs: list[BlobInfo]) -> Iterator[dict[str, Any]]:
        most = min(_BLOCK, DataContext.get_current().target_max_block_size or _BLOCK)
        rows: list[Mapping[str, Any]] = []
        size = 0
        for blob, row in self._rows(blobs):
            rows.append(row)
            size += blob.size or 0
            if size >= most:
                yield _columns_of(rows)
                rows, size = [], 0
        if rows:
            yield _columns_of(rows)

    def _rows(self, blobs: list[BlobInfo]) -> Iterator[tuple[Blob, Mapping[str, Any]]]:
        ahead = fetch_heads_ahead(
            self._clients.config,
            map(self._open, blobs),
            client=lambda blob: blob._client,  # noqa: SLF001 - of this package
            size=lambda blob: blob.size,
            is_eager=self._transform is None,
        )
        with closing(ahead):
            for work in ahead:
                row = apply(self._transform, work.item, work.result)
                if not isinstance(row, Mapping):
                    raise TypeError(
                        f"the transform returned a {type(row).__name__} for {work.item.url}: it must return a row, "
                        "which is a mapping of column names to values"
                    )
                yield work.item, row

    def _open(self, blob: BlobInfo) -> Blob:
        return Blob(client_of(self._clients, blob), blob.size, blob.etag)


def _columns_of(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    columns = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in columns}
