"""The datasets to copy do what they say, on Azurite."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from recipes.datasets import distributed, images, train
from tests.azurite.container import Container
from tests.recipes import holding

ROOT = Path(__file__).parents[2]


def names(count: int) -> Counter[str]:
    return Counter(f"{train.FOLDER}{number:05d}.pt" for number in range(count))


def test_training_continues_in_mid_epoch(container: Container) -> None:
    train.upload(container.url, container.key, 30)
    used = train.train(container.url, container.key, 3) + train.train(container.url, container.key, 5)
    assert Counter(used) == names(30)  # two workers of 15 make 8 batches
    again = train.train(container.url, container.key, 8)
    assert Counter(again) == names(30)
    assert again != used
    weights = torch.load(io.BytesIO(container.get(train.CHECKPOINT)))["model"]
    container.client.delete_blob(train.CHECKPOINT)
    assert train.train(container.url, container.key, 16) == used + again
    never_stopped = torch.load(io.BytesIO(container.get(train.CHECKPOINT)))["model"]
    assert all(torch.equal(weights[name], never_stopped[name]) for name in weights)


def test_a_sas_in_the_url_will_do(container: Container) -> None:
    train.upload(container.sas_url, None, 8)
    assert Counter(train.train(container.sas_url, None, 2, workers=1)) == names(8)
    assert train.CHECKPOINT in container.names()


def start(
    container: Container, ranks: int, workers: int = 2, module: str = "tests.recipes.finishing"
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", module, container.url, "--workers", str(workers)]
    key = {"AZURE_STORAGE_ACCOUNT": container.service.account_name, "AZURE_STORAGE_KEY": container.service.account_key}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | key | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def kill(job: subprocess.Popen[str]) -> None:
    """With its ranks, which torchrun puts into sessions of their own, and their workers; torchrun first."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in table.splitlines()]
    family = [job.pid]
    for member in family:
        family += [pid for pid, parent in parents if parent == member]
    for member in family:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def finish(job: subprocess.Popen[str], *, kill_at: int | None = None) -> list[dict[str, Any]]:
    """What it reports until it ends, or until it is killed with all its workers once it holds in step *kill_at*."""
    assert job.stdout is not None
    told = []
    try:
        for line in job.stdout:
            if line.startswith("{"):
                told.append(json.loads(line))
                if told[-1].get("holding", -1) == kill_at:
                    return told
        assert job.wait() == 0
        return told
    finally:
        if job.poll() is None:
            kill(job)
        job.wait()
        job.stdout.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(2, marks=pytest.mark.exhaustive),
        pytest.param(3, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.exhaustive),
    ],
)
def test_two_ranks_are_killed_and_any_number_continues_in_mid_epoch(container: Container, ranks: int) -> None:
    """What the model had seen when it was saved, and what was read after, is each blob once."""
    count = 48  # divides by all shards in question
    train.upload(container.url, container.key, count)
    told = finish(start(container, 2, module="tests.recipes.holding"), kill_at=holding.STEP)
    assert [event["step"] for event in told if "step" in event] == list(range(1, holding.STEP))
    state = torch.load(io.BytesIO(container.get(distributed.CHECKPOINT)))
    assert state["epoch"] == 0
    assert Counter(state["seen"]) < names(count)
    assert len(state["seen"]) == 2 * 2 * (holding.STEP - 2)  # two ranks, batches of two; saved every other step
    told = finish(start(container, ranks, workers=2 if ranks == 2 else 0))
    first, second = (event for event in told if "seen" in event)
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert Counter(second["seen"]) == names(count)
    if ranks == 1:
        assert Counter(first["seen"]) == names(count)
    else:  # what is left need not divide by the new number of shards
        assert Counter(first["seen"]) <= names(count)
        assert len(first["seen"]) > count - 4


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_and_broken_ones_named(container: Container, tmp_path: Path, workers: int) -> None:
    for number in range(12):
        label = ("cat", "dog")[number % 2]
        stored = io.BytesIO()
        Image.new("RGB", (200, 100 + number), (255 * (number % 2), 0, 0)).save(stored, "JPEG" if number % 3 else "PNG")
        container.put(f"photos/{label}/{number:02d}.jpg", stored.getvalue())
    container.put("photos/dog/broken.jpg", b"no image")
    for _ in range(2):
        loader = images.make_loader(
            container.url,
            "photos/",
            ["cat", "dog"],
            container.key,
            batch_size=4,
            workers=workers,
            cache_dir=tmp_path,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = list(loader)
        labels = torch.cat([label for _, label in batches])
        pixels = torch.cat([pixel for pixel, _ in batches])
        assert sorted(labels.tolist()) == [0] * 6 + [1] * 6
        assert pixels.shape == (12, 3, images.SIDE, images.SIDE)
        assert torch.equal((pixels[:, 0].mean((1, 2)) > 0.9).long(), labels)
        if not workers:
            assert any("dog/broken.jpg" in str(entry.message) for entry in caught)
    assert len(list(tmp_path.glob("??/*.blob"))) == 13
