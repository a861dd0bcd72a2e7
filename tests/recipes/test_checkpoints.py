"""The recipes for checkpoints: a killed job that goes on with more ranks, the demo of ranks."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
import torch

from azstoragetorch import weights
from azstoragetorch.checkpoint import list_checkpoints
from recipes.checkpoints import actors, lora
from recipes.checkpoints.train import train
from recipes.demo.ranks import show_ranks
from tests.azurite.container import Container
from tests.checkpoint.ranks import Ranks, context, run_ranks

STEPS, EVERY = 14, 4


def run_to_the_end(rank: int, url: str, credential: Any) -> tuple[float, list[int]]:
    seen: list[int] = []
    loss = train(url, steps=STEPS, every=EVERY, credential=credential, report=lambda step, _: seen.append(step))
    return loss, seen


def run_and_be_killed(rank: int, url: str, credential: Any, together: Barrier) -> None:
    def report(step: int, loss: float) -> None:
        if step == 11:
            together.wait()  # a rank that is behind would see the other's end, and raise
            os.kill(os.getpid(), signal.SIGKILL)

    train(url, steps=STEPS, every=EVERY, credential=credential, report=report)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_job_goes_on_with_twice_the_ranks_to_the_same_loss(container: Container) -> None:
    undisturbed = run_ranks(2, run_to_the_end, container.blob_sas_url("undisturbed"), None, timeout=180)
    assert undisturbed[0][1] == list(range(1, STEPS + 1))
    url = container.blob_url("killed")
    together = context.Barrier(2)  # kept until the ranks have it
    assert Ranks(2, run_and_be_killed, url, container.key, together).results(timeout=180) == [None, None]
    resumed = run_ranks(4, run_to_the_end, url, container.key, timeout=180)
    first = resumed[0][1][0]
    assert first in (5, 9)  # after the last save that was complete when it died
    assert resumed[0][1] == list(range(first, STEPS + 1))
    for loss, _ in resumed:
        assert loss == pytest.approx(undisturbed[0][0], rel=1e-9)
    kept = list_checkpoints(url, credential=container.key)
    assert [name.rpartition("/")[2] for name in kept] == ["step-12", "step-14"]


@pytest.mark.slow
def test_two_ranks_save_and_one_loads(container: Container) -> None:
    told: list[str] = []
    show_ranks(
        container.blob_url("sharded"), container.service.account_name, container.service.account_key, told.append
    )
    assert "2 ranks saved 32 MiB" in told[0]
    assert "1 rank loaded the same" in told[1]


def fine_tune(url: str, credential: Any, killed_at: int) -> None:
    def report(step: int, loss: float, sent: int) -> None:
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    lora.train(url, steps=12, every=2, credential=credential, report=report)


@pytest.mark.slow
def test_fine_tuning_is_killed_and_resumes_and_uploads_only_the_adapters(container: Container) -> None:
    credential = container.sas_that_copies()
    undisturbed = lora.train(container.blob_url("undisturbed"), steps=12, every=2, credential=credential)
    url = container.blob_url("killed")
    process = context.Process(target=fine_tune, args=(url, credential, 7))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    seen: list[tuple[int, int]] = []
    model = lora.train(
        url, steps=12, every=2, credential=credential, report=lambda step, _, sent: seen.append((step, sent))
    )
    assert [step for step, _ in seen] == [7, 8, 9, 10, 11, 12]  # after the last save before it was killed
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert all(0 < sent < 0.05 * whole for step, sent in seen if step % 2 == 0)
    for key, value in undisturbed.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_two_actors_have_the_weights_of_the_trainer(container: Container) -> None:
    url = container.blob_url("policy")
    with ThreadPoolExecutor(2) as pool:
        followers = [pool.submit(actors.act, f"actor {number}", url, 7, container.key) for number in (1, 2)]
        published = list(actors.train(url, 7, container.key))
        digests = [follower.result(timeout=120) for follower in followers]
    assert [result.is_full for result in published] == [True, *[False] * 4, True, False, False]
    assert all(result.nbytes < 0.05 * result.total for result in published if not result.is_full)
    late = actors.make_weights()
    subscriber = weights.subscribe(url, credential=container.key)
    assert subscriber.poll() == 7
    subscriber.apply(late)
    assert digests == [actors.digest_of(late)] * 2
