"""The page of recipes: each has a row and a command, and each command runs as printed."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from recipes.datasets.train import upload
from tests.azurite.container import Container
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^((?:python|torchrun) .*-m recipes\.(?!frameworks\.|models\.transformers).+)$", PAGE, re.MULTILINE
)
WITH_FRAMEWORKS = re.findall(r"^(python -m recipes\.(?:frameworks|models\.transformers).+)$", PAGE, re.MULTILINE)


def test_every_recipe_has_a_row_and_a_section() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*/*.py")}
    files -= {name for name in files if "/benchmarks/" in name or "/demo/" in name or name.endswith("__init__.py")}
    assert {name for name in files if name not in PAGE} == set()
    rows = re.findall(r"^\| \[`(recipes/[\w/.]+)`\]", PAGE, re.MULTILINE)
    assert set(rows) == files - {"recipes/checkpoints/manager.py"} | {"recipes/demo"}


def test_every_module_that_is_a_program_is_run() -> None:
    """Those with a ``main``, but for the demo and the benchmarks, which have ``make`` targets."""
    programs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "recipes").glob("*/*.py")
        if "\ndef main()" in path.read_text(encoding="utf-8") and path.parent.name not in ("benchmarks", "demo")
    }
    assert {
        name for command in [*COMMANDS, *WITH_FRAMEWORKS] for name in re.findall(r"recipes\.[\w.]+", command)
    } == programs


@pytest.mark.slow
@pytest.mark.timeout(170)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs_as_printed(container: Container, tmp_path: Path, command: str) -> None:
    photo = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(photo, "JPEG")
    for name in ("cat/1", "dog/2", "dog/3"):
        container.put(f"photos/{name}.jpg", photo.getvalue())
    container.put("logs/1.jsonl", b'{"step": 1}\n' * 300)
    upload(container.url, container.key, 16)
    words = shlex.split(command.replace("$url", container.url).replace("./cache", str(tmp_path / "cache")))
    words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run"]
    key = {"AZURE_STORAGE_ACCOUNT": container.service.account_name, "AZURE_STORAGE_KEY": container.service.account_key}
    result = subprocess.run(
        words, cwd=ROOT, env=os.environ | key, capture_output=True, text=True, timeout=160, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    expected = {
        "datasets.train": "20 batches, from vectors/",
        "datasets.distributed": '"loss":',
        "datasets.images": "epoch 1: 3 images in",
        "webdataset": "1000 images in 1 shards",
        "jsonlines": "300 records",
        "image": ", 3, 32, 32) from http",
        "checkpoints.train": "step 100: loss",
        "checkpoints.lora": "step 20: loss",
        "checkpoints.actors": "actor 2: step 8",
        "models.serving": "model.layers.1.mlp.down_proj.weight: (64, 32)",
    }
    assert next(text for name, text in expected.items() if name in command) in result.stdout
