"""The demo: a job that is killed in mid-epoch goes on from its checkpoint blob."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.demo.__main__ import run_job
from recipes.demo.images import upload_digits
from recipes.demo.train import CHECKPOINT
from tests.azurite.container import Container

ROOT = Path(__file__).parent.parent.parent


def play(*command: str) -> str:
    """What the demo prints; its progress bar goes to stderr."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def check_story(told: str, *, killed_in: int, epochs: int) -> float:
    """The job was killed in one epoch and went on from the one before; returns the final accuracy."""
    assert re.search(rf"^killed in epoch {killed_in} after batch \d+", told, re.MULTILINE)
    before, after = told.split("starting the job again")
    assert re.findall(r"^epoch (\d+):", before, re.MULTILINE) == [str(n) for n in range(1, killed_in)]
    assert f"resumed after epoch {killed_in - 1}: loaded {CHECKPOINT}" in after
    assert re.findall(r"^epoch (\d+):", after, re.MULTILINE) == [str(n) for n in range(killed_in, epochs + 1)]
    assert re.search(r"uploaded [\d,]+ bytes", told)
    assert told.count("MiB/s; saved") == epochs
    assert "done:" in after
    accuracies = re.findall(r"^epoch \d+: accuracy ([\d.]+)%", after, re.MULTILINE)
    return float(accuracies[-1])


def test_a_short_demo_tells_the_whole_story() -> None:
    told = play(sys.executable, "-m", "recipes.demo", "--epochs", "2", "--images", "160")
    check_story(told, killed_in=2, epochs=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_make_demo_learns_to_read_digits() -> None:
    if shutil.which("make") is None or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("needs make and the .venv that `make setup` makes")
    assert check_story(play("make", "demo"), killed_in=4, epochs=6) > 93


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_and_resumed_job_ends_with_the_weights_of_one_never_stopped(container: Container) -> None:
    def final_state(kill_in: int | None) -> dict[str, torch.Tensor]:
        if kill_in is not None:
            run_job(container.service, container.url, 3, kill_in)
        run_job(container.service, container.url, 3)
        state = torch.load(io.BytesIO(container.get(CHECKPOINT)))
        container.client.delete_blob(CHECKPOINT)
        assert state["epoch"] == 3
        return state["model"]

    upload_digits(container.url, container.key, 320)
    never_stopped, resumed = final_state(None), final_state(2)
    assert never_stopped.keys() == resumed.keys()
    for name, weights in never_stopped.items():
        assert torch.equal(weights, resumed[name]), name
