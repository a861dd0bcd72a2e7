"""The same operations as adlfs 2026.8 on many shapes of paths. ``shapes.json`` has what each of them does.

Each row is a path, with the result of each operation here and, where it differs, in adlfs. A result that begins with
an exclamation mark is the error that is raised. The differences are explained in ``docs/coming-from/adlfs.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from azstoragetorch.filesystem import AzureBlobFileSystem
from tests.azurite.container import Container
from tests.filesystem.places import on_azurite
from tests.support import ROOT

ROWS: dict[str, dict[str, list[Any]]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
BLOBS = """a|a/b|dir/one.txt|dir/two.txt|dir/sub/three.txt|dir/sub/deep/four.bin|with space/x y.txt|pct%20/50%.txt
ünï/ö.txt|日本/語.txt|q?mark.txt|hash#tag.txt|brackets[1].txt|slash//double.txt|folder/|folder2/|folder2/file|plus+sign.txt
UPPER/Case.TXT|date=2026-01-01/part-0.parquet|date=2026-01-02/part-0.parquet|.hidden|tilde~x|semi;colon|amp&and"""


def operations(fs: AzureBlobFileSystem) -> dict[str, Callable[[str], Any]]:
    def info(path: str) -> list[Any]:
        found = fs.info(path)
        return [found["name"], found["type"], found["size"]]

    return {
        "strip": fs._strip_protocol,
        "glob": lambda path: sorted(fs.glob(path)),
        "info": info,
        "exists": fs.exists,
        "isdir": fs.isdir,
        "isfile": fs.isfile,
        "ls": lambda path: sorted([entry["name"], entry["type"]] for entry in fs.ls(path)),
        "find": lambda path: sorted(fs.find(path)),
        "find1": lambda path: sorted(fs.find(path, maxdepth=1)),
        "cat": lambda path: len(fs.cat_file(path)),
        "open": lambda path: len(fs.open(path).read()),
    }


def test_what_each_operation_does(container: Container) -> None:
    for number, name in enumerate(BLOBS.replace("\n", "|").split("|")):
        container.put(name, b"" if name.endswith("/") else b"x" * (number + 1))
    fs, name = on_azurite(container), container.name
    fs.mkdir(f"{name}-empty")
    calls = operations(fs)
    wrong = []
    for shape, row in ROWS.items():
        path = shape.replace("shapes", name) if "shapes" in shape else shape.replace("empty", f"{name}-empty", 1)
        for operation, (expected, *_) in row.items():
            try:
                result = json.dumps(calls[operation](path), ensure_ascii=False)
            except Exception as error:  # noqa: BLE001 - which one is part of the table
                result = json.dumps(f"!{type(error).__name__}")
            result = result.replace(f"{name}-empty", "empty").replace(name, "shapes")
            if json.loads(result) != expected:
                wrong.append((shape, operation, result, expected))
    fs.rmdir(f"{name}-empty")
    assert wrong == []


def why_it_differs(shape: str, operation: str, ours: Any, theirs: Any) -> str | None:
    """What the page says about a difference, by its first words."""
    if shape in ("", "/"):
        return "**The root of the account**"
    if shape == "sh*":
        return "**A name that no container can have**"
    if operation in ("cat", "open") and ours == "!IsADirectoryError":
        return "**A directory that is read**"
    if operation == "info" and theirs[1:] == ["directory", None] and ours[1] == "directory":
        return "**The size of a directory**"
    if operation == "find1":
        return "**`find(maxdepth=)`**"
    if "folder" in shape or (operation == "find" and shape.rstrip("/").endswith("shapes")):
        return "**A blob whose name ends with a slash**"
    if shape.endswith("/"):
        return "**A slash at the end of a path**"
    if shape == "shapes/a":
        return "**A file and a directory at one path**"
    if shape == "shapes/dir/**":
        return "**`**` at the end of a pattern**"
    return None


def test_every_difference_is_explained() -> None:
    page = (ROOT / "docs/coming-from/adlfs.md").read_text(encoding="utf-8")
    reasons = {
        (shape, operation): why_it_differs(shape, operation, *results)
        for shape, row in ROWS.items()
        for operation, results in row.items()
        if len(results) == 2
    }
    assert len(ROWS) >= 60
    assert [key for key, reason in reasons.items() if reason is None] == []
    assert [reason for reason in set(reasons.values()) if str(reason) not in page] == []


@pytest.mark.parametrize("shape", ROWS)
def test_a_shape_without_its_protocol_stays_the_same(shape: str) -> None:
    stripped = AzureBlobFileSystem._strip_protocol(shape)
    assert AzureBlobFileSystem._strip_protocol(stripped) == stripped
    assert AzureBlobFileSystem._strip_protocol(f"azt://{stripped}") == stripped
