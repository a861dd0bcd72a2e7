"""Saves, loads, cleaning and deleting at the same time, one request at a time: every order without a fault.

``python -m tests.interleavings`` runs all of them with each fault at each request.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from azure.core.exceptions import AzureError

from azstoragetorch._blob.client import BlobClient
from azstoragetorch.checkpoint import BlobStorageReader, _cleaning, _commit, _folder, _save, _writer

from .actors import ASYNC, CLEAN, CLEAN_ALL, DELETE, DELTA, DELTA_OF, KEEP, LOAD, RANKS, SAVE, Programs, predictable
from .explorer import Fault, Tally, replaced_transport
from .memory import Memory
from .table import DELTAS, STAGED, Combination, combinations, explore_all, wander_once


@pytest.fixture(autouse=True)
def _exploring() -> Iterator[None]:
    with replaced_transport(), predictable():
        yield


PAIRS = combinations(2)
LONG = [(DELETE, DELETE), (KEEP, KEEP)]  # of many requests that say little about each other
COMMIT = 5  # the index of the request that commits a save: after one read, two uploads and two checks


@pytest.fixture(scope="module")
def programs() -> Programs:
    """Results for one kind of actor are used in all pairs with it."""
    return Programs()


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=pytest.mark.exhaustive) if pair.kinds in LONG else pair for pair in PAIRS],
    ids=str,
)
def test_two_at_once_in_every_order(pair: Combination, programs: Programs) -> None:
    """A committed checkpoint that was not deleted on purpose can be loaded, and no reported success is false."""
    tally = explore_all(pair, faults=False, programs=programs)
    assert tally.violations == []
    assert tally.runs


@pytest.mark.parametrize(
    "pair",
    [
        Combination((SAVE, SAVE), "nothing"),
        Combination((SAVE, SAVE), "a checkpoint"),
    ],
    ids=str,
)
def test_two_saves_with_a_lost_answer_or_a_death_at_any_request(pair: Combination) -> None:
    assert explore_all(pair, faults=True).violations == []


FIRST_SWEPT = Combination((DELTA_OF, CLEAN_ALL), "a base", "step-2")


@pytest.mark.parametrize("pair", [*DELTAS, FIRST_SWEPT], ids=str)
def test_a_save_with_a_base_in_every_order(pair: Combination) -> None:
    """What it composes is what was saved, also while the base is replaced or deleted."""
    tally = explore_all(pair, faults=False)
    assert tally.violations == []
    assert tally.runs


@pytest.mark.parametrize(
    "pair",
    [
        pair if pair.beginning == "a base" or LOAD in pair.kinds else pytest.param(pair, marks=pytest.mark.exhaustive)
        for pair in DELTAS
    ],
    ids=str,
)
def test_a_save_with_a_base_with_a_lost_answer_or_a_death_at_any_request(pair: Combination) -> None:
    assert explore_all(pair, faults=True).violations == []


def test_three_at_once_in_random_orders_with_random_faults(programs: Programs) -> None:
    randomness = random.Random(20261127)
    for _ in range(40):
        assert wander_once(randomness, programs).violations == []


def assert_safe(combination: Combination, first: list[tuple[int, str]], *, faults: bool) -> None:
    """Every order that begins with *first* is right, and there are many."""
    tally = explore_all(combination, faults=faults, first=first)
    assert tally.violations == []
    assert tally.runs > 100


LISTED_WHILE_STAGED = [
    (2, "GET run/step-2/.metadata"),  # a cleaner has listed what an interrupted save left
    (0, "PUT run/step-2/__0_0"),  # a block is copied from the base, and its blob is not committed yet
    (1, "DELETE"),  # another cleaner has listed that blob, too, and has put up its fence
]


@pytest.mark.parametrize("faults", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_fence_stays_while_blocks_are_staged(faults: bool) -> None:
    """The first cleaner replaces that fence and lifts its own; the save would commit what the second one deletes."""
    assert_safe(STAGED, LISTED_WHILE_STAGED, faults=faults)


def test_a_fence_that_is_lifted_while_blocks_are_staged_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    names = _folder.Folder.names
    monkeypatch.setattr(_folder.Folder, "names", lambda folder, **_: names(folder))
    assert explore_all(STAGED, faults=False, first=LISTED_WHILE_STAGED).violations


FENCED_WHEN_TAKEN_BACK = [
    (0, "PUT run/step-1/.metadata"),  # a save has seen nothing, and its data is there
    (1, "PUT run/step-1/__1_0"),  # so has another one, by two ranks
    (3, ""),  # the data of the first is deleted on purpose, before the other one has any
    (0, "HEAD run/step-1/__0_0"),  # the first commits, and has yet to look for its data
    (1, "PUT run/step-1/__0_0"),  # the other one has stored the data of one rank
    (2, "DELETE"),  # which a cleaner lists; it has put up its fence: the metadata of the first
    (1, "PUT run/step-1/.metadata"),  # the data of the other rank, which the cleaner has not listed, is there too
]
FOUR = Combination((SAVE, RANKS, CLEAN_ALL, DELETE), "nothing")


@pytest.mark.parametrize("faults", [False, True])
def test_a_save_that_takes_its_metadata_back_leaves_the_fence_of_others(faults: bool) -> None:
    """If its metadata was deleted, the other save would commit half of its data."""
    assert_safe(FOUR, FENCED_WHEN_TAKEN_BACK, faults=faults)


REMOVED_TWICE = [
    (0, "HEAD run/step-1/__0_0"),  # a first save has stored its data
    (1, "PUT run/step-1/.metadata"),  # which a cleaner has listed
    (2, "GET run/step-1/.metadata"),  # and a second one
    (0, "PUT run/step-1/.metadata"),  # the data was there
    (1, "DELETE run/step-1/__0_0"),  # the first cleaner has put up its fence
    (2, ""),  # the second one puts up another, deletes the data, and lifts its fence
    (1, "DELETE run/step-1/__0_0"),
]
THREE = Combination((SAVE, CLEAN_ALL, CLEAN_ALL), "nothing")


@pytest.mark.parametrize("faults", [False, True])
def test_an_empty_blob_that_a_cleaner_puts_for_a_moment_is_not_taken_for_data(faults: bool) -> None:
    """It does that to delete staged blocks, here because another cleaner has deleted the blob."""
    assert_safe(THREE, REMOVED_TWICE, faults=faults)


def test_a_look_for_any_blob_of_that_name_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _commit._Committed.check_kept

    def look(save: Any, path: str, etag: str) -> None:
        found = save.folder.blob(path).version()
        original(save, path, found.etag if found is not None else etag)

    monkeypatch.setattr(_commit._Committed, "check_kept", look)
    assert explore_all(THREE, faults=False, first=REMOVED_TWICE).violations


# -- the explorer detects wrong protocols ------------------------------------------------------------------------------


def unconditional(client: BlobClient, data: bytes, *, etag: str | None, properties: Any = MappingProxyType({})) -> Any:
    """An old version of the commit: overwrite anything, and again if the response is lost."""
    client.put(data)
    return True, client.get_properties()


def found(pair: Combination, fault: Fault | None = None) -> Tally:
    return explore_all(pair, faults=False, fault=fault)


def test_an_unconditional_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The response to one is lost, the other saves and deletes its data, then the first writes its metadata again."""
    monkeypatch.setattr(BlobClient, "replace", unconditional)
    assert found(Combination((SAVE, SAVE), "a checkpoint"), Fault(0, COMMIT, "lost after")).violations


def test_cleaning_without_a_fence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cleaning, "fence", lambda folder, rank, seen, cutoff, keeps=True: seen.etag or "none")
    monkeypatch.setattr(_cleaning, "lift", lambda *_: None)
    assert found(Combination((SAVE, CLEAN_ALL), "a checkpoint")).violations


def test_a_save_that_repeats_its_commit_past_every_fence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_commit, "_is_only_fenced", lambda *_: True)
    assert found(Combination((SAVE, CLEAN_ALL), "a checkpoint")).violations


def test_a_first_save_that_does_not_look_again_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_commit._Committed, "check_kept", lambda *_: None)
    assert found(Combination((SAVE, CLEAN_ALL), "nothing")).violations


def test_metadata_that_is_deleted_with_the_fence_that_it_carries_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(save: Any) -> bool:
        now = save.folder.see(save.rank)
        return now.content == save.content and save.folder.blob(".metadata").delete(etag=now.etag)

    monkeypatch.setattr(_commit._Committed, "_take_back", delete)
    assert explore_all(FOUR, faults=False, first=FENCED_WHEN_TAKEN_BACK).violations


def test_a_commit_that_is_not_looked_for_when_its_answer_is_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The save reports that it has no effect, but it is the checkpoint."""
    monkeypatch.setattr(BlobClient, "has_content", lambda *_: False)
    pair = Combination((SAVE, LOAD), "a checkpoint")
    assert found(pair, Fault(0, COMMIT, "lost after")).violations


def test_a_state_that_saves_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two saves by one writer that stores their state: the second overwrites that of the first."""

    def see(save: _save.Save) -> None:
        if save.seen is None and save.seeing is not None:
            save.seen = save.folder.see(save.metadata_rank)

    methods = {name: member for name, member in vars(_save.Saves).items() if callable(member)}
    monkeypatch.setattr(_writer, "Saves", type("SharedSaves", (), methods))
    monkeypatch.setattr(_save.Save, "returned", lambda *_: 0)  # or each thread finds its own save by the running calls
    monkeypatch.setattr(_save.Save, "see", see)  # or one waits for the other, which the explorer has stopped
    assert found(Combination((ASYNC, ASYNC), "a checkpoint")).violations


def test_ranks_that_do_not_compare_versions_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlobStorageReader, "_check_agreed", lambda *_: None)
    monkeypatch.setattr(BlobClient, "delete", lambda *_, **__: True)  # or the data of the older version is missing
    assert found(Combination((SAVE, LOAD), "a checkpoint")).violations


def test_old_data_that_is_deleted_before_the_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _writer.BlobStorageWriter._commit

    def early(writer: Any, save: Any, content: Any, paths: Any, seen: Any, sample: Any) -> None:
        writer._discard(save, paths, seen)
        original(writer, save, content, paths, seen, sample)

    monkeypatch.setattr(_writer.BlobStorageWriter, "_commit", early)
    assert found(Combination((SAVE, LOAD), "a checkpoint")).violations


def test_an_error_while_old_data_is_deleted_does_not_fail_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bool:
        raise AzureError("not allowed")

    monkeypatch.setattr(BlobClient, "delete", refuse)
    assert found(Combination((SAVE, LOAD), "a checkpoint")).violations == []


def test_deleting_and_cleaning_during_a_first_save_never_makes_a_success_false() -> None:
    for kind in (DELETE, CLEAN, CLEAN_ALL):
        assert explore_all(Combination((SAVE, kind), "nothing"), faults=True).violations == []


def test_a_copy_without_the_version_as_a_condition_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is overwritten, under the same name, while it is copied."""
    original = Memory._stage

    def unconditional(memory: Memory, request: Any) -> Any:
        source = request.headers.get("x-ms-copy-source", "").partition("?")[0].rpartition("/run/")[2]
        stored = memory.blobs.get(f"run/{source}")
        if stored is None:
            return original(memory, request)
        memory.blobs[f"run/{source}"] = replace(stored, data=bytes(len(stored.data)))
        headers = {**request.headers, "x-ms-source-if-match": stored.etag}
        return original(memory, replace(request, headers=headers))

    monkeypatch.setattr(Memory, "_stage", unconditional)
    assert found(Combination((DELTA, LOAD), "a checkpoint with digests")).violations
