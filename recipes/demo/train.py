"""A training job that survives a stop at any moment: it saves on SIGTERM, mid-epoch, and at the end of each epoch.

A signal handler runs inside whatever the main thread is doing, perhaps with the optimizer half-way through its weights.
So the job keeps a copy of its last finished batch, and the handler saves that copy.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from azure.core.exceptions import ResourceNotFoundError
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from azstoragetorch import join_url
from azstoragetorch.io import BlobIO
from recipes.access import credential_of_environment
from recipes.demo.images import digit_images, read_labels

CHECKPOINT = "checkpoint.pt"
BATCH_SIZE = 32
WORKERS = 2

Report = Callable[[dict[str, Any]], object]


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


class Job:
    """A model in training on the images of a container, and the blob that holds its state.

    *report* gets what happens: the start, each batch, the stop, each epoch. Each epoch shuffles by its own number,
    and the state holds the place in it, so a job that resumes ends with the very weights of one that never stopped.
    """

    def __init__(self, container_url: str, credential: Any, checkpoint: str, report: Report) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._credential, self._report = credential, report
        self._url = join_url(container_url, checkpoint)
        self._model = make_model()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-3)
        labels = read_labels(container_url, credential)
        self._held_back = len(labels) // 5
        self._images = digit_images(container_url, credential, labels[self._held_back :], shuffle=True)
        self._training = StatefulDataLoader(self._images, BATCH_SIZE, num_workers=WORKERS)
        validation = digit_images(container_url, credential, labels[: self._held_back])
        self._validation = StatefulDataLoader(validation, 256, num_workers=WORKERS)
        # Each worker makes batches from its share of the blobs.
        shares = [len(range(worker, len(labels) - self._held_back, WORKERS)) for worker in range(WORKERS)]
        self._batches = sum(math.ceil(share / BATCH_SIZE) for share in shares)
        self._saved = self._state(epoch=1, batch=0, seen=[])

    def hold_in(self, epoch: int) -> None:
        """Wait for the signal half-way through *epoch*, in a batch that has changed the weights and is not finished."""

        def hold(*_: object) -> None:
            if self._saved["epoch"] == epoch and self._saved["batch"] == self._batches // 2:
                self._report({"event": "holding", "epoch": epoch, "batch": self._saved["batch"] + 1})
                while True:
                    time.sleep(0.05)

        self._optimizer.register_step_post_hook(hold)

    def run(self, epochs: int) -> None:
        """Train until *epochs* are done, from the checkpoint if there is one. SIGTERM saves and ends the process."""
        self._resume()
        signal.signal(signal.SIGTERM, self._stop)
        while self._saved["epoch"] <= epochs:
            self._train_epoch()

    def _state(self, *, epoch: int, batch: int, seen: list[int]) -> dict[str, Any]:
        """A copy of all that it takes to continue behind *batch* of *epoch*, in which *seen* were trained on."""
        return {
            "epoch": epoch,
            "batch": batch,
            "seen": seen,
            "model": copy.deepcopy(self._model.state_dict()),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "data": self._training.state_dict() if batch else None,
        }

    def _save(self) -> dict[str, Any]:
        with BlobIO(self._url, "wb", credential=self._credential) as blob:
            torch.save(self._saved, blob)
            size = blob.tell()
        return {"checkpoint_size": size}

    def _stop(self, *_: object) -> None:
        """Save the last finished batch, here and now: the machine is about to be taken away."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        saved = self._save()
        self._report({"event": "stop", "epoch": self._saved["epoch"], "batch": self._saved["batch"], **saved})
        raise SystemExit

    def _resume(self) -> None:
        size = 0
        try:
            with BlobIO(self._url, "rb", credential=self._credential) as blob:
                self._saved = torch.load(blob)
                size = blob.size
        except ResourceNotFoundError:
            pass  # the first run
        else:
            self._model.load_state_dict(self._saved["model"])
            self._optimizer.load_state_dict(copy.deepcopy(self._saved["optimizer"]))
        epoch, batch = self._saved["epoch"], self._saved["batch"]
        start = {"event": "start", "epoch": epoch, "batch": batch, "batches": self._batches}
        self._report({**start, "checkpoint_size": size})

    def _train_epoch(self) -> None:
        epoch, batch, seen = self._saved["epoch"], self._saved["batch"], list(self._saved["seen"])
        self._images.set_epoch(epoch)
        if self._saved["data"] is not None:
            self._training.load_state_dict(self._saved["data"])
        for pixels, digits, _, numbers in self._training:
            loss = nn.functional.cross_entropy(self._model(pixels), digits)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            batch += 1
            seen = seen + numbers.tolist()  # a new list: the state that is saved holds the one before
            self._saved = self._state(epoch=epoch, batch=batch, seen=seen)  # one step: the handler sees old or new
            ids = numbers.tolist()
            self._report({"event": "batch", "epoch": epoch, "batch": batch, "loss": loss.item(), "ids": ids})
        correct = self._validate()
        self._saved = self._state(epoch=epoch + 1, batch=0, seen=[])
        done = {"event": "epoch", "epoch": epoch, "accuracy": correct / self._held_back, "seen": seen}
        self._report({**done, **self._save()})

    def _validate(self) -> int:
        """How many of the images that were held back are classified correctly."""
        correct = 0
        with torch.no_grad():
            for pixels, digits, _, _ in self._validation:
                correct += int((self._model(pixels).argmax(1) == digits).sum())
        return correct


def print_line(event: dict[str, Any]) -> None:
    """Print one line of JSON with one system call. A signal handler may print too, so ``print`` must not be used."""
    os.write(1, f"{json.dumps(event)}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on the digits in a container; reports are lines of JSON.")
    parser.add_argument("container_url", help="a SAS may be in it")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="the name of the blob for the state")
    parser.add_argument("--hold-in", type=int, help="wait for SIGTERM inside a step of this epoch")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # a call of torchdata's
    job = Job(options.container_url, credential_of_environment(), options.checkpoint, print_line)
    if options.hold_in is not None:
        job.hold_in(options.hold_in)
    job.run(options.epochs)


if __name__ == "__main__":
    main()
