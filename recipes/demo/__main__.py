"""``python -m recipes.demo``: train, SIGTERM mid-epoch, resume at the exact batch; then two ranks save, one loads."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import ContainerClient
from tqdm import tqdm

from azstoragetorch import join_url
from azstoragetorch.io import BlobIO
from recipes.azurite import Azurite, run_azurite
from recipes.demo.images import upload_digits
from recipes.demo.ranks import show_ranks
from recipes.demo.train import CHECKPOINT

ROOT = Path(__file__).parents[2]
UNDISTURBED = "undisturbed.pt"


@dataclass
class Run:
    """What one process of the job reported."""

    start: dict[str, Any] = field(default_factory=dict)
    batches: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """Epoch, number in it, and the numbers of the images, for each batch that was finished."""
    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)
    stop: dict[str, Any] | None = None


def run_job(
    azurite: Azurite,
    container_url: str,
    epochs: int,
    stop_in: int | None = None,
    *,
    by: signal.Signals = signal.SIGTERM,
    checkpoint: str = CHECKPOINT,
    title: str = "training",
) -> Run:
    """Train in a separate process and show how it gets on; send it the signal *by* half-way through epoch *stop_in*."""
    command = [sys.executable, "-m", "recipes.demo.train", container_url, "--epochs", str(epochs)]
    command += ["--checkpoint", checkpoint] + ([] if stop_in is None else ["--hold-in", str(stop_in)])
    key = {"AZURE_STORAGE_ACCOUNT": azurite.account_name, "AZURE_STORAGE_KEY": azurite.account_key}
    # A separate session, so that its DataLoader workers die with it, as they do when a machine is lost.
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    run = Run()
    with (
        subprocess.Popen(command, cwd=ROOT, env=os.environ | key, **options) as job,
        tqdm(desc=title, unit="batch", mininterval=0.5) as bar,
    ):
        assert job.stdout is not None
        try:
            for line in job.stdout:
                event = json.loads(line)
                note(run, event, bar, epochs)
                if event["event"] == "holding" and by == signal.SIGTERM:
                    job.send_signal(by)
                elif event["event"] == "holding":
                    os.killpg(job.pid, by)
            if job.wait() not in (0, -by):
                raise SystemExit(f"the training process failed with status {job.returncode}")
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    return run


def note(run: Run, event: dict[str, Any], bar: Any, epochs: int) -> None:
    """Keep *event* in *run* and show it in *bar*."""
    match event["event"]:
        case "start":
            run.start = event
            bar.total = event["batches"] * epochs
            bar.update(event["batches"] * (event["epoch"] - 1) + event["batch"])
        case "batch":
            run.batches.append((event["epoch"], event["batch"], event["ids"]))
            bar.update()
            bar.set_postfix(epoch=event["epoch"], loss=f"{event['loss']:.3f}", refresh=False)
        case "epoch":
            run.epochs[event["epoch"]] = event
        case "stop":
            run.stop = event


def say(line: str) -> None:
    print(line, flush=True)


def show_epochs(run: Run) -> None:
    for epoch, event in run.epochs.items():
        say(f"epoch {epoch}: accuracy {event['accuracy']:.1%}; saved {written(event)}")


def written(event: dict[str, Any]) -> str:
    return f"{CHECKPOINT}, {event['checkpoint_size']:,} bytes"


def show_stop(stopped: Run) -> None:
    """What the signal handler did."""
    stop = stopped.stop
    if stop is None:
        raise SystemExit("the job saved nothing when it got SIGTERM")
    epoch, batch, batches = stop["epoch"], stop["batch"], stopped.start["batches"]
    say(f"SIGTERM in epoch {epoch}, while batch {batch + 1} of {batches} changes the weights")
    say(f"its handler saved what batch {batch} left: {written(stop)}")


def show_resumed(stopped: Run, resumed: Run, undisturbed: Run) -> None:
    """Count the images of the epoch with the stop: in all of it, and before and after."""
    start = resumed.start
    epoch = start["epoch"]
    say(f"resumed in epoch {epoch} at batch {start['batch'] + 1}: loaded {written(start)}")
    before = [batch for batch in stopped.batches if batch[0] == epoch]
    after = [batch for batch in resumed.batches if batch[0] == epoch]
    times = Counter(number for _, _, ids in before + after for number in ids)
    expected = set(undisturbed.epochs[epoch]["seen"])
    missed, twice = len(expected - set(times)), sum(count > 1 for count in times.values())
    say(
        f"epoch {epoch}: {len(before)} batches before and {len(after)} after; of {len(expected):,} images "
        f"{missed} were missed, {twice} seen twice"
    )
    if missed or twice or before + after != [batch for batch in undisturbed.batches if batch[0] == epoch]:
        raise SystemExit("these are not the batches of the run that was never stopped")


def same_weights(container_url: str, credential: Any) -> bool:
    """Whether both jobs ended with the same bits."""
    models = []
    for name in (CHECKPOINT, UNDISTURBED):
        with BlobIO(join_url(container_url, name), "rb", credential=credential) as blob:
            models.append(torch.load(blob)["model"])
    one, other = models
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def play(azurite: Azurite, url: str, credential: Any, epochs: int) -> None:
    """A job that is never stopped, and one that is; both have to end the same."""
    undisturbed = run_job(azurite, url, epochs, checkpoint=UNDISTURBED, title="undisturbed")
    say(f"undisturbed: {epochs} epochs, accuracy {undisturbed.epochs[epochs]['accuracy']:.1%}")
    stopped = run_job(azurite, url, epochs, epochs // 2 + 1)
    show_epochs(stopped)
    show_stop(stopped)
    say("starting the job again")
    resumed = run_job(azurite, url, epochs)
    show_resumed(stopped, resumed, undisturbed)
    show_epochs(resumed)
    if not same_weights(url, credential):
        raise SystemExit("the weights are not those of the run that was never stopped")
    say(
        f"accuracy {resumed.epochs[epochs]['accuracy']:.1%} with the stop and "
        f"{undisturbed.epochs[epochs]['accuracy']:.1%} without, the weights are equal bit by bit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on images in Azurite, stop the job mid-epoch, resume it.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, help="how many of the 1,797 images to use")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be 2 or more: there is nothing to resume after a single one")

    with run_azurite() as azurite:
        credential = AzureNamedKeyCredential(azurite.account_name, azurite.account_key)
        url = f"{azurite.account_url}/demo"
        with ContainerClient.from_container_url(url, credential=credential) as container:
            container.create_container()
        size = upload_digits(url, credential, options.images)
        say(f"uploaded {size:,} bytes of images to {url}")
        play(azurite, url, credential, options.epochs)
        show_ranks(join_url(url, "sharded"), azurite.account_name, azurite.account_key, say)
        say("done: the job was stopped once and lost no batch")


if __name__ == "__main__":
    main()
