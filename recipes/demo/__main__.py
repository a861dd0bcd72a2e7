"""``python -m recipes.demo``: upload, train, kill -9 in mid-epoch, resume."""

from __future__ import annotations

import argparse
import multiprocessing
from multiprocessing.process import BaseProcess
from typing import Any

from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import ContainerClient
from tqdm import tqdm

from recipes.azurite import run_azurite
from recipes.demo.images import upload_digits
from recipes.demo.train import CHECKPOINT, BatchDone, EpochDone, Started, train

MiB = 1 << 20


def run_job(container_url: str, credential: Any, epochs: int, kill_in: int | None = None) -> EpochDone | None:
    """Train in a process of its own; kill it half-way through epoch *kill_in*. Returns its last epoch."""
    context = multiprocessing.get_context("spawn")
    events, reports = context.Pipe(duplex=False)
    job: BaseProcess = context.Process(target=train, args=(container_url, credential, epochs, reports))
    job.start()
    reports.close()  # so that the end of the job is the end of the events
    started: Started | None = None
    last: EpochDone | None = None
    try:
        with tqdm(desc="training", unit="batch", mininterval=0.5) as bar:
            while True:
                try:
                    event = events.recv()
                except EOFError:
                    break
                match event:
                    case Started():
                        started = event
                        bar.total = event.batches * epochs
                        bar.update(event.batches * event.epoch)
                        if event.epoch:
                            speed = rate(event.size, event.seconds)
                            bar.write(f"resumed after epoch {event.epoch}: {CHECKPOINT}, {speed}")
                    case BatchDone() if started:
                        bar.update()
                        bar.set_postfix(epoch=event.epoch, loss=f"{event.loss:.3f}", refresh=False)
                        if event.epoch == kill_in and event.batch == started.batches // 2:
                            job.kill()
                            bar.write(f"killed in epoch {event.epoch}, batch {event.batch} (SIGKILL)")
                            break
                    case EpochDone():
                        last = event
                        bar.write(describe(event))
    finally:
        job.kill()
        job.join()
    if kill_in is None and (last is None or last.epoch != epochs):
        raise SystemExit(f"the training process ended early, with status {job.exitcode}")
    return last


def describe(event: EpochDone) -> str:
    images = (
        f"{event.images:,} images, {rate(event.size, event.seconds)}, {event.images / event.seconds:,.0f}/s"
    )
    checkpoint = f"{CHECKPOINT}, {rate(event.checkpoint_size, event.checkpoint_seconds)}"
    return f"epoch {event.epoch}: accuracy {event.accuracy:.1%}; read {images}; saved {checkpoint}"


def rate(size: int, seconds: float) -> str:
    return f"{size / MiB:,.2f} MiB at {size / MiB / seconds:,.1f} MiB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on images in Azurite, kill the job, resume it.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, help="how many of the 1,797 images to use")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be 2 or more: there is nothing to resume after a single one")
    kill_in = options.epochs // 2 + 1

    with run_azurite() as azurite:
        credential = AzureNamedKeyCredential(azurite.account_name, azurite.account_key)
        url = f"{azurite.account_url}/demo"
        with ContainerClient.from_container_url(url, credential=credential) as container:
            container.create_container()
        size = upload_digits(url, credential, options.images)
        print(f"uploaded {size:,} bytes of images to {url}", flush=True)
        run_job(url, credential, options.epochs, kill_in)
        print("starting the job again", flush=True)
        last = run_job(url, credential, options.epochs)
        assert last is not None
        print(f"done: accuracy {last.accuracy:.1%} after {last.epoch} epochs, with the job killed once")


if __name__ == "__main__":
    main()
