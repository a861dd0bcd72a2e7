"""Manifests of reports of Blob Inventory, in the form that Azure documents."""

from __future__ import annotations

import csv
import io
import json
import warnings
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import azstoragetorch._samples.inventory
from azstoragetorch.datasets import IterableBlobDataset
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.manifest import ManifestError, compare_manifest, make_manifest
from tests.azurite.container import Container
from tests.support import QUICK

NAMES = ["b", "a/1", 'a/"2", é', "a/line\nbreak", "z"]
FIELDS = ["Name", "Content-Length", "Last-Modified", "Etag", "hdi_isfolder", "Deleted", "Snapshot", "IsCurrentVersion"]
# Rows that are not blobs now, or are of another container.
OTHERS = [
    {"Name": "a", "hdi_isfolder": True},
    {"Name": "b", "Snapshot": "2026-11-27T00:00:00Z"},
    {"Name": "b", "IsCurrentVersion": False},
    {"Name": "gone", "Deleted": True},
]


def report(container: Container, kind: str, *, fields: list[str] = FIELDS, **changes: Any) -> str:
    """Store a report on *container* in two files, and return its URL."""
    rows = []
    for item in container.client.list_blobs():
        if not item.name.startswith("inventory/"):
            rows.append({"Name": f"{container.name}/{item.name}", "Content-Length": item.size, "Etag": item.etag})
    rows += [{"Content-Length": 1, "Etag": "0x1", **row, "Name": f"{container.name}/{row['Name']}"} for row in OTHERS]
    rows += [{"Name": f"{container.name}-2/b", "Content-Length": 9, "Etag": "0x2"}]
    rows.sort(key=lambda row: row["Name"][::-1])
    files = []
    for number, part in enumerate((rows[::2], rows[1::2])):
        name = f"inventory/2026/11/27/rule_{number}.{kind}"
        complete = [{field: row.get(field) for field in fields} for row in part]
        data = as_csv(complete, fields) if kind == "csv" else as_parquet(complete)
        container.put(name, data)
        files.append({"blob": name, "size": len(data)})
    document = {
        "destinationContainer": container.name,
        "endpoint": container.service.account_url,
        "files": files,
        "inventoryStartTime": "2026-11-27T01:02:03Z",
        "ruleDefinition": {"filters": {}, "format": kind, "objectType": "blob", "schemaFields": fields},
        "ruleName": "rule",
        "status": "Succeeded",
        **changes,
    }
    container.put("inventory/2026/11/27/rule-manifest.json", json.dumps(document).encode())
    return f"{container.url}/inventory/2026/11/27/rule-manifest.json"


def as_csv(rows: list[dict[str, Any]], fields: list[str]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: str(value).lower() if isinstance(value, bool) else value for key, value in row.items()})
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def filled(container: Container) -> Container:
    for name in NAMES:
        container.put(name, name.encode())
    return container


def make(container: Container, url: str, **options: Any) -> str:
    manifest = f"{container.url}/inventory/manifest-{len(container.names())}"
    info = make_manifest(
        container.url, manifest, inventory_url=url, credential=container.key, transfer=QUICK, **options
    )
    assert info.made == "2026-11-27T01:02:03Z"
    return manifest


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_report_becomes_a_manifest(filled: Container, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azstoragetorch._samples.inventory, "_PIECE", 7)
    manifest = make(filled, report(filled, kind))
    dataset = IterableBlobDataset.from_manifest(manifest, credential=filled.key, transfer=QUICK)
    assert [sample["data"].decode() for sample in dataset] == sorted(NAMES)
    found = compare_manifest(manifest, credential=filled.key)
    assert (found.removed, found.changed) == (0, 0)
    assert all(change.name.startswith("inventory/") for change in found.changes)
    filled.put("b", b"new")
    with pytest.raises(BlobChangedError):
        list(dataset)
    below = make(filled, report(filled, kind), prefix="a/")
    dataset = IterableBlobDataset.from_manifest(below, credential=filled.key, transfer=QUICK)
    assert dataset.metadata.count == 3


def test_without_etags_changes_are_not_noticed(filled: Container) -> None:
    with pytest.warns(UserWarning, match="no Etag"):
        manifest = make(filled, report(filled, "csv", fields=["Name", "Content-Length"]), prefix="z")
    filled.put("z", b"!")
    dataset = IterableBlobDataset.from_manifest(manifest, credential=filled.key, transfer=QUICK)
    assert [sample["data"] for sample in dataset] == [b"!"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "Failed"}, "has the status 'Failed'"),
        ({"ruleDefinition": None}, "not the document of a report"),
        ({"files": [{"blob": "inventory/none.csv", "size": 1}]}, "is missing"),
        ({"files": [{"blob": "z", "size": 2}]}, "has 1 bytes, and should have 2"),
        ({"files": [{"blob": "z", "size": 1}]}, "first line of the report has no Name"),
        ({"files": [{}]}, "damaged"),
    ],
)
def test_a_report_that_cannot_be_used(filled: Container, changes: dict[str, Any], message: str) -> None:
    url = report(filled, "csv", **changes)
    with pytest.raises(ManifestError, match=message):
        make(filled, url)


def test_a_report_that_is_limited_to_other_blobs(filled: Container) -> None:
    rule = {"filters": {"prefixMatch": [f"{filled.name}/a"]}, "format": "csv", "schemaFields": FIELDS}
    url = report(filled, "csv", ruleDefinition=rule)
    with pytest.raises(ManifestError, match="limited to"):
        make(filled, url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(filled, url, prefix="a/")


def test_a_file_that_ends_in_a_row(filled: Container) -> None:
    url = report(filled, "csv")
    name = "inventory/2026/11/27/rule_1.csv"
    data = filled.get(name)[:-12]
    filled.put(name, data)
    document = json.loads(filled.get("inventory/2026/11/27/rule-manifest.json"))
    document["files"][1]["size"] = len(data)
    filled.put("inventory/2026/11/27/rule-manifest.json", json.dumps(document).encode())
    with pytest.raises(ManifestError, match="truncated or damaged"):
        make(filled, url)


def test_a_report_is_not_a_manifest(filled: Container) -> None:
    with pytest.raises(ValueError, match="is a report of Blob Inventory: make a manifest of it"):
        IterableBlobDataset.from_manifest(report(filled, "csv"), credential=filled.key)
