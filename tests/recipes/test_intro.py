"""The notebook runs from top to bottom, and is kept without the outputs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.azurite.container import Container

NOTEBOOK = Path(__file__).parents[2] / "recipes/intro.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("has_sas", [False, True])
def test_it_runs_from_top_to_bottom(container: Container, monkeypatch: pytest.MonkeyPatch, has_sas: bool) -> None:
    """On an Azurite that it starts itself, and on a container whose URL has a SAS."""
    monkeypatch.delenv("AZURE_CONTAINER_URL", raising=False)
    if has_sas:
        monkeypatch.setenv("AZURE_CONTAINER_URL", container.sas_url)
    notebook = read()
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    plots = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert len(plots) == 2
    assert "resumed after batch 4" in text
    assert "ResourceWarning" not in text
    assert "sig=" not in text
    assert container.names() == []


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert cells
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []
