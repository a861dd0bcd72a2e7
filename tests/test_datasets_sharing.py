"""One listing for all ranks of a job: real ranks in a gloo group, and what each of them requests."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed as dist
from azure.core.exceptions import AzureError, ClientAuthenticationError

import azstoragetorch.datasets._job
from azstoragetorch.datasets import BlobDataset, IterableBlobDataset
from tests.checkpoint.ranks import Ranks
from tests.faults import FaultService, Match, Status
from tests.support import QUICK

NAMES = [f"train/{index:03d}" for index in range(50)]


@pytest.fixture
def filled(fault_service: FaultService) -> str:
    for name in NAMES:
        fault_service.put("data", name, name.encode())
    return fault_service.container_url("data")


def read_share(rank: int, url: str) -> tuple[str, list[str]]:
    """The fingerprint, and what this rank reads."""
    azstoragetorch.datasets._job._REPORT_EVERY = 0.0
    azstoragetorch.datasets._job._CHUNK = 100
    dataset = IterableBlobDataset.from_container_url(
        url,
        prefix="train/",
        credential=False,
        transfer=QUICK,
        share_listing=True,
        shuffle=True,
        shard_by="rank_and_worker",
    )
    return dataset.metadata.fingerprint, [sample["data"].decode() for sample in dataset]


def test_one_rank_lists_and_all_read_their_shares(fault_service: FaultService, filled: str) -> None:
    found = Ranks(4, read_share, filled).results()
    assert len(fault_service.requests("list_blobs")) == 1
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert sorted(name for _, names in found for name in names) == NAMES
    assert {len(names) for _, names in found} == {12, 13}


def list_by_two_groups(rank: int, url: str) -> int:
    """Of each half of the ranks, the first one lists."""
    world = dist.get_world_size()
    groups = [dist.new_group([0, 1]), dist.new_group(list(range(2, world)))]
    group = groups[rank > 1]
    return len(BlobDataset.from_container_url(url, credential=False, transfer=QUICK, share_listing=True, group=group))


def test_a_group_has_its_own_listing(fault_service: FaultService, filled: str) -> None:
    assert Ranks(4, list_by_two_groups, filled).results() == [50] * 4
    assert len(fault_service.requests("list_blobs")) == 2


def list_all(rank: int, url: str) -> int:
    return len(BlobDataset.from_container_url(url, credential=False, transfer=QUICK, share_listing=True))


def test_an_error_of_the_rank_that_lists_is_raised_on_all(fault_service: FaultService, filled: str) -> None:
    fault_service.script(Match("list_blobs"), [Status(403, "AuthorizationFailure")], repeat=True)
    found = Ranks(3, list_all, filled).results()
    assert isinstance(found[0], ClientAuthenticationError)
    for error in found[1:]:
        assert isinstance(error, AzureError)
        assert "rank 0 could not list" in str(error)
        assert "ClientAuthenticationError" in str(error)
    assert len(fault_service.requests("list_blobs")) == 1


def list_strictly(rank: int, url: str) -> int:
    return len(
        BlobDataset.from_container_url(url, credential=False, transfer=QUICK, share_listing=True, invalid_names="raise")
    )


def test_an_invalid_name_is_an_error_on_all(fault_service: FaultService, filled: str) -> None:
    fault_service.put("data", "a/../b", b"")
    found = Ranks(2, list_strictly, filled).results()
    assert [type(error) for error in found] == [ValueError, ValueError]
    assert "rank 0 could not list" in str(found[1])


def list_something_else(rank: int, url: str) -> int:
    prefix = "train/" if rank else None
    return len(BlobDataset.from_container_url(url, prefix=prefix, credential=False, transfer=QUICK, share_listing=True))


def test_ranks_that_list_different_things_are_told(filled: str) -> None:
    found = Ranks(2, list_something_else, filled).results()
    assert found[0] == 50
    assert isinstance(found[1], ValueError)
    assert "and rank 0 lists" in str(found[1])


def die_while_listing(rank: int, url: str) -> int:
    if rank == 0:
        azstoragetorch.datasets._contents.list_catalog = lambda *_: os._exit(1)  # type: ignore[assignment]
    return list_all(rank, url)


def test_no_rank_waits_for_one_that_has_died(filled: str) -> None:
    found: list[Any] = Ranks(3, die_while_listing, filled).results(timeout=240)
    assert found[0] is None
    assert all(isinstance(error, RuntimeError) for error in found[1:])


def test_without_a_process_group_it_is_an_error() -> None:
    with pytest.raises(ValueError, match="call init_process_group first"):
        list_all(0, "https://account.blob.core.windows.net/data")
