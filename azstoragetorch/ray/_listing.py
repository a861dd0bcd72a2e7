"""List blobs with Ray tasks, each of which lists some of the folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
import ray.data
from ray.data import Dataset, Datasource
from ray.data.block import Block, BlockMetadata
from ray.data.datasource import ReadTask

from azstoragetorch._blob.client import ClientFactory, ContainerClient, Page
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL, parse_url, url_of_name
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.names import InvalidNames, NameFilter
from azstoragetorch._samples.sources import Listing
from azstoragetorch._samples.splitting import split
from azstoragetorch.ray._sending import clients_below

Share: TypeAlias = "str | Page"
"""A part of a listing: the prefix of the names to list, or blobs that were listed already."""

_TASKS = 256  # at most
_BLOCK = 50_000  # rows, after which a task hands on a block
_CPUS = 0.5  # of a task, which waits for the service half of the time
SCHEMA = pa.schema([("url", pa.string()), ("size", pa.int64()), ("etag", pa.string())])


def list_blobs(  # noqa: D417 - described by AzureBlobFileLister
    url: str,
    masks: str | Sequence[str] = (),
    *,
    invalid_names: InvalidNames = "skip",
    include_folder_markers: bool = False,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    concurrency: int | None = None,
) -> Dataset:
    """A Ray dataset of the blobs below *url*, with the columns ``url`` (without a SAS), ``size``, and ``etag``.

    Folders are listed by several tasks at once. This process looks into folders first, with up to 64 requests, to find
    at least 64 parts that can be listed separately, and Ray gives them to workers as those become free. Only slashes
    divide names: blobs of one folder are listed by one task. The order of rows is not defined.

    Args:
        url: URL of a container, a folder, a blob, or the beginning of names.
        masks: Same as for :class:`~azstoragetorch.datapipes.AzureBlobFileLister`; so are *invalid_names* and
            *include_folder_markers*.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`. With None, each worker signs in from its
            environment. A SAS or account key reaches the workers only in :func:`azstoragetorch.share_credentials`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.
        concurrency: Maximum number of concurrent tasks; by default, Ray decides.

    Raises:
        ResourceNotFoundError: *url* does not exist. (A container without any blob is an empty dataset.)
        ValueError: *url* is not a valid URL.
        TypeError: an argument has the wrong type, or the credential cannot be sent to a worker.
        AzureError: the service refused the request, or could not be reached.
    """
    place, clients = clients_below(url, credential, transfer)
    listing = Listing.of(masks, True, invalid_names, include_folder_markers)
    shares = shares_of(clients, place)
    count = max(1, min(_TASKS, len(shares)))
    groups = [shares[first::count] for first in range(count)]  # neighbors, of which one may be large, are separated
    source = _Listing(clients.container(place), groups, listing)
    return ray.data.read_datasource(source, num_cpus=_CPUS, concurrency=concurrency, override_num_blocks=len(groups))


def shares_of(clients: ClientFactory, place: BlobURL) -> list[Share]:
    """The parts of the listing below *place*; see `list_blobs`."""
    first = next(Listing().blobs(clients, place), None)  # raises if nothing is there
    if first is None:
        return []
    name = parse_url(first.url).blob
    if name == place.blob:
        return [Page([name], [first.size], [first.etag], [], "")]
    is_folder = place.blob and not place.blob.endswith("/") and name.startswith(f"{place.blob}/")
    container = clients.container(place)
    return split(
        lambda prefix, delimiter: container.pages(prefix=prefix, delimiter=delimiter),
        f"{place.blob}/" if is_folder else place.blob,
    )


class _Listing(Datasource):  # type: ignore[misc]  # Ray need not be installed where types are checked
    """Reads the names of blobs. Ray makes its tasks."""

    def __init__(self, container: ContainerClient, groups: list[list[Share]], listing: Listing) -> None:
        super().__init__()
        self._container = container
        self._groups = groups
        self._listing = listing

    def get_name(self) -> str:
        return "ListBlobs"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[ReadTask]:  # noqa: ARG002 - Ray's
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        reads = [partial(_list, self._container, group, self._listing) for group in self._groups]
        return [ReadTask(read, unknown, SCHEMA) for read in reads]


def _list(container: ContainerClient, shares: list[Share], listing: Listing) -> Iterator[Block]:
    """In a worker: blocks with the blobs of *shares*. Each costs the process of the user some time, too."""
    names_filter = NameFilter(container.url, listing.rules)
    base = str(container.url)
    rows: tuple[list[str], list[int], list[str]] = ([], [], [])
    for share in shares:
        for page in [share] if isinstance(share, Page) else container.pages(prefix=share):
            names, sizes, etags = names_filter.keep(*listing.matching(page))
            rows[0].extend(url_of_name(base, name) for name in names)
            rows[1].extend(sizes)
            rows[2].extend(etags)
            if len(rows[0]) >= _BLOCK:
                yield pa.table(list(rows), schema=SCHEMA)
                rows = ([], [], [])
    names_filter.warn()
    yield pa.table(list(rows), schema=SCHEMA)
