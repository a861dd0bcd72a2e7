"""Train on the blobs of a container; after an interrupt, resume at the next batch.

``python -m recipes.datasets.train URL --upload 100 --steps 20``
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from azure.core.exceptions import ResourceNotFoundError
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from azstoragetorch import join_url
from azstoragetorch.datasets import Blob, IterableBlobDataset
from azstoragetorch.io import BlobIO
from recipes.access import credential_of_environment, split_sas

CHECKPOINT = "checkpoint.pt"
FOLDER = "vectors/"


def upload(container_url: str, credential: Any, count: int) -> None:
    """Something to learn: vectors of eight numbers, each a blob."""
    container_url, credential = split_sas(container_url, credential)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        with BlobIO(join_url(container_url, f"{FOLDER}{number:05d}.pt"), "wb", credential=credential) as blob:
            torch.save(torch.randn(8, generator=generator), blob)


def read(blob: Blob) -> tuple[str, torch.Tensor]:
    with blob.reader() as reader:
        return blob.blob_name, torch.load(reader)


def train(container_url: str, credential: Any, steps: int, *, workers: int = 2) -> list[str]:
    """Train for *steps* more batches; returns the names of the blobs they were made of."""
    container_url, credential = split_sas(container_url, credential)
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dataset = IterableBlobDataset.from_container_url(
        container_url, prefix=FOLDER, credential=credential, transform=read, shuffle=True
    )
    loader = StatefulDataLoader(dataset, batch_size=4, num_workers=workers)

    epoch = 0
    try:
        with BlobIO(join_url(container_url, CHECKPOINT), "rb", credential=credential) as blob:
            state = torch.load(blob)
    except ResourceNotFoundError:
        pass  # the first run
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        epoch = state["epoch"]

    used: list[str] = []
    while True:
        dataset.set_epoch(epoch)
        for names, vectors in loader:
            loss = (model(vectors).squeeze(1) - vectors.sum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            used += names
            steps -= 1
            if not steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"loader": loader.state_dict(), "epoch": epoch}
                with BlobIO(join_url(container_url, CHECKPOINT), "wb", credential=credential) as blob:
                    torch.save(state, blob)
                return used
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on vectors in a container, from the last checkpoint if any.")
    parser.add_argument("container_url", help="a SAS may be in it")
    parser.add_argument("--upload", type=int, default=0, help="first store this many vectors")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    credential = credential_of_environment()
    upload(options.container_url, credential, options.upload)
    names = train(options.container_url, credential, options.steps)
    print(f"{options.steps} batches, from {names[0]} to {names[-1]}; run this again to continue")


if __name__ == "__main__":
    main()
