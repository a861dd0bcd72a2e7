"""``bench``: every case has a result, and the container is unchanged."""

from __future__ import annotations

from tests.azurite.container import Container
from tests.cli.conftest import Command

CASES = ["write", "read", "readinto", "torch.save", "torch.load", "small blobs written", "dataset", "listing"]
TINY = ("--size", "1", "--count", "5", "--rounds", "1")


def test_every_case_is_measured(container: Container, command: Command) -> None:
    container.put("mine", b"x")
    ended = command("bench", container.url, *TINY, "--json")
    assert ended.code == 0, ended.err
    *cases, summary = ended.records
    assert [case["case"] for case in cases] == CASES
    assert all(case["rate"] > 0 and len(case["seconds"]) == 1 for case in cases)
    assert summary["summary"]["peak_bytes"] > 0
    assert container.names() == ["mine"]


def test_for_people_it_is_a_table(container: Container, command: Command) -> None:
    ended = command("bench", f"{container.url}/folder/", *TINY)
    assert ended.code == 0, ended.err
    assert all(case in ended.out for case in CASES)
    assert "MiB/s" in ended.out
    assert container.names() == []
