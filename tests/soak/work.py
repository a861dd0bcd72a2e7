"""The parts of one epoch of a soak. Each gets the number of the epoch and checks every byte."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from azure.core.exceptions import AzureError, ResourceNotFoundError
from torch.utils.data import DataLoader
from torch.utils.data.datapipes.iter import IterableWrapper
from torchdata.nodes import Loader

from azstoragetorch import TransferConfig
from azstoragetorch._engine.config import KiB, MiB
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, clean, keep_last, list_checkpoints
from azstoragetorch.datapipes import (
    AzureBlobFileLister,
    AzureBlobFileReader,
    BlobTarExpander,
    BlobTarShardWriter,
    ResumableDataPipe,
)
from azstoragetorch.datasets import BlobDataset, IterableBlobDataset
from azstoragetorch.exceptions import BlobChangedError, CheckpointError
from azstoragetorch.io import BlobIO
from azstoragetorch.nodes import BlobLister, BlobReader, BlobSharder, ShuffleBuffer
from tests.checkpoint import jobs
from tests.checkpoint.ranks import run_ranks
from tests.faults.effects import inverted

CONTAINER = "data"
PER_SET, SET_COUNT = 1000, 10
NAMES = [f"set{folder}/{number:04d}" for folder in range(SET_COUNT) for number in range(PER_SET)]
CHANGING = r"/set[0-4]/"  # blobs that are overwritten now and then
MOVING = "moving"  # a blob of many parts, overwritten while it is read
TRANSFER = TransferConfig(
    part_size=64 * KiB,
    block_size=64 * KiB,
    max_concurrency=8,
    max_connections=16,
    memory_limit=8 * MiB,
    read_ahead=512 * KiB,
    connect_timeout=2.0,
    read_timeout=2.0,
    max_attempts=10,
    max_backoff=0.2,
)
CACHE_BYTES = 1 * MiB  # less than a set, so that cached data must be evicted
HASTY = replace(TRANSFER, max_attempts=1)
_PATIENCE = 300.0  # seconds for ranks to start and end, on a busy machine
_MODEL = 300_000  # elements of the largest tensor of a checkpoint


def content_of(name: str) -> bytes:
    size = 400_000 if name == MOVING else zlib.crc32(name.encode()) % 4000
    return random.Random(name).randbytes(size)


@cache
def sums(name: str) -> tuple[int, int]:
    """The checksums of the two possible contents of the blob *name*: the original one and its inverse."""
    return zlib.crc32(content_of(name)), zlib.crc32(inverted(content_of(name)))


def check(samples: Iterable[tuple[str, bytes]], names: Iterable[str]) -> int:
    """Check that each of *names* comes once, with the right bytes; return their number."""
    found = [(url.partition("/data/")[2], zlib.crc32(data)) for url, data in samples]
    assert sorted(name for name, _ in found) == sorted(names)
    wrong = [name for name, checksum in found if checksum not in sums(name)]
    assert not wrong, f"WRONG BYTES of {wrong}"
    return len(found)


def set_names(folder: int) -> list[str]:
    return NAMES[folder * PER_SET : (folder + 1) * PER_SET]


def pair(sample: dict[str, Any]) -> tuple[str, bytes]:
    return sample["url"], sample["data"]


@dataclass
class Soak:
    url: str  # of the container
    cache: Path

    def __post_init__(self) -> None:
        self.access: dict[str, Any] = {"credential": False, "transfer": TRANSFER}
        self.iterable = IterableBlobDataset.from_container_url(self.url, prefix="set", shuffle=True, **self.access)
        self.map = BlobDataset.from_container_url(self.url, prefix="set", **self.access)

    def epoch(self, number: int) -> int:
        """Run all parts; return the number of checked items."""
        parts = [
            self.iterable_dataset,
            self.map_dataset,
            self.workers,
            self.cached,
            self.pipes,
            self.tars,
            self.nodes,
            self.files,
            self.checkpoints,
            self.ranks,
            self.errors,
        ]
        return sum(part(number) for part in parts)

    def iterable_dataset(self, number: int) -> int:
        """All blobs, shuffled; and again, stopped in the middle."""
        self.iterable.set_epoch(number)
        for _ in itertools.islice(self.iterable, 100):
            pass
        return check(map(pair, self.iterable), NAMES)

    def map_dataset(self, number: int) -> int:
        order = random.Random(number).sample(range(len(NAMES)), 1000)
        batches = (self.map.__getitems__(order[at : at + 50]) for at in range(0, 1000, 50))
        return check((pair(sample) for batch in batches for sample in batch), [NAMES[index] for index in order])

    def workers(self, number: int) -> int:
        names = set_names(number % SET_COUNT)
        dataset: Any
        if number % 2:
            prefix = names[0].partition("/")[0] + "/"
            dataset = IterableBlobDataset.from_container_url(self.url, prefix=prefix, **self.access)
        else:
            dataset = torch.utils.data.Subset(self.map, range(NAMES.index(names[0]), NAMES.index(names[-1]) + 1))
        loader = DataLoader(dataset, batch_size=20, num_workers=2, collate_fn=list)
        return check((pair(sample) for batch in loader for sample in batch), names)

    def cached(self, number: int) -> int:
        """With a cache that is too small for the set."""
        dataset = BlobDataset.from_container_url(
            self.url, prefix="set7/", cache_dir=self.cache, cache_bytes=CACHE_BYTES, **self.access
        )
        return check((pair(dataset[index]) for index in range(0, 1000, 5)), set_names(7)[::5])

    def pipes(self, number: int) -> int:
        """To the end; and in two halves, with a resume."""
        folder = number % SET_COUNT

        def graph() -> ResumableDataPipe:
            lister: Any = AzureBlobFileLister(f"{self.url}/set{folder}/", **self.access)
            reader: Any = AzureBlobFileReader(lister.shuffle().sharding_filter(), **self.access)
            return ResumableDataPipe(reader, seed=number)

        names = set_names(folder)
        loader = DataLoader(graph(), None, num_workers=number % 2)  # type: ignore[arg-type]
        count = check(loader, names)
        pipe = graph()
        samples = list(itertools.islice(pipe, 300))
        again = graph()
        again.load_state_dict(pipe.state_dict())
        return count + check([*samples, *again], names)

    def tars(self, number: int) -> int:
        """Write shards of samples, and read them again."""
        samples = [{"__key__": name.replace("/", "-"), "bin": content_of(name)} for name in set_names(8)[:300]]
        urls = list(
            BlobTarShardWriter(
                IterableWrapper(samples, deepcopy=False), self.url + "/tars/{shard}.tar", max_count=100, **self.access
            )
        )
        assert len(urls) == 3
        reader: Any = AzureBlobFileReader(IterableWrapper(urls), **self.access)
        found = {path.rpartition("/")[2]: stream.read() for path, stream in BlobTarExpander(reader)}
        assert found == {f"{sample['__key__']}.bin": sample["bin"] for sample in samples}, "WRONG BYTES"
        return len(found)

    def nodes(self, number: int) -> int:
        """Stopped in the middle, and resumed."""
        folder = 5 + number % 5  # listed blobs, which must not change after the listing

        def loader() -> Any:
            lister = BlobLister(f"{self.url}/set{folder}/", credential=False, transfer=TRANSFER)
            shuffled: Any = ShuffleBuffer(BlobSharder(lister), 200, seed=number)
            return Loader(BlobReader(shuffled, **self.access))

        first = loader()
        samples = list(itertools.islice(first, 400))
        again = loader()
        again.load_state_dict(first.state_dict())
        return check([*samples, *again], set_names(folder))

    def files(self, number: int) -> int:
        """Blobs written and read in every way; an aborted writer and a dropped reader."""
        dice = random.Random(number)
        data = dice.randbytes(dice.randrange(2 * MiB))
        url = f"{self.url}/files/{number % 3}"
        with BlobIO(url, "wb", **self.access) as file:
            for piece in pieces(data, dice):
                file.write(piece)
        abandoned = BlobIO(url, "wb", **self.access)
        abandoned.write(b"x" * 200_000)
        abandoned.abort()
        with BlobIO(url, "rb", **self.access) as file:
            assert file.read() == data, "WRONG BYTES"
            buffer = bytearray(len(data))
            file.seek(0)
            assert file.readinto(buffer) == len(data)
            assert buffer == data, "WRONG BYTES"
            for _ in range(50):
                at, size = dice.randrange(len(data) + 1), dice.randrange(100_000)
                file.seek(at)
                assert file.read(size) == data[at : at + size], "WRONG BYTES"
        with BlobIO(url, "rb", **self.access) as file:
            assert b"".join(iter(lambda: file.read(3000), b"")) == data, "WRONG BYTES"
        BlobIO(url, "rb", **self.access).read(10)
        return 5 + self.moving()

    def moving(self) -> int:
        """A blob that is overwritten while it is read: one of the two versions, or an error."""
        for _ in range(5):
            try:
                with BlobIO(f"{self.url}/{MOVING}", "rb", **self.access) as file:
                    assert zlib.crc32(file.read()) in sums(MOVING), "WRONG BYTES"
            except BlobChangedError:
                pass
        return 5

    def checkpoints(self, number: int) -> int:
        """Save, load, keep the last two; clean up an unfinished save."""
        base = f"{self.url}/checkpoints"
        state = {"weight": torch.full((_MODEL,), float(number)), "bias": torch.arange(100.0), "step": number}
        dcp.save(state, storage_writer=BlobStorageWriter(f"{base}/step-{number}", **self.access), no_dist=True)
        target = {"weight": torch.zeros(_MODEL), "bias": torch.zeros(100), "step": -1}
        dcp.load(target, storage_reader=BlobStorageReader(f"{base}/step-{number}", **self.access), no_dist=True)
        assert torch.equal(target["weight"], state["weight"]), "WRONG BYTES"  # type: ignore[arg-type]
        assert target["step"] == number
        keep_last(base, 2, **self.access)
        assert len(list_checkpoints(base, **self.access)) <= 2
        clean(base, min_age=0, **self.access)
        return 1

    def ranks(self, number: int) -> int:
        """Two ranks save a sharded state and load it with another sharding."""
        url = f"{self.url}/ranks"
        run_ranks(2, jobs.save, url, False, "rows", number, timeout=_PATIENCE)
        run_ranks(2, jobs.load, url, False, ["columns"], number, timeout=_PATIENCE)
        return 2

    def errors(self, number: int) -> int:
        """Errors: a missing blob, a missing checkpoint, a request without retries."""
        for action in (
            lambda: BlobIO(f"{self.url}/none", "rb", **self.access).read(),
            lambda: BlobStorageReader(f"{self.url}/none", **self.access).read_metadata(),
        ):
            try:
                action()
            except (ResourceNotFoundError, CheckpointError):
                continue
            raise AssertionError("ended well")
        names = set_names(9)[:100]
        hasty = IterableBlobDataset.from_blob_urls(
            [f"{self.url}/{name}" for name in names], credential=False, transfer=HASTY
        )
        with suppress(AzureError):
            check(map(pair, hasty), names)
        return 2


def pieces(data: bytes, dice: random.Random) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = dice.choice((100, 5_000, 70_000, 300_000))
        yield data[at : at + size]
        at += size
