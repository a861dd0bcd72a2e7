"""Several real ranks: sharding and resharding, failures on every rank, asynchronous saves, sharing."""

from __future__ import annotations

import os
import pickle
import signal

import pytest
import torch
from azure.core.credentials import AzureSasCredential

from azstoragetorch.checkpoint import BlobStorageReader, clean, load_keys
from tests.azurite.container import Container
from tests.checkpoint import jobs
from tests.checkpoint.ranks import Ranks, context, run_ranks
from tests.checkpoint.states import load, same

ONE_D = ["rows", "columns", "replicated"]
TWO_D = ["2d", "hybrid", "2d rows", "columns"]


@pytest.fixture
def base(container: Container) -> str:
    return container.blob_url("run")


def test_two_ranks_in_every_placement(container: Container, base: str) -> None:
    run_ranks(2, jobs.save_all_and_load_all, base, container.key, ONE_D)
    found = load_keys(f"{base}/columns", "model", credential=container.key)["model"]
    assert all(torch.equal(found[key], value) for key, value in jobs.whole().items())


def test_four_ranks_on_a_mesh_then_three_then_one(container: Container, base: str) -> None:
    """Resharding: 2-D to 1-D, rows to columns, between world sizes."""
    run_ranks(4, jobs.save_for_others, base, container.key, TWO_D)
    run_ranks(3, jobs.load_from_others, base, container.key, TWO_D, ["rows", "columns"])
    for layout in TWO_D:
        state = {"model": {key: torch.zeros_like(value) for key, value in jobs.whole().items()}}
        load(state, BlobStorageReader(f"{base}/{layout}", credential=container.key))
        assert all(torch.equal(state["model"][key], value) for key, value in jobs.whole().items())


@pytest.mark.slow
def test_one_and_two_ranks_to_four_on_a_mesh(container: Container, base: str) -> None:
    run_ranks(1, jobs.save_for_others, f"{base}/1", container.key, ["rows"])
    run_ranks(2, jobs.save_for_others, f"{base}/2", container.key, ONE_D)
    run_ranks(4, jobs.load_from_others, f"{base}/1", container.key, ["rows"], TWO_D)
    run_ranks(4, jobs.load_from_others, f"{base}/2", container.key, ONE_D, TWO_D)


def test_ranks_that_do_not_coordinate_keep_their_own(container: Container, base: str) -> None:
    run_ranks(2, jobs.alone_together, base, container.key)
    assert sum(name.endswith(".distcp") for name in container.names()) == 2  # the first ones were replaced


def test_without_collectives_a_checkpoint_of_all_is_not_shadowed(container: Container, base: str) -> None:
    for told in run_ranks(2, jobs.overwrite_with_collectives_off, base, container.key):
        assert "saved with collectives" in told


def test_an_error_on_one_rank_is_everybodys_and_changes_nothing(container: Container, base: str) -> None:
    run_ranks(2, jobs.save, base, container.key, "rows")
    before = set(container.names())
    for told in run_ranks(2, jobs.fail_in_the_middle, base, container.key):
        assert "(RANK 1)" in told
        assert "(RANK 0)" not in told
        assert "the disk of the mind is full" in told
        assert "'model.uneven'" in told
        assert base in told
    assert before <= set(container.names())
    run_ranks(2, jobs.load, base, container.key, ["columns"])


def test_a_rank_that_fails_does_not_let_the_others_finish_for_nothing(container: Container, base: str) -> None:
    run_ranks(2, jobs.save, base, container.key, "rows")
    before = set(container.names())
    for told, resolved in run_ranks(2, jobs.fail_while_others_are_slow, base, container.key):
        assert "the disk of the mind is full" in told
        assert "gave up, since another rank has failed" in told
        assert resolved < 50
    assert len(set(container.names()) - before) == 1
    clean(base, min_age=0, credential=container.key)
    assert set(container.names()) == before
    run_ranks(2, jobs.load, base, container.key, ["columns"])


def test_a_plan_that_torch_has_cached_has_an_alarm_for_each_save(container: Container, base: str) -> None:
    for told, resolved in run_ranks(2, jobs.fail_while_others_are_slow, base, container.key, 3):
        assert "gave up, since another rank has failed" in told
        assert resolved < 50
    names = [name.rpartition("/")[2] for name in container.names()]
    assert sorted(name.partition(".")[0] for name in names) == ["__0_0", "__0_1", "__0_2"]
    assert len({name.partition(".")[2] for name in names}) == 1
    run_ranks(2, jobs.save_with_cached_plans, base, container.key)


