"""A training job that survives being killed: after each epoch its whole state is a blob."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from azure.core.exceptions import ResourceNotFoundError
from torch import nn
from torch.utils.data import DataLoader

from azstoragetorch.io import BlobIO
from recipes.demo.images import DigitImages, read_labels

CHECKPOINT = "checkpoint.pt"
BATCH_SIZE = 32


@dataclass
class Started:
    """The job begins after *epoch* finished epochs; the checkpoint it loaded had *size* bytes."""

    epoch: int
    batches: int  # in each epoch
    size: int
    seconds: float  # that loading took


@dataclass
class BatchDone:
    epoch: int
    batch: int
    loss: float


@dataclass
class EpochDone:
    epoch: int
    accuracy: float  # on the images held back
    images: int
    size: int  # bytes of the images
    seconds: float
    checkpoint_size: int
    checkpoint_seconds: float


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


def train(container_url: str, credential: Any, epochs: int, events: Connection, workers: int = 2) -> None:
    """Train until *epochs* are done, from the checkpoint in the container if there is one.

    Each epoch shuffles by its own number, so a job that was resumed ends with the very weights of one that
    never stopped.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    checkpoint_url = f"{container_url}/{CHECKPOINT}"

    labels = read_labels(container_url, credential)
    held_back = len(labels) // 5
    shuffle = torch.Generator()
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    training = DataLoader(
        DigitImages(container_url, credential, labels[held_back:]),
        BATCH_SIZE,
        shuffle=True,
        generator=shuffle,
        **options,
    )
    validation = DataLoader(DigitImages(container_url, credential, labels[:held_back]), 256, **options)

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
    events.send(Started(finished, len(training), size, time.perf_counter() - began))

    for epoch in range(finished + 1, epochs + 1):
        began = time.perf_counter()
        images = size = correct = 0
        shuffle.manual_seed(epoch)
        for batch, (pixels, digits, sizes) in enumerate(training, 1):
            loss = nn.functional.cross_entropy(model(pixels), digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images += len(sizes)
            size += int(sizes.sum())
            events.send(BatchDone(epoch, batch, loss.item()))
        with torch.no_grad():
            for pixels, digits, sizes in validation:
                correct += int((model(pixels).argmax(1) == digits).sum())
                images += len(sizes)
                size += int(sizes.sum())
        seconds = time.perf_counter() - began

        began = time.perf_counter()
        with BlobIO(checkpoint_url, "wb", credential=credential) as blob:
            state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, blob)
            checkpoint_size = blob.tell()
        saving = time.perf_counter() - began
        events.send(EpochDone(epoch, correct / held_back, images, size, seconds, checkpoint_size, saving))
