"""``torchrun --nproc-per-node 2 -m recipes.datasets.distributed URL``: kill it, start it again, on any number of ranks.

Every few steps one blob holds the model and what the shards of all ranks have consumed. After a restart each sample of
the epoch that the model has not seen is read exactly once, whatever the number of ranks and workers is then.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch.distributed as dist
from azure.core.exceptions import ResourceNotFoundError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader

from azstoragetorch import join_url
from azstoragetorch.datasets import IterableBlobDataset, merge_states
from azstoragetorch.io import BlobIO
from recipes.access import credential_of_environment, split_sas
from recipes.datasets.train import FOLDER, read

CHECKPOINT = "distributed.pt"
SAVE_EVERY = 2  # steps


def train(container_url: str, credential: Any, *, epochs: int, workers: int) -> None:
    container_url, credential = split_sas(container_url, credential)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dataset = IterableBlobDataset.from_container_url(
        container_url,
        prefix=FOLDER,
        credential=credential,
        transform=read,
        shuffle=True,
        shard_by="rank_and_worker",
        even="drop",  # ranks that make unequal numbers of steps would wait for each other forever
    )
    loader = StatefulDataLoader(dataset, batch_size=2, num_workers=workers)

    epoch, seen = 0, []  # names of the blobs of this epoch that the saved model was trained on
    try:
        with BlobIO(join_url(container_url, CHECKPOINT), "rb", credential=credential) as blob:
            state = torch.load(blob)
    except ResourceNotFoundError:
        pass  # the first run
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, seen = state["epoch"], state["seen"]
        # Into the dataset and not the loader, which takes only as many workers as it had.
        dataset.load_state_dict(state["data"])

    def save() -> list[str]:
        mine = (loader.state_dict(), used)
        everybodys: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybodys, mine)
        by_now = seen + [name for _, names in everybodys for name in names]
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "seen": by_now}
            state["data"] = merge_states([states for states, _ in everybodys])
            with BlobIO(join_url(container_url, CHECKPOINT), "wb", credential=credential) as blob:
                torch.save(state, blob)
        return by_now

    while epoch < epochs:
        dataset.set_epoch(epoch)
        used: list[str] = []
        for step, (names, vectors) in enumerate(loader, 1):
            loss = (model(vectors).squeeze(1) - vectors.sum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            used += names
            if step % SAVE_EVERY == 0:
                save()
            if rank == 0:
                print(json.dumps({"epoch": epoch, "step": step, "loss": loss.item()}), flush=True)
        by_now = save()
        if rank == 0:
            print(json.dumps({"epoch": epoch, "seen": sorted(by_now)}), flush=True)
        epoch, seen = epoch + 1, []


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on the vectors in a container, on all ranks of torchrun.")
    parser.add_argument("container_url", help="a SAS may be in it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        train(options.container_url, credential_of_environment(), epochs=options.epochs, workers=options.workers)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
