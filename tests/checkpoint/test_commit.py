"""A save is all or nothing: after an error, a killed process, or changes by others."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.exceptions import ClientAuthenticationError
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner

from azstoragetorch import TransferConfig
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, clean, latest_checkpoint
from azstoragetorch.exceptions import CheckpointError, CheckpointExistsError, CheckpointNotFoundError
from tests.azurite.container import Container
from tests.checkpoint.ranks import context
from tests.checkpoint.states import load, reason, save
from tests.faults import ChangedEtag, CorruptByte, FaultService, Fine, LostAnswer, Match, Stall, Status, Torn

KiB = 1 << 10
QUICK = TransferConfig(block_size=64 * KiB, part_size=64 * KiB, max_backoff=0.05, read_timeout=30)


def state(step: int) -> dict[str, Any]:
    return {"x": torch.full((100_000,), float(step)), "y": torch.full((100_000,), -float(step)), "step": step}


def writer(url: str, **options: Any) -> BlobStorageWriter:
    return BlobStorageWriter(url, credential=False, transfer=QUICK, **options)


def loaded(url: str) -> int:
    """The step of the existing checkpoint, which must be complete."""
    found = load(
        {"x": torch.zeros(100_000), "y": torch.zeros(100_000), "step": -1}, BlobStorageReader(url, credential=False)
    )
    step = found["step"]
    assert found["x"].unique().tolist() == [float(step)]
    assert found["y"].unique().tolist() == [-float(step)]
    return int(step)


@pytest.fixture
def url(fault_service: FaultService) -> str:
    fault_service.create_container("data")
    return f"{fault_service.container_url('data')}/run"


def test_overwriting_replaces_all_and_leaves_nothing_behind(fault_service: FaultService, url: str) -> None:
    mine = writer(url, blobs_per_rank=2)
    for step in range(3):
        save(state(step), mine)
        assert loaded(url) == step
        assert len(fault_service.names("data")) == 3


def test_the_metadata_goes_last_and_the_replaced_data_after_it(fault_service: FaultService, url: str) -> None:
    save(state(0), writer(url))
    fault_service.log.clear()
    save(state(1), writer(url))
    changes = [r for r in fault_service.requests() if r.method in ("PUT", "DELETE")]
    at = next(i for i, r in enumerate(changes) if r.blob.endswith("/.metadata"))
    assert changes[at].operation == "put_blob"
    assert all(r.method == "PUT" and r.blob.endswith(".distcp") for r in changes[:at])
    assert {r.method for r in changes[at + 1 :]} == {"DELETE"}


def test_data_goes_out_in_blocks_cut_across_items(fault_service: FaultService, url: str) -> None:
    """Tens of items in one block; an item above the block limit in many blocks, all but the last of the same size."""
    transfer = TransferConfig(block_size=8 << 20)
    items = {f"k{n:03}": torch.randn(1000) for n in range(100)} | {"large": torch.zeros(20 << 20)}
    save(items, BlobStorageWriter(url, credential=False, blobs_per_rank=1, transfer=transfer))
    blocks = sorted((r.body_length for r in fault_service.requests("put_block")), reverse=True)
    assert set(blocks[:-1]) == {8 << 20}
    assert len(blocks) == 11


def test_a_large_object_goes_out_in_blocks_too(fault_service: FaultService, url: str) -> None:
    """Its size is unknown when the save is planned."""
    transfer = TransferConfig(block_size=8 << 20)
    save({"small": 1, "large": bytes(40 << 20)}, BlobStorageWriter(url, credential=False, transfer=transfer))
    assert max(r.body_length for r in fault_service.requests(method="PUT")) == 8 << 20
    found = load({"small": 0, "large": b""}, BlobStorageReader(url, credential=False))
    assert found == {"small": 1, "large": bytes(40 << 20)}


def test_overwrite_false_refuses_before_any_upload(fault_service: FaultService, url: str) -> None:
    save(state(0), writer(url))
    fault_service.log.clear()
    with pytest.raises(dcp.CheckpointException) as caught:
        save(state(1), writer(url, overwrite=False))
    error = reason(caught.value)
    assert isinstance(error, CheckpointExistsError)
    assert error.checkpoint == url
    assert not [r for r in fault_service.requests() if r.method == "PUT"]
    assert loaded(url) == 0


def test_overwrite_false_also_when_another_was_faster(fault_service: FaultService, url: str) -> None:
    """Both find no checkpoint and upload; the later commit changes nothing."""

    class Slow(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if not fault_service.exists("data", "run/.metadata"):
                save(state(7), writer(url))
            return super().resolve_data(write_item)

    with pytest.raises(dcp.CheckpointException) as caught:
        save(state(1), writer(url, overwrite=False), planner=Slow())
    assert isinstance(reason(caught.value), CheckpointExistsError)
    assert loaded(url) == 7


def test_a_first_save_with_overwrite_false_works(url: str) -> None:
    save(state(1), writer(url, overwrite=False))
    assert loaded(url) == 1


def test_what_fits_into_a_block_is_put_at_once(fault_service: FaultService, url: str) -> None:
    save(state(1), BlobStorageWriter(url, credential=False))
    assert [r.operation for r in fault_service.requests(method="PUT")] == ["put_blob"] * 2
    assert loaded(url) == 1


@pytest.mark.parametrize("operation", ["put_block", "put_block_list", "put_blob"])
def test_a_refused_request_fails_the_save_and_nothing_else(
    fault_service: FaultService, url: str, operation: str
) -> None:
    save(state(0), writer(url))
    fault_service.script(operation, [Status(403)], repeat=True)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(state(1), writer(url, blobs_per_rank=2))
    error = reason(caught.value)
    assert isinstance(error, CheckpointError)
    assert (error.checkpoint, error.rank) == (url, 0)
    assert "403" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    fault_service.clear_script()
    assert loaded(url) == 0
    clean(url, min_age=0, credential=False)
    assert len(fault_service.names("data")) == 2 or loaded(url) == 0


@pytest.mark.parametrize("operation", ["put_block", "put_block_list", "put_blob", "head", "delete", "get_blob"])
@pytest.mark.parametrize("fault", [Status(503), LostAnswer()], ids=["503", "lost answer"])
def test_a_passing_fault_is_survived(fault_service: FaultService, url: str, operation: str, fault: Any) -> None:
    save(state(0), writer(url))
    rule = fault_service.script(operation, [fault] * 2)
    save(state(1), writer(url))
    assert loaded(url) == 1
    assert rule.is_exhausted
    clean(url, min_age=0, credential=False)
    assert loaded(url) == 1


def test_a_commit_of_which_nobody_says_whether_it_was_carried_out(fault_service: FaultService, url: str) -> None:
    """The error does not claim that the save had no effect, and the old or new checkpoint is complete."""
    save(state(0), writer(url))
    is_metadata = Match("put_blob", path="metadata")
    fault_service.script(is_metadata, [LostAnswer()], repeat=True)
    fault_service.script(Match("head", path="metadata"), [Status(503)], repeat=True)
    with pytest.raises(dcp.CheckpointException) as caught:
        save(state(1), writer(url))
    assert "does not say whether it was carried out" in str(reason(caught.value))
    assert "no effect" not in str(reason(caught.value))
    fault_service.clear_script()
    assert loaded(url) == 1


def test_a_lost_answer_to_the_commit_with_overwrite_false(fault_service: FaultService, url: str) -> None:
    fault_service.script(Match("put_blob", path="metadata"), [LostAnswer()])
    save(state(1), writer(url, overwrite=False))
    assert loaded(url) == 1


def test_a_failing_item_is_named_and_nothing_is_committed(fault_service: FaultService, url: str) -> None:
    class Broken(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if write_item.index.fqn == "y":
                raise OSError("unreadable")
            return super().resolve_data(write_item)

    save(state(0), writer(url))
    with pytest.raises(dcp.CheckpointException) as caught:
        save(state(1), writer(url), planner=Broken())
    error = reason(caught.value)
    assert isinstance(error, CheckpointError)
    assert error.key == "y"
    assert "'y'" in str(error)
    assert "unreadable" in str(error)
    assert loaded(url) == 0


def test_an_item_that_no_rank_saved_fails_the_save(fault_service: FaultService, url: str) -> None:
    """torch itself reports success with missing entries."""

    class Forgetful(BlobStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            return super().write_data(dcp.SavePlan(plan.items[:-1]), planner)

    save(state(0), writer(url))
    with pytest.raises(dcp.CheckpointException, match="no rank has saved all of"):
        save(state(1), Forgetful(url, credential=False))
    assert loaded(url) == 0


def test_data_that_is_cleaned_away_meanwhile_fails_the_save(fault_service: FaultService, url: str) -> None:
    class Robbed(BlobStorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            clean(url, min_age=0, credential=False)
            super().finish(metadata, results)

    save(state(0), writer(url))
    with pytest.raises(dcp.CheckpointException, match="was deleted while the save was in progress"):
        save(state(1), Robbed(url, credential=False))
    assert loaded(url) == 0


def test_a_checkpoint_that_cannot_be_read_can_be_replaced(fault_service: FaultService, url: str) -> None:
    fault_service.put("data", "run/.metadata", b"rubbish")
    save(state(1), writer(url))
    assert loaded(url) == 1


def test_hostile_metadata_does_not_have_others_blobs_deleted(fault_service: FaultService, url: str) -> None:
    save(state(0), writer(url))
    fault_service.put("data", "precious", b"x")
    forged = fault_service.get("data", "run/.metadata")
    name = next(name for name in fault_service.names("data") if name.endswith("distcp")).rpartition("/")[2]
    forged = forged.replace(name.encode(), b"../precious".ljust(len(name), b"/"))
    fault_service.put("data", "run/.metadata", forged)
    save(state(1), writer(url))
    assert fault_service.exists("data", "precious")
    assert loaded(url) == 1


def test_readers_see_the_old_or_the_new_at_every_instant(fault_service: FaultService, url: str) -> None:
    """A reader that starts at any time while it is overwritten gets a complete one, or says that it was replaced."""
    save(state(0), writer(url))
    done = threading.Event()

    def keep_saving() -> None:
        for step in range(1, 12):
            save(state(step), writer(url))
        done.set()

    thread = threading.Thread(target=keep_saving)
    thread.start()
    seen, overtaken = [], []
    while not done.is_set():
        try:
            seen.append(loaded(url))
        except dcp.CheckpointException as error:
            overtaken.append(str(error))
    thread.join()
    assert seen == sorted(seen)
    # The data of the old one was deleted after its metadata was read.
    assert all("is missing" in error for error in overtaken)
    assert loaded(url) == 11


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def _save_and_be_killed(url: str, step: int) -> None:
    torch.set_num_threads(1)
    save(state(step), writer(url, blobs_per_rank=2))


MOMENTS = [
    ("put_block", 1),
    ("put_block", 2),
    ("put_block_list", 1),
    ("put_block_list", 2),
    ("head", 1),
    ("put_blob", 1),
    ("delete", 1),
]


def moments() -> list[Any]:
    """Every moment; the standard suite runs those that differ most."""
    quick = {("put_block", 2, True, True), ("put_block_list", 2, True, True), ("put_block_list", 1, False, False)}
    quick |= {("put_blob", 1, True, True), ("put_blob", 1, True, False), ("delete", 1, True, True)}
    return [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-{'overwriting' if case[2] else 'first'}-{'carried out' if case[3] else 'not'}",
            marks=[] if case in quick else [pytest.mark.slow],
        )
        for moment in MOMENTS
        for had_one in (True, False)
        for is_carried_out in (True, False)
        if (case := (*moment, had_one, is_carried_out)) and (had_one or moment[0] != "delete")
    ]


@pytest.mark.parametrize(("operation", "nth", "had_one", "is_carried_out"), moments())
def test_kill_9_at_any_moment(
    fault_service: FaultService, url: str, operation: str, nth: int, had_one: bool, is_carried_out: bool
) -> None:
    """The process is killed while a request is in flight, which the service carries out or not."""
    if had_one:
        save(state(1), writer(url, blobs_per_rank=2))
    fault_service.log.clear()
    fault: Any = Stall(60, after=None) if is_carried_out else Status(503, retry_after=60)
    fault_service.script(Match(operation, nth=nth), [fault], repeat=True)
    process = context.Process(target=_save_and_be_killed, args=(url, 2))
    process.start()
    deadline = time.monotonic() + 60
    while not any(r.fault and r.is_carried_out for r in fault_service.requests(operation)):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    fault_service.clear_script()

    is_new = operation == "delete" or (operation == "put_blob" and is_carried_out)
    expected = 2 if is_new else 1 if had_one else None

    def check() -> None:
        if expected is not None:
            assert loaded(url) == expected
            return
        with pytest.raises(dcp.CheckpointException, match=r"no complete checkpoint|no checkpoint here"):
            loaded(url)
        assert latest_checkpoint(url.rpartition("/")[0], credential=False) is None

    check()
    clean(url, min_age=0, credential=False)
    check()
    assert len(fault_service.names("data")) == (3 if expected is not None else 0)
    save(state(3), writer(url))
    assert loaded(url) == 3


def test_staged_blocks_of_a_killed_save_are_cleaned(container: Container) -> None:
    """Blobs with only staged blocks are invisible, and are billed."""
    url = container.blob_url("run")
    save({"x": torch.ones(3)}, BlobStorageWriter(url, credential=container.key))
    name = "run/__0_0.20200101000000-0123456789abcdef.distcp"
    container.client.get_blob_client(name).stage_block("YQ==", b"x" * 1000)
    assert container.uncommitted(name) == 1
    assert clean(url, min_age=0, credential=container.key) == [container.blob_url(name)]
    assert name not in [b.name for b in container.client.list_blobs(include=["uncommittedblobs"])]
    assert load({"x": torch.zeros(3)}, BlobStorageReader(url, credential=container.key))["x"].tolist() == [1, 1, 1]


# -- loading damaged checkpoints -------------------------------------------------------------------------------------


def failed_load(url: str, target: dict[str, Any] | None = None, **options: Any) -> BaseException:
    target = target or {"x": torch.zeros(100_000), "y": torch.zeros(100_000), "step": -1}
    with pytest.raises(dcp.CheckpointException) as caught:
        load(target, BlobStorageReader(url, credential=False, transfer=QUICK, **options))
    error = reason(caught.value)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def data_blob(service: FaultService) -> str:
    return next(name for name in service.names("data") if name.endswith(".distcp"))


def test_a_truncated_blob_is_an_error(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url))
    name = data_blob(fault_service)
    data = fault_service.get("data", name)
    fault_service.put("data", name, data[: len(data) // 2])
    assert "not the one that was saved" in str(failed_load(url))
    error = failed_load(url, check_etags=False)
    assert isinstance(error, CheckpointError)
    assert "truncated" in str(error)
    assert error.key is not None


def test_a_changed_blob_is_an_error_unless_that_was_allowed(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url))
    name = data_blob(fault_service)
    data = fault_service.get("data", name)
    fault_service.put("data", name, data)
    error = failed_load(url)
    assert isinstance(error, CheckpointError)
    assert name.rpartition("/")[2] in str(error)
    target = {"x": torch.zeros(100_000)}
    load(target, BlobStorageReader(url, credential=False, check_etags=False))
    assert target["x"].unique().tolist() == [1.0]


def test_a_blob_that_changes_while_it_is_read_is_an_error(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url, blobs_per_rank=1))
    fault_service.script(Match("get_blob", path="distcp"), [Fine(), ChangedEtag()])
    assert "overwritten while it was read" in str(failed_load(url, check_etags=False))


@pytest.mark.parametrize("times", [1, 100])
def test_a_flipped_bit_is_noticed_with_validate_content(fault_service: FaultService, url: str, times: int) -> None:
    """A transient one is fetched again, a permanent one is an error; wrong data is never loaded silently."""
    validating = replace(QUICK, validate_content=True, max_attempts=3)
    save(state(1), BlobStorageWriter(url, credential=False, transfer=validating))
    sent = fault_service.requests("put_block")
    assert sent
    assert all("content-md5" in request.headers for request in sent)
    rule = fault_service.script(Match("get_blob", path="distcp"), [CorruptByte(at=1000)] * times)
    target = {"x": torch.zeros(100_000), "y": torch.zeros(100_000), "step": -1}
    if times == 1:
        load(target, BlobStorageReader(url, credential=False, transfer=validating))
        assert target["x"].unique().tolist() == [1.0]
        assert rule.is_exhausted
    else:
        with pytest.raises(dcp.CheckpointException) as caught:
            load(target, BlobStorageReader(url, credential=False, transfer=validating))
        assert isinstance(reason(caught.value), CheckpointError)
        assert "MD5" in str(reason(caught.value))


def test_torn_answers_are_resumed(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url))
    rule = fault_service.script(Match("get_blob", path="distcp"), [Torn(after=1000), Status(503), Torn(after=5)])
    assert loaded(url) == 1
    assert rule.is_exhausted


@pytest.mark.parametrize(("status", "kind"), [(403, "ClientAuthenticationError"), (404, "missing")])
def test_a_refused_blob_names_key_rank_and_reason(
    fault_service: FaultService, url: str, status: int, kind: str
) -> None:
    save(state(1), writer(url))
    fault_service.script(Match("get_blob", path="distcp"), [Status(status)], repeat=True)
    error = failed_load(url)
    assert isinstance(error, CheckpointError)
    assert kind in str(error)
    assert (error.checkpoint, error.rank) == (url, 0)
    assert error.key in ("x", "y", "step")


def test_refused_metadata_is_not_taken_for_missing(fault_service: FaultService, url: str) -> None:
    """torch would continue with the metadata of the rank and hide the reason."""
    save(state(1), writer(url))
    fault_service.script(Match("get_blob", path="metadata"), [Status(403)])
    mine = BlobStorageReader(url, credential=False)
    with pytest.raises(ClientAuthenticationError):
        mine.read_metadata()
    with pytest.raises(ClientAuthenticationError):
        _ = mine.read_metadata(rank=0).state_dict_metadata
    mine.reset()
    assert mine.read_metadata().state_dict_metadata


@pytest.mark.parametrize("planner", [None, _EmptyStateDictLoadPlanner()])
@pytest.mark.parametrize(("status", "error"), [(404, CheckpointNotFoundError), (403, ClientAuthenticationError)])
def test_why_metadata_cannot_be_read_is_what_torch_raises(
    fault_service: FaultService, url: str, caplog: pytest.LogCaptureFixture, planner: Any, status: int, error: Any
) -> None:
    """Not an AssertionError of torch; and torch logs one failure, in one line, not another that follows from it."""
    fault_service.script(Match("get_blob", path="metadata"), [Status(status)] * 100)
    state_dict: dict[str, Any] = {} if isinstance(planner, _EmptyStateDictLoadPlanner) else {"x": torch.zeros(3)}
    with pytest.raises(dcp.CheckpointException) as caught:
        load(state_dict, BlobStorageReader(url, credential=False), planner=planner)
    assert type(reason(caught.value)) is error
    assert str(caught.value).strip().splitlines()[-1].startswith(f"{error.__module__}.{error.__name__}: ")
    assert "Rank local metadata is not found" not in caplog.text
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert all(record.exc_info is None and "\n" not in record.getMessage() for record in warnings)
    assert len(warnings) == str(caplog.text).count("Global metadata is not found")
    assert not logging.getLogger().filters


def test_what_is_there_instead_of_a_checkpoint_is_said(fault_service: FaultService, url: str) -> None:
    for name, told in (("run", "this is a blob"), ("run/x.distcp", "interrupted"), ("other", "no checkpoint here")):
        fault_service.put("data", name, b"x")
        with pytest.raises(CheckpointNotFoundError, match=told) as caught:
            BlobStorageReader(url, credential=False).read_metadata()
        assert caught.value.checkpoint == url
        step = "pass the URL of the folder" if name == "run" else f"run: azstoragetorch checkpoint ls {url[:-4]}"
        assert str(caught.value).endswith(step)
        fault_service.delete("data", name)


def test_wrong_shapes_are_said_with_the_key(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url))

    class Careless(dcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return torch.zeros(5)

    with pytest.raises(dcp.CheckpointException, match=r"'x' has the shape \(100000,\)"):
        load({"x": torch.zeros(100_000)}, BlobStorageReader(url, credential=False), planner=Careless())
    with pytest.raises(dcp.CheckpointException, match="x"):
        load({"x": torch.zeros(5)}, BlobStorageReader(url, credential=False))


def test_a_failed_load_names_what_it_may_have_touched(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url, blobs_per_rank=2))
    names = [name for name in fault_service.names("data") if name.endswith(".distcp")]
    fault_service.delete("data", names[-1])
    quiet = TransferConfig(max_concurrency=1)
    target = {"x": torch.zeros(100_000), "y": torch.zeros(100_000), "step": -1}
    with pytest.raises(dcp.CheckpointException) as caught:
        load(target, BlobStorageReader(url, credential=False, transfer=quiet))
    error = reason(caught.value)
    assert isinstance(error, CheckpointError)
    changed = {key for key in ("x", "y") if bool(target[key].any())} | ({"step"} if target["step"] != -1 else set())
    assert changed <= error.touched
    assert changed
    assert error.touched != {"x", "y", "step"}
    assert min(error.touched) in str(error)
