"""The notebook runs from top to bottom, and is kept with the outputs of such a run."""

from __future__ import annotations

import base64
import os
import re
from typing import Any

import pytest

from recipes.far import far_away
from tests.azurite.container import Container
from tests.recipes import notebook


def text_of(outputs: list[Any]) -> str:
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "has_sas", [pytest.param(False, marks=pytest.mark.exhaustive), pytest.param(True, marks=pytest.mark.slow)]
)
def test_it_runs_from_top_to_bottom(container: Container, monkeypatch: pytest.MonkeyPatch, has_sas: bool) -> None:
    """On an Azurite that it starts itself, and on a container whose URL has a SAS."""
    monkeypatch.delenv("AZURE_CONTAINER_URL", raising=False)
    if has_sas:
        monkeypatch.setenv("AZURE_CONTAINER_URL", container.sas_url)
    outputs = notebook.outputs(notebook.run(notebook.read()))
    plots = [output for output in outputs if "image/png" in output.get("data", {})]
    text = text_of(outputs)
    assert len(plots) == 2
    assert "resumed after batch 4" in text
    assert "ResourceWarning" not in text
    assert "sig=" not in text
    assert container.names() == []


def test_it_is_kept_with_the_outputs_of_one_run() -> None:
    """Every cell ran, in order, without a warning; nothing names the machine or the account."""
    stored = notebook.read()
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    outputs = notebook.outputs(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert re.findall(r"/home/|/root/|/work/|/tmp/|sig=|AccountKey", text_of(outputs)) == []


def test_its_last_plot_shows_what_its_text_says() -> None:
    """More connections read faster: the figure above the last plot is at least 4 for 16 connections."""
    stored = notebook.read()
    plots = [output for output in notebook.outputs(stored) if "image/png" in output.get("data", {})]
    assert len(plots) == 2
    assert all(base64.b64decode(plot.data["image/png"]).startswith(b"\x89PNG") for plot in plots)
    gain = re.search(r"16 connections read ([\d.]+) times as fast as one", text_of(notebook.outputs(stored)))
    assert gain is not None
    assert float(gain[1]) >= 4


def test_far_away_limits_a_connection_and_passes_every_byte(container: Container) -> None:
    """256 KiB at 256 KiB/s cannot arrive within a second."""
    import time

    from azure.storage.blob import BlobClient

    data = os.urandom(256 << 10)
    container.put("far.bin", data)
    with far_away(container.url, latency=0.01, rate=256 << 10) as url:
        start = time.monotonic()
        with BlobClient.from_blob_url(f"{url}/far.bin?{container.sas()}") as blob:
            assert blob.download_blob().readall() == data
        assert time.monotonic() - start >= 1


def test_far_away_needs_a_port() -> None:
    with pytest.raises(ValueError, match="does not name a port"), far_away("https://x.blob.core.windows.net/c"):
        pass