def test_a_missing_data_blob_is_everybodys_error_and_named(container: Container, base: str) -> None:
    run_ranks(2, jobs.save, base, container.key, "rows")
    (victim,) = [name for name in container.names() if "__1_0" in name]
    container.client.delete_blob(victim)
    for told in run_ranks(2, jobs.fail_to_load, base, container.key):
        assert "is missing" in told
        assert victim.rpartition("/")[2] in told


def test_no_checkpoint_is_said_on_every_rank(container: Container, base: str) -> None:
    for told in run_ranks(2, jobs.fail_to_load, base, container.key):
        assert "there is no checkpoint here" in told


def test_no_permission_is_said_on_every_rank(container: Container, base: str) -> None:
    run_ranks(2, jobs.save, base, container.key, "rows")
    wrong = AzureSasCredential("sv=2021-08-06&sig=AAAA")
    for job in (jobs.fail_to_load, jobs.fail_in_the_middle):
        for rank, told in enumerate(run_ranks(2, job, base, wrong)):
            first = rank if job is jobs.fail_to_load else 0  # a save starts with a check by the coordinator only
            assert f"(RANK {first})" in told
            assert "403" in told
            assert base in told


def test_hostile_metadata_is_said_on_every_rank(container: Container, base: str) -> None:
    container.put("run/.metadata", pickle.dumps(os.system))
    for rank, told in enumerate(run_ranks(2, jobs.fail_to_load, base, container.key)):
        assert f"(RANK {rank})" in told
        assert "system, which no checkpoint needs" in told
        assert base in told


def test_torchs_cached_plans_on_several_ranks(container: Container, base: str) -> None:
    run_ranks(2, jobs.save_with_cached_plans, base, container.key)


PARALLEL = ["data parallel", "fully sharded", "tensor parallel"]
IN_TWO_DIMENSIONS = ["hybrid sharded", "tensor and fully sharded"]


