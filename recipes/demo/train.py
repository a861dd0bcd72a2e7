"""A training job that survives being killed: after each epoch its whole state is a blob."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import ResourceNotFoundError
from torch import nn
from torch.utils.data import DataLoader

from azstoragetorch.io import BlobIO
from recipes.demo.images import digit_images, read_labels

CHECKPOINT = "checkpoint.pt"
BATCH_SIZE = 32
WORKERS = 2


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def train(container_url: str, credential: Any, epochs: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Train until *epochs* are done, from the checkpoint in the container if there is one.

    *report* is told what happens: the start, each batch, each epoch. Each epoch shuffles by its own number, so
    a job that was resumed ends with the very weights of one that never stopped.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    checkpoint_url = f"{container_url}/{CHECKPOINT}"

    labels = read_labels(container_url, credential)
    held_back = len(labels) // 5
    images = digit_images(container_url, credential, labels[held_back:], shuffle=True)
    training = DataLoader(images, BATCH_SIZE, num_workers=WORKERS, persistent_workers=True)
    validation = DataLoader(
        digit_images(container_url, credential, labels[:held_back]),
        256,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    # Each worker makes batches of its own share.
    shares = [len(range(worker, len(labels) - held_back, WORKERS)) for worker in range(WORKERS)]
    batches = sum(math.ceil(share / BATCH_SIZE) for share in shares)

    began = time.perf_counter()
    finished = size = 0
    try:
        with BlobIO(checkpoint_url, "rb", credential=credential) as blob:
            state = torch.load(blob)
            size = blob.size
    except ResourceNotFoundError:
        pass  # the first run
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        finished = state["epoch"]
    seconds = time.perf_counter() - began
    report({"event": "start", "epoch": finished, "batches": batches, "size": size, "seconds": seconds})

    for epoch in range(finished + 1, epochs + 1):
        began = time.perf_counter()
        count = size = correct = 0
        images.set_epoch(epoch)
        for batch, (pixels, digits, sizes) in enumerate(training, 1):
            loss = nn.functional.cross_entropy(model(pixels), digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += len(sizes)
            size += int(sizes.sum())
            report({"event": "batch", "epoch": epoch, "batch": batch, "loss": loss.item()})
        with torch.no_grad():
            for pixels, digits, sizes in validation:
                correct += int((model(pixels).argmax(1) == digits).sum())
                count += len(sizes)
                size += int(sizes.sum())
        seconds = time.perf_counter() - began

        began = time.perf_counter()
        with BlobIO(checkpoint_url, "wb", credential=credential) as blob:
            state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, blob)
            checkpoint_size = blob.tell()
        report(
            {
                "event": "epoch",
                "epoch": epoch,
                "accuracy": correct / held_back,
                "images": count,
                "size": size,
                "seconds": seconds,
                "checkpoint_size": checkpoint_size,
                "checkpoint_seconds": time.perf_counter() - began,
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on the digits in a container; reports are lines of JSON.")
    parser.add_argument("container_url")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    credential = None  # whatever DefaultAzureCredential finds
    if "AZURE_STORAGE_KEY" in os.environ:
        credential = AzureNamedKeyCredential(os.environ["AZURE_STORAGE_ACCOUNT"], os.environ["AZURE_STORAGE_KEY"])
    train(options.container_url, credential, options.epochs, lambda event: print(json.dumps(event), flush=True))


if __name__ == "__main__":
    main()
