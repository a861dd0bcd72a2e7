"""``ls``: blobs and folders that were created with the SDK."""

from __future__ import annotations

import pytest

from tests.azurite.container import Container
from tests.cli.conftest import Command

NAMES = ["a.txt", "train", "train/0.jpg", "train/deep/1.jpg", "train-2/x"]


@pytest.fixture
def filled(container: Container) -> Container:
    for name in NAMES:
        container.put(name, b"x" * len(name))
    return container


@pytest.mark.parametrize(
    ("path", "options", "shown"),
    [
        ("", [], ["a.txt", "train", "train-2/", "train/"]),
        ("", ["-r"], sorted(NAMES)),
        ("/train", [], ["train", "train/0.jpg", "train/deep/"]),
        ("/train/", [], ["train/0.jpg", "train/deep/"]),
        ("/train/", ["--recursive"], ["train/0.jpg", "train/deep/1.jpg"]),
        ("/a.txt", [], ["a.txt"]),
        ("", ["--prefix", "train-"], ["train-2/"]),
        ("/train/", ["--prefix", "de", "-r"], ["train/deep/1.jpg"]),
    ],
)
def test_what_is_shown(filled: Container, command: Command, path: str, options: list[str], shown: list[str]) -> None:
    ended = command("ls", filled.url + path, *options)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == shown


def test_sizes(filled: Container, command: Command) -> None:
    filled.put("big", bytes(3 << 19))
    ended = command("ls", filled.url, "--long")
    assert f"{3 << 19}" in ended.out
    assert "3 blobs" in ended.err
    assert "2 folders" in ended.err
    assert "1.5 MiB" in command("ls", filled.url, "--human").out
    assert command("ls", filled.url, "--long", "--quiet").err == ""


def test_dates(filled: Container, command: Command) -> None:
    """The dates of the last change, in UTC; they are requested only if they are shown."""
    changed = filled.client.get_blob_client("a.txt").get_blob_properties().last_modified
    shown = changed.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert any(shown in line and "a.txt" in line for line in command("ls", "-l", filled.url).out.splitlines())
    assert shown in command("ls", "-l", filled.blob_url("a.txt")).out
    assert command("ls", "-l", "--json", filled.blob_url("a.txt")).records[0]["modified"] == shown


def test_json_has_all_facts(filled: Container, command: Command) -> None:
    records = command("ls", filled.url, "--json").records
    assert {"prefix": "train/"} in records
    found = next(record for record in records if record.get("name") == "a.txt")
    properties = filled.client.get_blob_client("a.txt").get_blob_properties()
    assert found == {"name": "a.txt", "size": 5, "etag": properties.etag, "url": filled.blob_url("a.txt")}


def test_names_do_not_steer_the_terminal(container: Container, command: Command) -> None:
    container.put("[red]\u202e\x9b2J ü", b"")
    assert command("ls", container.url).out == "[red]\\u202e\\x9b2J ü\n"
    assert command("ls", container.url, "--json").records[0]["name"] == "[red]\u202e\x9b2J ü"


def test_an_empty_container_is_not_an_error(container: Container, command: Command) -> None:
    ended = command("ls", container.url)
    assert (ended.code, ended.out) == (0, "")
