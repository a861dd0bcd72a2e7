"""``azstoragetorch bench``: measure this package in an account of the user."""

from __future__ import annotations

import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import GiB, MiB, TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch.cli._session import Session, Url, common, examples
from azstoragetorch.io import BlobIO

if sys.platform != "win32":
    import resource

_SAMPLE = 110_000  # bytes of a typical photograph of a data set
_TENSORS = 16


@dataclass(frozen=True)
class _Case:
    name: str
    unit: str
    amount: float
    run: Callable[[], object]
    mebibytes: float


@click.command(
    epilog=examples(
        "bench https://ACCOUNT.blob.core.windows.net/CONTAINER\n"
        "bench https://ACCOUNT.blob.core.windows.net/CONTAINER/folder --size 64 --rounds 1"
    )
)
@click.argument("url", type=Url())
@click.option("--size", default=256, show_default=True, help="Size of the large blob in MiB.", type=click.IntRange(1))
@click.option(
    "--count", default=500, show_default=True, help="Number of small blobs of 110 KB.", type=click.IntRange(1)
)
@click.option("--rounds", default=3, show_default=True, help="Runs per case.", type=click.IntRange(1))
@common
def bench(session: Session, url: BlobURL, size: int, count: int, rounds: int) -> None:
    """Measure reading, writing, torch.save, torch.load, datasets, and listing.

    Writes to a new folder in the container or folder URL, and deletes it at the end. The first run of each case is a
    warmup. The figures are medians of the other runs.
    """
    folder = f"{url.blob}/" if url.blob and not url.blob.endswith("/") else url.blob
    place = url.with_blob(f"{folder}azstoragetorch-bench-{secrets.token_hex(8)}")
    rows = []
    try:
        cases = _cases(session, place, size * MiB, count)
        with session.output.progress("measuring", len(cases) * (rounds + 1), unit="runs") as advance:
            for case in cases:
                seconds, cpu = [], []
                for number in range(rounds + 1):
                    begin, used = time.perf_counter(), _cpu()
                    case.run()
                    if number:
                        seconds.append(time.perf_counter() - begin)
                        cpu.append(_cpu() - used)
                    advance(1)
                rate = case.amount / statistics.median(seconds)
                burnt = statistics.median(cpu) / case.mebibytes * (GiB // MiB) if case.mebibytes else None
                session.output.record(
                    {"case": case.name, "rate": round(rate, 1), "unit": case.unit, "seconds": seconds}
                    | ({"cpu_seconds_per_gib": round(burnt, 3)} if burnt is not None else {})
                )
                rows.append([case.name, f"{rate:,.0f} {case.unit}", "" if burnt is None else f"{burnt:.2f}"])
    finally:
        _delete(session, place)
    peak = _peak()
    session.output.table("", ["case", "median rate", "CPU s/GiB"], rows)
    session.output.record({"summary": {"url": str(url), "size": size * MiB, "count": count, "peak_bytes": peak}})
    session.output.note(f"peak memory of the process: {peak / MiB:,.0f} MiB, including torch and the test data")


def _peak() -> int:
    """Peak memory of this process in bytes; 0 if the system does not report it."""
    if sys.platform == "win32":
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu() -> float:
    return sum(os.times()[:2])


def _cases(session: Session, place: BlobURL, size: int, count: int) -> list[_Case]:
    return [*_large_cases(session, place, size), *_small_cases(session, place, count)]


def _large_cases(session: Session, place: BlobURL, size: int) -> list[_Case]:
    import torch

    credential = session.access.credential(place)
    large, saved = f"{place}/large", f"{place}/saved.pt"
    data = memoryview(bytearray(os.urandom(MiB)) * (size // MiB))
    buffer = bytearray(size)
    state = {f"layer{number}": torch.ones(size // 4 // _TENSORS) for number in range(_TENSORS)}

    def write() -> None:
        with BlobIO(large, "wb", credential=credential) as blob:
            blob.write(data)

    def read() -> None:
        with BlobIO(large, "rb", credential=credential) as blob:
            blob.read()

    def readinto() -> None:
        with BlobIO(large, "rb", credential=credential) as blob:
            blob.readinto(buffer)

    def save() -> None:
        with BlobIO(saved, "wb", credential=credential) as blob:
            torch.save(state, blob)

    def load() -> None:
        with BlobIO(saved, "rb", credential=credential) as blob:
            torch.load(blob)

    runs = {"write": write, "read": read, "readinto": readinto, "torch.save": save, "torch.load": load}
    return [_Case(name, "MiB/s", size / MiB, run, size / MiB) for name, run in runs.items()]


def _small_cases(session: Session, place: BlobURL, count: int) -> list[_Case]:
    from torch.utils.data import DataLoader

    from azstoragetorch.datasets import BlobDataset, IterableBlobDataset

    credential = session.access.credential(place)
    container, prefix = str(place.with_blob("")), f"{place.blob}/samples/"

    def put() -> None:
        client = session.access.container(place, TransferConfig())
        sample = os.urandom(_SAMPLE)

        def put_one(number: int, _scope: Scope) -> None:
            client.blob(f"{prefix}{number:06d}").put(sample)

        client.engine.map(put_one, range(count), client.config.max_connections)

    def samples() -> None:
        dataset = IterableBlobDataset.from_container_url(container, prefix=prefix, credential=credential)
        found = sum(len(batch) for batch in DataLoader(dataset, batch_size=32, collate_fn=list))
        assert found == count, f"{found} samples, not {count}"

    def listing() -> None:
        found = len(BlobDataset.from_container_url(container, prefix=prefix, credential=credential))
        assert found == count, f"{found} names, not {count}"

    small = count * _SAMPLE / MiB
    return [
        _Case("small blobs written", "blobs/s", count, put, small),
        _Case("dataset", "samples/s", count, samples, small),
        _Case("listing", "names/s", count, listing, 0),
    ]


def _delete(session: Session, place: BlobURL) -> None:
    client = session.access.container(place, TransferConfig())
    prefix = f"{place.blob}/"
    names = [name for page in client.pages(prefix=prefix, uncommitted=True) for name in page.names]

    def delete(name: str, _scope: Scope) -> None:
        blob = client.blob(name)
        if not blob.delete():
            blob.put(b"")  # there are only staged blocks, which a committed blob replaces
            blob.delete()

    client.engine.map(delete, names, client.config.max_connections)
