"""Two ranks save one state dict, each its shards; one process loads it whole.

``python -m recipes.demo.ranks URL`` does it with the account key in ``AZURE_STORAGE_ACCOUNT`` and
``AZURE_STORAGE_KEY``; the demo runs it against Azurite.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from azure.core.credentials import AzureNamedKeyCredential
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, inspect_checkpoint

RANKS = 2
MiB = 1 << 20


def weights() -> dict[str, torch.Tensor]:
    """What all ranks together hold: 32 MiB."""
    generator = torch.Generator().manual_seed(0)
    return {f"layer{n}": torch.randn(1024, 1024, generator=generator) for n in range(8)}


def save_shards(rank: int, meeting: str, url: str, name: str, key: str) -> None:
    """What one rank does."""
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    shards = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in weights().items()}
    dcp.save(shards, storage_writer=BlobStorageWriter(url, credential=AzureNamedKeyCredential(name, key)))
    dist.destroy_process_group()


def show_ranks(url: str, name: str, key: str, say: Callable[[str], object] = print) -> None:
    """Save on two ranks, load on one, and check that it is the same."""
    credential = AzureNamedKeyCredential(name, key)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "store").as_uri()
        mp.spawn(save_shards, (meeting, url, name, key), nprocs=RANKS)
    summary = inspect_checkpoint(url, credential=credential)
    say(f"{RANKS} ranks saved {summary.nbytes / MiB:.0f} MiB in {summary.blobs} blobs, each rank its half")
    target = {key: torch.zeros_like(value) for key, value in weights().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.load(target, storage_reader=BlobStorageReader(url, credential=credential))
    if not all(torch.equal(target[key], value) for key, value in weights().items()):
        raise SystemExit("what was loaded is not what was saved")
    say(f"1 rank loaded the same from it: {len(target)} tensors, equal bit by bit")


if __name__ == "__main__":
    show_ranks(sys.argv[1], os.environ["AZURE_STORAGE_ACCOUNT"], os.environ["AZURE_STORAGE_KEY"])
