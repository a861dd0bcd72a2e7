"""What users do with blobs, as functions that the fault matrix runs.

This module imports nothing from the tests, and uses only functions that the published connector also has, if possible.
As a program it runs in another interpreter, where another implementation of the package is installed. It reads one JSON
request per line and writes one JSON response per line.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

CONTAINER = "data"
BLOB = "blob"
MODEL = "model.pt"
FOLDER = "set/"
NUMEL = 30_000  # more than a checkpoint writes with one Put Blob, with the block size of the matrix
CHECKPOINT = "checkpoint"
SIZE = 4 * 65536 - 100  # four parts
SET_SIZES = (0, 1, 999, 65535, 65536, 65537, 150_000, 7000, 30_000, 12_345)


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def state(seed: int, numel: int = NUMEL) -> dict[str, torch.Tensor]:
    """A state dict of three tensors, with values from *seed*."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{number}": torch.randn(numel + number, generator=generator) for number in range(3)}


def bytes_of(values: dict[str, Any]) -> bytes:
    return b"".join(values[key].numpy().tobytes() for key in sorted(values))


@dataclass
class Place:
    """The container of an operation, and its credential."""

    url: str  # of the container
    credential: Any = False
    options: dict[str, Any] = field(default_factory=dict)  # for one of the implementations only

    def blob(self, name: str) -> str:
        return f"{self.url}/{name}"

    @contextmanager
    def open(self, name: str, mode: str) -> Iterator[Any]:
        from azstoragetorch.io import BlobIO

        with BlobIO(self.blob(name), mode, credential=self.credential, **self.options) as file:  # type: ignore[arg-type]
            yield file


def read_all(place: Place) -> bytes:
    with place.open(BLOB, "rb") as file:
        data: bytes = file.read()
    return data


def readinto(place: Place) -> bytes:
    buffer = bytearray(SIZE + 10)
    with place.open(BLOB, "rb") as file:
        count = file.readinto(buffer)
    return bytes(buffer[:count])


def small_reads(place: Place) -> bytes:
    pieces = []
    with place.open(BLOB, "rb") as file:
        while piece := file.read(3000):
            pieces.append(piece)
    return b"".join(pieces)


def torch_load(place: Place) -> bytes:
    with place.open(MODEL, "rb") as file:
        return bytes_of(torch.load(file, weights_only=True))


def torch_save(place: Place) -> bytes:
    with place.open(MODEL, "wb") as file:
        torch.save(state(2), file)
    return b""


def torch_save_small(place: Place) -> bytes:
    with place.open(MODEL, "wb") as file:
        torch.save(state(2, 100), file)
    return b""


def epoch(place: Place, workers: int = 0) -> bytes:
    from torch.utils.data import DataLoader

    from azstoragetorch.datasets import IterableBlobDataset

    dataset: Any = IterableBlobDataset.from_container_url(
        place.url, prefix=FOLDER, credential=place.credential, **place.options
    )
    samples: Any = iter(DataLoader(dataset, None, num_workers=workers))
    try:
        return _joined((sample["url"], sample["data"]) for sample in samples)
    finally:
        if workers:
            samples._shutdown_workers()  # if left to the garbage collector, torch waits 5 s for each worker


def epoch_of_workers(place: Place) -> bytes:
    return epoch(place, workers=2)


def pipe_chain(place: Place) -> bytes:
    from azstoragetorch.datapipes import AzureBlobFileLister, AzureBlobFileReader

    access = {"credential": place.credential, **place.options}
    pipe: Any = AzureBlobFileLister(place.blob(FOLDER), **access).sharding_filter()
    return _joined(AzureBlobFileReader(pipe, **access))


def dcp_save(place: Place) -> bytes:
    import torch.distributed.checkpoint as dcp

    from azstoragetorch.checkpoint import BlobStorageWriter

    writer = BlobStorageWriter(place.blob(CHECKPOINT), credential=place.credential, **place.options)
    dcp.save(state(2), storage_writer=writer, no_dist=True)
    return b""


def dcp_load(place: Place) -> bytes:
    import torch.distributed.checkpoint as dcp

    from azstoragetorch.checkpoint import BlobStorageReader

    target = {key: torch.zeros_like(value) for key, value in state(1).items()}
    reader = BlobStorageReader(place.blob(CHECKPOINT), credential=place.credential, **place.options)
    dcp.load(target, storage_reader=reader, no_dist=True)
    return bytes_of(target)


def _joined(samples: Any) -> bytes:
    """The data of all samples, each once, in the order of their URLs."""
    found = [(url.partition("?")[0], data) for url, data in samples]
    names = [url for url, _ in found]
    if len(names) != len(set(names)):
        raise AssertionError(f"samples came twice: {sorted(names)}")
    return b"".join(data for _, data in sorted(found))


OPERATIONS: dict[str, Callable[[Place], bytes]] = {
    "read all": read_all,
    "readinto": readinto,
    "small reads": small_reads,
    "torch.load": torch_load,
    "torch.save": torch_save,
    "torch.save, one block": torch_save_small,
    "epoch": epoch,
    "epoch, 2 workers": epoch_of_workers,
    "pipes": pipe_chain,
    "dcp.save": dcp_save,
    "dcp.load": dcp_load,
}


class Tokens:
    """A ``TokenCredential`` that returns the given tokens in order, and then the last one again."""

    def __init__(self, *tokens: str) -> None:
        self._tokens = list(tokens)

    def get_token(self, *_scopes: str, **_options: Any) -> Any:
        from azure.core.credentials import AccessToken

        token = self._tokens.pop(0) if len(self._tokens) > 1 else self._tokens[0]
        return AccessToken(token, int(time.time()) + 3600)


def names_of(error: BaseException) -> list[str]:
    """The class names of *error*, of its causes, and of the errors that torch collected in it."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        this = todo.pop(0)
        if isinstance(this, BaseException) and this not in found:
            found.append(this)
            todo += [this.__cause__, this.__context__]
            todo += [failure[0] for failure in getattr(this, "failures", {}).values()]
    return [type(this).__name__ for this in found]


def main() -> None:
    """Report that everything is loaded, then serve requests ``{"operation", "url", "tokens"}`` until the input ends."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        credential = Tokens(*request["tokens"]) if request["tokens"] else False
        begin = time.monotonic()
        try:
            data = OPERATIONS[request["operation"]](Place(request["url"], credential))
            answer = {"digest": hashlib.sha256(data).hexdigest()}
        except BaseException as error:  # noqa: BLE001 - the error is the response
            traceback.print_exc()
            answer = {"error": names_of(error), "message": str(error)[:300]}  # type: ignore[dict-item]
        answer["seconds"] = round(time.monotonic() - begin, 2)  # type: ignore[assignment]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
