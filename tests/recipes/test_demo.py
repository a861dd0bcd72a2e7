"""The demo: a job that gets SIGTERM mid-epoch saves in its handler and resumes at the exact batch."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.demo.__main__ import Run, run_job
from recipes.demo.images import upload_digits
from recipes.demo.train import CHECKPOINT
from tests.azurite.container import Container

ROOT = Path(__file__).parent.parent.parent


def play(*command: str) -> str:
    """What the demo prints; its progress bar goes to stderr."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def check_story(told: str, *, stopped_in: int, epochs: int) -> float:
    """The job was stopped in one epoch and resumed in it, at the next batch; returns the final accuracy."""
    before, after = told.split("starting the job again")
    stop = re.search(rf"^SIGTERM in epoch {stopped_in}, while batch (\d+) of (\d+) changes", before, re.MULTILINE)
    assert stop is not None
    batch, batches = int(stop[1]), int(stop[2])
    assert f"its handler saved what batch {batch - 1} left: {CHECKPOINT}" in before
    assert re.findall(r"^epoch (\d+): acc", before, re.MULTILINE) == [str(n) for n in range(1, stopped_in)]
    assert f"resumed in epoch {stopped_in} at batch {batch}: loaded {CHECKPOINT}" in after
    counts = f"epoch {stopped_in}: {batch - 1} batches before and {batches - batch + 1} after; of "
    assert re.search(rf"^{counts}[\d,]+ images 0 were missed, 0 seen twice$", after, re.MULTILINE)
    assert re.findall(r"^epoch (\d+): acc", after, re.MULTILINE) == [str(n) for n in range(stopped_in, epochs + 1)]
    assert re.search(r"uploaded [\d,]+ bytes", told)
    assert told.count("; saved checkpoint.pt, ") == epochs
    both = re.search(
        r"^accuracy ([\d.]+)% with the stop and ([\d.]+)% without, the weights are equal", after, re.MULTILINE
    )
    assert both is not None
    assert both[1] == both[2]
    assert f"undisturbed: {epochs} epochs, accuracy {both[2]}%" in before
    assert "done:" in after
    return float(both[1])


def test_a_short_demo_tells_the_whole_story() -> None:
    told = play(sys.executable, "-m", "recipes.demo", "--epochs", "2", "--images", "160")
    check_story(told, stopped_in=2, epochs=2)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_make_demo_learns_to_read_digits() -> None:
    if shutil.which("make") is None or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("needs make and the .venv that `make setup` makes")
    assert check_story(play("make", "demo"), stopped_in=4, epochs=6) > 93


def final_weights(container: Container) -> dict[str, torch.Tensor]:
    state = torch.load(io.BytesIO(container.get(CHECKPOINT)))
    container.client.delete_blob(CHECKPOINT)
    assert (state["epoch"], state["batch"]) == (4, 0)
    weights: dict[str, torch.Tensor] = state["model"]
    return weights


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "by",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.exhaustive),
    ],
)
def test_a_stopped_and_resumed_job_ends_with_the_weights_of_one_never_stopped(
    container: Container, by: signal.Signals
) -> None:
    """After SIGTERM, the batches of an undisturbed run follow; SIGKILL leaves the last epoch that was finished."""
    upload_digits(container.url, container.key, 320)
    undisturbed = run_job(container.service, container.url, 3)
    never_stopped = final_weights(container)
    stopped = run_job(container.service, container.url, 3, 2, by=by)
    resumed = run_job(container.service, container.url, 3)
    middle = undisturbed.start["batches"] // 2
    if by == signal.SIGTERM:
        assert stopped.stop is not None
        assert (stopped.stop["epoch"], stopped.stop["batch"]) == (2, middle)
        assert stopped.batches + resumed.batches == undisturbed.batches
    else:
        assert stopped.stop is None
        assert (resumed.start["epoch"], resumed.start["batch"]) == (2, 0)
        assert stopped.batches == undisturbed.batches[: len(stopped.batches)]
        assert resumed.batches == [batch for batch in undisturbed.batches if batch[0] > 1]
    assert sorted(resumed.epochs[2]["seen"]) == sorted(undisturbed.epochs[2]["seen"]) == list(range(64, 320))
    assert resumed.epochs[3]["accuracy"] == undisturbed.epochs[3]["accuracy"]
    weights = final_weights(container)
    assert never_stopped.keys() == weights.keys()
    for name, expected in never_stopped.items():
        assert torch.equal(expected, weights[name]), name


STOPPED_IN_A_SAVE = """
import os, signal, sys
import recipes.demo.train as demo
from azstoragetorch.io import BlobIO

class Interrupted(BlobIO):
    def write(self, data, /):
        if os.environ.pop("STOP", None):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(data)

def report(event):
    if event["event"] == "batch" and event["batch"] == 1:
        os.environ["STOP"] = "1"
    demo.print_line(event)

demo.BlobIO = Interrupted
demo.Job(sys.argv[1], demo.credential_of_environment(), demo.CHECKPOINT, report).run(3)
"""


def test_a_signal_within_a_save_saves(container: Container) -> None:
    """The handler writes the same blob while the main thread does, and what the main thread began is dropped."""
    upload_digits(container.url, container.key, 80)
    service = container.service
    key = {"AZURE_STORAGE_ACCOUNT": service.account_name, "AZURE_STORAGE_KEY": service.account_key}
    command = [sys.executable, "-c", STOPPED_IN_A_SAVE, container.url]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | key, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"event": "stop", "epoch": 2, "batch": 0' in done.stdout
    state = torch.load(io.BytesIO(container.get(CHECKPOINT)))
    assert (state["epoch"], state["batch"]) == (2, 0)
    resumed: Run = run_job(service, container.url, 2)
    assert (resumed.start["epoch"], list(resumed.epochs)) == (2, [2])
