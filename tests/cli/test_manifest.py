"""``manifest``: what it prints, and its exit codes."""

from __future__ import annotations

import hashlib
import json

from tests.azurite.container import Container
from tests.cli.conftest import Command


def test_make_show_verify_diff(container: Container, command: Command) -> None:
    for name in ("train/a", "train/b", "train/c", "other"):
        container.put(name, b"12345")
    first, second = (f"{container.url}/manifests/{day}" for day in (1, 2))
    made = command("manifest", "make", container.url, first, "--prefix", "train/")
    assert made.code == 0, made.err
    assert made.out.startswith(f"3 blobs, 15 B, of {container.url} below 'train/', listed at 20")
    assert command("manifest", "show", first).out == made.out
    (shown,) = command("manifest", "show", first, "--json").records
    assert (shown["count"], shown["prefix"], shown["container_url"]) == (3, "train/", container.url)

    again = command("manifest", "make", container.url, first, "--prefix", "train/")
    assert (again.code, "there is a manifest" in again.err) == (1, True)
    verified = command("manifest", "verify", first)
    assert (verified.code, verified.out) == (0, "")
    assert "3 blobs, 15 B: the manifest is complete" in verified.err
    assert "the container has the same blobs" in verified.err

    container.put("train/a", b"new")
    container.put("train/d", b"")
    container.client.delete_blob("train/c")
    changed = command("manifest", "verify", first)
    assert (changed.code, changed.out.splitlines()) == (1, ["~ train/a", "- train/c", "+ train/d"])
    assert "1 added, 1 removed, 1 changed" in changed.err
    assert command("manifest", "verify", first, "--no-listing").code == 0
    assert command("manifest", "make", container.url, second, "--prefix", "train/").code == 0
    assert command("manifest", "diff", first, second).out == changed.out
    records = command("manifest", "diff", second, first, "--json").records
    assert records[0] == {"change": "changed", "name": "train/a"}
    assert records[-1] == {"summary": {"added": 1, "removed": 1, "changed": 1}}


def test_errors_say_what_is_wrong(container: Container, command: Command) -> None:
    missing = command("manifest", "show", f"{container.url}/none")
    assert (missing.code, "there is no manifest" in missing.err) == (3, True)
    assert command("manifest", "make", container.url, container.url).code == 2
    container.put("m/manifest.json", b"{")
    damaged = command("manifest", "verify", f"{container.url}/m")
    assert (damaged.code, "truncated" in damaged.err) == (1, True)
    other = "https://account.blob.core.windows.net/c"
    elsewhere = command("manifest", "make", other, f"{container.url}/m")
    assert (elsewhere.code, "different accounts" in elsewhere.err) == (2, True)


def test_verify_and_diff_say_which(container: Container, command: Command) -> None:
    """Truncated, of another container, or with duplicate names; what is older than the data is tested above."""
    container.put("a", b"1")
    url, other = f"{container.url}/m", f"{container.url}/other"
    assert command("manifest", "make", container.url, url, "--prefix", "a").code == 0
    (part,) = (name for name in container.names() if name.endswith(".parquet"))
    document = json.loads(container.get("m/manifest.json"))
    for name in (part, "manifest.json"):
        container.put(f"other/{name.removeprefix('m/')}", container.get(f"m/{name.removeprefix('m/')}"))
    container.put("other/manifest.json", json.dumps({**document, "container": f"{container.url}2"}).encode())
    found = command("manifest", "diff", url, other)
    assert (found.code, f"is of another container: {container.url}2, not {container.url}" in found.err) == (1, True)

    twice = [document["parts"][0]] * 2
    digest = hashlib.blake2b(bytes.fromhex(twice[0]["digest"]) * 2, digest_size=16).hexdigest()
    doubled = {**document, "parts": twice, "rows": 2, "digest": digest}
    container.put("m/manifest.json", json.dumps(doubled).encode())
    found = command("manifest", "verify", url)
    assert (found.code, "the name 'a' is there twice" in found.err) == (1, True)

    container.put(part, container.get(part)[:-1])
    for verb in (["verify", url], ["diff", url, url]):
        found = command("manifest", *verb)
        assert (found.code, "the part is truncated: it has" in found.err) == (1, True)
