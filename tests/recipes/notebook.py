"""Run the notebook; ``python -m tests.recipes.notebook`` stores the outputs of a run on Azurite in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "recipes/intro.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook: Any) -> Any:
    """Run *notebook* from top to bottom, and leave in it nothing that says when or on which machine it ran."""
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=580, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


if __name__ == "__main__":
    os.environ.pop("AZURE_CONTAINER_URL", None)
    nbformat.write(run(read()), NOTEBOOK)
