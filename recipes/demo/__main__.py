"""``python -m recipes.demo``: upload, train, kill -9 in mid-epoch, resume; then save on two ranks and load on one."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import ContainerClient
from tqdm import tqdm

from recipes.azurite import Azurite, run_azurite
from recipes.demo.images import upload_digits
from recipes.demo.ranks import show_ranks
from recipes.demo.train import CHECKPOINT

ROOT = Path(__file__).parents[2]
MiB = 1 << 20


def run_job(azurite: Azurite, container_url: str, epochs: int, kill_in: int | None = None) -> None:
    """Train in a process of its own and show how it gets on; kill it half-way through epoch *kill_in*."""
    command = [sys.executable, "-m", "recipes.demo.train", container_url, "--epochs", str(epochs)]
    key = {"AZURE_STORAGE_ACCOUNT": azurite.account_name, "AZURE_STORAGE_KEY": azurite.account_key}
    # A session of its own, so that its DataLoader workers die with it, as they do when a machine is lost.
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with (
        subprocess.Popen(command, cwd=ROOT, env=os.environ | key, **options) as job,
        tqdm(desc="training", unit="batch", mininterval=0.5) as bar,
    ):
        assert job.stdout is not None
        batches = 0
        try:
            for line in job.stdout:
                event = json.loads(line)
                match event["event"]:
                    case "start":
                        batches = event["batches"]
                        bar.total = batches * epochs
                        bar.update(batches * event["epoch"])
                        if event["epoch"]:
                            bar.write(f"resumed after epoch {event['epoch']}: loaded {checkpoint(event)}")
                    case "batch":
                        bar.update()
                        bar.set_postfix(epoch=event["epoch"], loss=f"{event['loss']:.3f}", refresh=False)
                        if event["epoch"] == kill_in and event["batch"] == batches // 2:
                            os.killpg(job.pid, signal.SIGKILL)
                            bar.write(f"killed in epoch {kill_in} after batch {event['batch']} of {batches}")
                            return
                    case "epoch":
                        bar.write(describe(event))
            if job.wait():
                raise SystemExit(f"the training process failed with status {job.returncode}")
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)


def describe(event: dict[str, Any]) -> str:
    images, seconds = event["images"], event["seconds"]
    read = f"{images:,} images ({images / seconds:,.0f}/s), {rate(event['size'], seconds)}"
    saved = checkpoint({"size": event["checkpoint_size"], "seconds": event["checkpoint_seconds"]})
    return f"epoch {event['epoch']}: accuracy {event['accuracy']:.1%}; read {read}; saved {saved}"


def checkpoint(event: dict[str, Any]) -> str:
    return f"{CHECKPOINT}, {rate(event['size'], event['seconds'])}"


def rate(size: int, seconds: float) -> str:
    return f"{size:,} bytes at {size / MiB / seconds:.3g} MiB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on images in Azurite, kill the job, resume it.")
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
        print(f"uploaded {size:,} bytes of images to {url}", flush=True)
        run_job(azurite, url, options.epochs, kill_in=options.epochs // 2 + 1)
        print("starting the job again", flush=True)
        run_job(azurite, url, options.epochs)
        show_ranks(f"{url}/sharded", azurite.account_name, azurite.account_key, lambda text: print(text, flush=True))
        print("done: the job was killed once and lost no finished epoch")


if __name__ == "__main__":
    main()