@pytest.mark.parametrize(
    ("ranks", "saved", "others"),
    [
        (2, "data parallel", [(3, "fully sharded")]),
        (2, "fully sharded", [(2, "tensor parallel"), (1, "data parallel")]),
        pytest.param(2, "tensor parallel", [(4, "tensor and fully sharded")], marks=pytest.mark.slow),
        pytest.param(4, "hybrid sharded", [(2, "tensor parallel"), (2, "data parallel")], marks=pytest.mark.exhaustive),
        (4, "tensor and fully sharded", [(2, "fully sharded")]),
        pytest.param(
            4, "fully sharded", [(4, kind) for kind in PARALLEL + IN_TWO_DIMENSIONS], marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_model_and_its_optimizer_continue_in_parallel_of_another_kind(
    container: Container, base: str, ranks: int, saved: str, others: list[tuple[int, str]]
) -> None:
    """State dicts of DDP, FSDP2, tensor parallelism, and two of them combined."""
    before = run_ranks(ranks, jobs.save_parallel, base, container.key, saved)[0]
    assert len(before["model"]) == 4
    assert len(before["optimizer"]["state"]) == 4
    for world, kind in others:
        same(before, run_ranks(world, jobs.load_parallel, base, container.key, kind)[0])


@pytest.mark.parametrize("kind", ["THREAD", pytest.param("PROCESS", marks=pytest.mark.slow)])
def test_asynchronous_saves(container: Container, base: str, kind: str) -> None:
    run_ranks(2, jobs.async_saves, base, container.key, kind, env=[{"MASTER_ADDR": "127.0.0.1"}] * 2)


def test_an_asynchronous_save_of_a_fully_sharded_model(container: Container, base: str) -> None:
    saved = run_ranks(2, jobs.save_parallel_asynchronously, base, container.key, "fully sharded")
    loaded = run_ranks(2, jobs.load_parallel, base, container.key, "fully sharded")
    for expected, found in zip(saved, loaded, strict=True):
        same(expected, found)


@pytest.mark.slow
def test_saves_that_overlap_in_torchs_background_process(container: Container, base: str) -> None:
    env = [{"MASTER_ADDR": "127.0.0.1"}]
    run_ranks(1, jobs.overlapping_saves_by_a_process, base, container.key, env=env, timeout=240)


def test_what_all_ranks_need_alike_is_fetched_once(container: Container, base: str) -> None:
    run_ranks(2, jobs.save_replicated, base, container.key)
    size = sum(container.client.get_blob_client(n).get_blob_properties().size for n in container.names())
    alone = run_ranks(3, jobs.load_once, base, container.key, "rank")
    assert min(alone) > 0.9 * size
    shared = run_ranks(3, jobs.load_once, base, container.key, "world")
    metadata = container.client.get_blob_client("run/.metadata").get_blob_properties().size
    assert sum(shared) - 3 * metadata < 1.1 * size
    nodes = [{"GROUP_RANK": "0"}, {"GROUP_RANK": "0"}, {"GROUP_RANK": "1"}]
    by_node = run_ranks(3, jobs.load_once, base, container.key, "node", env=nodes)
    assert by_node[0] + by_node[1] - 2 * metadata < 1.1 * size
    assert by_node[2] > 0.9 * size


def test_what_is_shared_may_be_of_any_layout(container: Container, base: str) -> None:
    run_ranks(2, jobs.load_once_in_every_layout, base, container.key)


@pytest.mark.parametrize("what", ["resolve_tensor", "load_bytes", "commit_tensor"])
def test_a_planner_that_fails_while_ranks_share_ends_all_of_them(container: Container, base: str, what: str) -> None:
    """No rank waits for a broadcast forever, and the error is the one of the planner."""
    run_ranks(2, jobs.save_replicated, base, container.key)
    for told in run_ranks(2, jobs.load_once_with_a_picky_planner, base, container.key, what):
        assert f"no {what} today" in told


@pytest.mark.parametrize(
    ("ranks", "where", "how"),
    [
        ((1,), "create_local_plan", "error"),
        ((1,), "finish_plan", "error"),
        ((0, 2), "finish_plan", "error"),
        ((0, 1, 2), "finish_plan", "error"),
        ((1,), "finish_plan", "interrupt"),
        ((1,), "finish_plan", "forgets"),
    ],
)
def test_a_rank_that_fails_before_it_shares_ends_all_of_them(
    container: Container, base: str, ranks: tuple[int, ...], where: str, how: str
) -> None:
    """No rank waits for a failed one: every rank raises its error, and the group can be used for the next load."""
    run_ranks(2, jobs.save_replicated, base, container.key)
    results = run_ranks(3, jobs.load_once_and_fail_early, base, container.key, ranks, where, how)
    for rank, told in enumerate(results):
        if how == "forgets":
            assert rank in ranks or "rank 1 does not share" in told[rank]
        else:
            assert told
            assert all(f"no {where} today" in text for text in told.values())


@pytest.mark.parametrize("per", ["node", "world"])
def test_sharing_in_another_group_than_that_of_the_load_is_an_error_at_once(
    container: Container, base: str, per: str
) -> None:
    """Otherwise, the ranks of the load would wait for ranks that do not load."""
    run_ranks(2, jobs.save_replicated, base, container.key)
    *pair, single = run_ranks(3, jobs.load_once_in_the_wrong_group, base, container.key, per)
    for told in pair:
        assert "2 ranks load" in told
        assert f"load_once_per={per!r} has 3" in told
    assert single == "no error"


@pytest.mark.parametrize("per", ["node", "world"])
def test_sharing_in_a_group_of_the_same_size_with_other_ranks_is_an_error_at_once(
    container: Container, base: str, per: str
) -> None:
    run_ranks(2, jobs.save_replicated, base, container.key)
    for told in run_ranks(4, jobs.load_once_in_a_group_of_others, base, container.key, per):
        assert "2 ranks load" in told
        assert f"load_once_per={per!r} has other ranks" in told


def test_sharing_ranks_fail_together(container: Container, base: str) -> None:
    run_ranks(2, jobs.save_replicated, base, container.key)
    for told in run_ranks(2, jobs.load_once_and_fail, base, container.key, "big"):
        assert "different types or shapes" in told
    for name in container.names():
        if name.endswith(".distcp"):
            container.client.delete_blob(name)
    for told in run_ranks(2, jobs.load_once_and_fail, base, container.key, "half"):
        assert "is missing" in told


def test_a_rank_that_is_killed_ends_the_others_and_the_last_checkpoint_loads(container: Container, base: str) -> None:
    told = context.Queue()
    ranks = Ranks(2, jobs.keep_saving, base, container.key, told)
    steps = [told.get(timeout=100) for _ in range(4)]
    os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
    killed, ended = ranks.processes[1], ranks.results(timeout=100)
    killed.join(240)
    assert ended[1] is None
    assert isinstance(ended[0], BaseException)
    newest = max(step for _, step in steps)
    found = load_keys(base, "step", credential=container.key)["step"]
    assert found >= newest
    run_ranks(2, jobs.load, base, container.key, ["columns"], found)
