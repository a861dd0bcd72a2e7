"""Write tar shards with Ray tasks, each exactly once whatever is retried.

Ray runs a task again if its worker died, with the same input and the same number. So the name of a shard is made of the
number of its task, its own number in the task, and a digest of its content. A second attempt writes the same shards
under the same names, unless a function of the user returns something else the second time. Therefore only the shards of
the attempts that Ray reports count: at the end, all others are deleted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from azure.core.exceptions import AzureError, ResourceExistsError
from ray.data import Dataset, Datasink
from ray.data.block import Block, BlockAccessor

from azstoragetorch._blob.client import ContainerClient
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.scope import on_error
from azstoragetorch._samples.packing import files_of
from azstoragetorch._samples.tar import END
from azstoragetorch.exceptions import AZStorageTorchError
from azstoragetorch.ray._sending import clients_below

_NAME = re.compile(r"\d{6,}-\d{4,}-[0-9a-f]{32}\.tar")


class _Shard(NamedTuple):
    name: str
    size: int


def write_shards(
    samples: Dataset,
    url: str,
    *,
    max_size: int = 256 * MiB,
    max_count: int | None = None,
    overwrite: bool = False,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
    concurrency: int | None = None,
) -> list[str]:
    """Pack the rows of *samples* into tar shards in WebDataset's format, in the folder *url*; returns their URLs.

    A row is a sample, as :class:`~azstoragetorch.datapipes.BlobTarShardWriter` takes it: ``__key__`` is its key, and
    each other column is a file, whose extension is the name of the column. Missing values (None) and columns that begin
    with two underscores are left out.

    Each sample is in exactly one shard when the call returns, also if workers died and Ray ran tasks again. A shard is
    written completely or not at all, and its name has a digest of its content. If the call raises, the shards that it
    wrote are deleted, and nothing else. Each job that writes needs a separate folder.

    Args:
        samples: A Ray dataset, such as one of `read_blobs`.
        url: URL of the folder. Its permissions must include listing and deleting.
        max_size: Maximum bytes of a shard, including headers. A worker holds one shard in memory. A single sample that
            is larger gets a separate shard.
        max_count: Maximum number of samples in a shard.
        overwrite: Whether the shards that are in the folder are replaced. They are deleted after all new ones have been
            written. Shards with the same content stay, so a job that was killed can be started again. By default, a
            folder that has shards is an error.
        credential: Same as for `list_blobs`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.
        concurrency: Maximum number of concurrent tasks; by default, Ray decides.

    Raises:
        ResourceExistsError: there are shards in the folder, and *overwrite* is not set.
        ValueError: *url* is not a valid URL, a limit is below 1, or a row cannot be packed.
        TypeError: an argument has the wrong type, the credential cannot be sent to a worker, or a row cannot be packed.
        AzureError: the service refused a request, or could not be reached.
        AZStorageTorchError: a shard was deleted or changed in the meantime.
    """
    if max_size < 1 or (max_count is not None and max_count < 1):
        raise ValueError(f"max_size and max_count must be at least 1, not {max_size} and {max_count}")
    place, clients = clients_below(url, credential, transfer)
    folder = _Folder(clients.container(place), place.blob.strip("/"))
    before = folder.shards()
    if before and not overwrite:
        raise ResourceExistsError(
            f"{folder.url}: has {len(before):,} shards already: write to another folder, or pass overwrite=True to "
            "replace them"
        )
    sink = _ShardSink(folder, max_size, max_count)
    try:
        samples.write_datasink(sink, concurrency=concurrency)
        folder.keep(sink.shards)
    except Exception:
        with suppress(AzureError):  # they are in the way of nothing but the next job, which says so
            folder.delete(folder.shards().keys() - before.keys())
        raise
    return [folder.url_of(shard.name) for shard in sorted(sink.shards)]


class _Folder:
    """The folder that shards are in."""

    def __init__(self, container: ContainerClient, name: str) -> None:
        self._container = container
        self._prefix = f"{name}/" if name else ""

    @property
    def url(self) -> str:
        return str(self._container.url.with_blob(self._prefix)) if self._prefix else str(self._container.url)

    def url_of(self, name: str) -> str:
        return str(self._container.blob(self._prefix + name).url)

    def shards(self) -> dict[str, int]:
        """The sizes of all shards that are here, by name."""
        found = {}
        for page in self._container.pages(prefix=self._prefix, delimiter="/"):
            for blob_name, size in zip(page.names, page.sizes, strict=True):
                name = blob_name[len(self._prefix) :]
                if _NAME.fullmatch(name):
                    found[name] = size
        return found

    def put(self, name: str, pieces: list[bytes]) -> None:
        """Write a shard, unless an attempt before has written it: the name says what the content is."""
        client = self._container.blob(self._prefix + name)
        writer = client.writer(create_only=True)
        config = client.config
        try:
            with on_error(writer.abort):
                views = [memoryview(piece) for piece in pieces if piece]
                writer.write_pieces(views, block_size=config.block_size, concurrency=config.initial_concurrency)
                writer.commit()
        except ResourceExistsError:
            version = client.version()
            if version is None or version.size != sum(map(len, pieces)):
                raise

    def keep(self, shards: Iterable[_Shard]) -> None:
        """Delete all shards but *shards*.

        Raises:
            AZStorageTorchError: one of them is not here any more.
        """
        found, kept = self.shards(), dict(shards)
        for name, size in kept.items():
            if found.get(name) != size:
                raise AZStorageTorchError(
                    f"{self.url_of(name)}: was deleted or changed while the job was running: each job that writes "
                    "shards needs a folder of its own"
                )
        self.delete(found.keys() - kept.keys())

    def delete(self, names: Iterable[str]) -> None:
        """Delete the shards *names*."""

        def delete(name: str, _scope: Any) -> None:
            self._container.blob(self._prefix + name).delete()

        self._container.engine.map(delete, list(names), self._container.config.max_connections)


class _ShardSink(Datasink):  # type: ignore[misc]  # Ray need not be installed where types are checked
    """Writes the rows of a task as shards. Ray makes the tasks."""

    def __init__(self, folder: _Folder, max_size: int, max_count: int | None) -> None:
        self._folder = folder
        self._max_size = max_size
        self._max_count = max_count
        self.shards: list[_Shard] = []

    def get_name(self) -> str:
        return "WriteShards"

    @property
    def min_bytes_per_write(self) -> int | None:
        return self._max_size if self._max_count is None else None

    @property
    def min_rows_per_write(self) -> int | None:
        return self._max_count

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[_Shard]:
        """In a worker: write the rows of *blocks*; returns the shards."""
        shards: list[_Shard] = []
        tar = _Tar()
        for block in blocks:
            for row in BlockAccessor.for_block(block).iter_rows(public_row_format=True):
                files = files_of(_sample_of(row), self._folder.url)
                size = sum(map(len, files))
                if tar.count and (tar.size + size + len(END) > self._max_size or tar.count == self._max_count):
                    shards.append(self._put(tar, ctx.task_idx, len(shards)))
                    tar = _Tar()
                tar.add(files, size)
        if tar.count:
            shards.append(self._put(tar, ctx.task_idx, len(shards)))
        return shards

    def _put(self, tar: _Tar, task: int, number: int) -> _Shard:
        tar.add([END], len(END))
        shard = _Shard(f"{task:06d}-{number:04d}-{tar.digest.hexdigest()[:32]}.tar", tar.size)
        self._folder.put(shard.name, tar.pieces)
        return shard

    def on_write_complete(self, write_result: Any) -> None:
        """In the process of the user: what the attempts that count have written."""
        self.shards = [_Shard(*shard) for shards in write_result.write_returns for shard in shards]


class _Tar:
    """A tar in memory, in pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.digest = hashlib.sha256()
        self.size = 0
        self.count = 0

    def add(self, files: list[bytes], size: int) -> None:
        for piece in files:
            self.digest.update(piece)
        self.pieces += files
        self.size += size
        self.count += 1


def _sample_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}
