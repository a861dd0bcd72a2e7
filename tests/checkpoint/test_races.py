"""Concurrent saves, loads and cleaning: each is right or fails clearly. `tests/interleavings` has all orders."""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from azstoragetorch import TransferConfig
from azstoragetorch.checkpoint import (
    BlobStorageReader,
    BlobStorageWriter,
    _folder,
    clean,
    delete_checkpoint,
    keep_last,
    latest_checkpoint,
)
from azstoragetorch.checkpoint._fence import new_tombstone
from azstoragetorch.checkpoint._format import load_metadata
from azstoragetorch.exceptions import CheckpointConflictError, CheckpointError, CheckpointNotFoundError
from tests.checkpoint.states import load, reason, save
from tests.faults import FaultService, Fine, Hold, Match, Status
from tests.support import collect_garbage

QUICK = TransferConfig(max_backoff=0.05)
OLD = "__0_0.20200101000000-0123456789abcdef.distcp"


@pytest.fixture
def url(fault_service: FaultService) -> str:
    fault_service.create_container("data")
    return f"{fault_service.container_url('data')}/run"


def state(step: int) -> dict[str, Any]:
    return {"x": torch.full((1000,), float(step)), "step": step}


def loaded(url: str) -> int:
    found = load({"x": torch.zeros(1000), "step": -1}, BlobStorageReader(url, credential=False))
    assert found["x"].unique().tolist() == [float(found["step"])]
    return int(found["step"])


def writer(url: str, **options: Any) -> BlobStorageWriter:
    return BlobStorageWriter(url, credential=False, transfer=QUICK, **options)


class Meanwhile(dcp.DefaultSavePlanner):
    """Runs an action once while the data of a save is uploaded."""

    def __init__(self, action: Any) -> None:
        super().__init__()
        self._action = action

    def resolve_data(self, write_item: Any) -> Any:
        action, self._action = self._action, lambda: None
        action()
        return super().resolve_data(write_item)


def save_id(service: FaultService) -> str:
    found = load_metadata(service.get("data", "run/.metadata")).storage_meta
    assert found is not None
    assert found.save_id is not None
    return found.save_id


@pytest.mark.parametrize("had_one", [False, True])
def test_of_two_saves_at_once_the_later_commit_fails_and_changes_nothing(
    fault_service: FaultService, url: str, had_one: bool
) -> None:
    if had_one:
        save(state(1), writer(url))
    with pytest.raises(dcp.CheckpointException) as caught:
        save(state(2), writer(url), planner=Meanwhile(lambda: save(state(3), writer(url))))
    error = reason(caught.value)
    assert isinstance(error, CheckpointConflictError)
    assert error.other_save_id == save_id(fault_service)
    assert error.other_save_id in str(error)
    assert str(error.save_id) in str(error)
    assert loaded(url) == 3


def test_what_is_there_is_read_while_torch_plans_and_before_any_rank_uploads(
    fault_service: FaultService, url: str
) -> None:
    """A round trip that hides behind the planning; `_commit` depends on its order."""
    save(state(1), writer(url))
    fault_service.reset_log()
    gate = threading.Event()
    fault_service.script(Match("get_blob", path=".metadata"), [Hold(gate)])

    class Planner(dcp.DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            plan = super().create_global_plan(all_plans)
            fault_service.wait_for_requests(1)
            gate.set()  # a save that waits for the answer before it plans never gets here
            return plan

    save(state(2), writer(url), planner=Planner())
    operations = [(request.operation, request.path) for request in fault_service.requests()]
    assert [name for name, path in operations if path.endswith(".metadata")] == ["get_blob", "put_blob"]
    assert operations[0][0] == "get_blob"
    assert loaded(url) == 2


def test_a_save_of_one_rank_alone_fails_if_all_ranks_have_saved_meanwhile(
    fault_service: FaultService, url: str
) -> None:
    """Readers prefer the checkpoint of all ranks, so reporting success would be wrong."""
    with pytest.raises(CheckpointConflictError, match="of rank 0 alone") as caught:
        save(
            state(2),
            writer(url),
            planner=Meanwhile(lambda: save(state(3), writer(url))),
            use_collectives=False,
        )
    assert caught.value.other_save_id == save_id(fault_service)
    assert loaded(url) == 3
    assert not any(name.endswith("__0.metadata") for name in fault_service.names("data"))


def test_a_save_of_all_ranks_replaces_one_of_a_rank_alone_that_came_before(url: str) -> None:
    save(
        state(2),
        writer(url),
        planner=Meanwhile(lambda: save(state(3), writer(url), use_collectives=False)),
    )
    assert loaded(url) == 2


def test_a_checkpoint_that_is_deleted_while_it_is_to_be_replaced_fails_the_save(url: str) -> None:
    save(state(1), writer(url))
    with pytest.raises(dcp.CheckpointException, match="was deleted"):
        save(state(2), writer(url), planner=Meanwhile(lambda: delete_checkpoint(url, credential=False)))
    with pytest.raises(dcp.CheckpointException, match="no complete checkpoint"):
        loaded(url)


def test_the_id_that_the_planner_gets_is_the_one_in_the_metadata(fault_service: FaultService, url: str) -> None:
    told = []

    class Curious(dcp.DefaultSavePlanner):
        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
            told.append(storage_meta.save_id)
            super().set_up_planner(state_dict, storage_meta, is_coordinator)

    mine = writer(url)
    for step in (1, 2):
        found = save(state(step), mine, planner=Curious())
        assert found is None or found.storage_meta.save_id == told[-1]
        assert save_id(fault_service) == told[-1]
    assert told[0] != told[1]


@pytest.mark.parametrize("is_one_folder", [False, True])
def test_saves_by_one_writer_that_overlap_keep_their_states_apart(url: str, is_one_folder: bool) -> None:
    """Both are uploading at the same time."""
    mine, both = writer(url), threading.Barrier(2)

    def run(step: int) -> str | None:
        place = url if is_one_folder else f"{url}/{step}"
        try:
            dcp.save(
                state(step),
                checkpoint_id=place,
                storage_writer=mine,
                planner=Meanwhile(both.wait),
                no_dist=True,
            )
        except dcp.CheckpointException as error:
            return None if isinstance(reason(error), CheckpointConflictError) else repr(error)
        return place

    with ThreadPoolExecutor(2) as pool:
        places = dict(zip((1, 2), pool.map(run, (1, 2)), strict=True))
    succeeded = {step: place for step, place in places.items() if place is not None}
    assert len(succeeded) == (1 if is_one_folder else 2)
    for step, place in succeeded.items():
        assert loaded(place) == step


def test_a_save_inside_another_by_the_same_writer_and_thread(url: str) -> None:
    """As in a signal handler, between two calls of torch."""
    mine = writer(url)

    class Interrupted(dcp.DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            dcp.save(state(7), checkpoint_id=f"{url}/inner", storage_writer=mine, no_dist=True)
            return super().finish_plan(new_plan)

    dcp.save(state(1), checkpoint_id=f"{url}/outer", storage_writer=mine, planner=Interrupted(), no_dist=True)
    assert (loaded(f"{url}/outer"), loaded(f"{url}/inner")) == (1, 7)


STEPS = ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"]  # of a planner


class Logging(BlobStorageWriter):
    """A writer of a user, with a method of its own between torch and ours."""

    def reset(self, checkpoint_id: Any = None) -> None:
        super().reset(checkpoint_id)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [BlobStorageWriter, Logging])
def test_a_save_that_fails_inside_another_by_the_same_writer_and_thread(
    url: str, step: str, kind: type[BlobStorageWriter]
) -> None:
    """As in a signal handler: the outer save keeps its folder, wherever it is and the inner one fails."""
    mine = kind(url, credential=False)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("broken")

    for inside in STEPS:
        failing, outer = dcp.DefaultSavePlanner(), dcp.DefaultSavePlanner()
        setattr(failing, step, fail)
        original = getattr(outer, inside)
        failures: list[BaseException] = []

        def handle(
            *arguments: Any, original: Any = original, failing: Any = failing, failures: Any = failures, **options: Any
        ) -> Any:
            if not failures:
                with pytest.raises(dcp.CheckpointException, match="broken") as caught:
                    dcp.save(state(7), checkpoint_id=f"{url}/inner", storage_writer=mine, planner=failing, no_dist=True)
                failures.append(caught.value)
            return original(*arguments, **options)

        setattr(outer, inside, handle)
        dcp.save(state(1), checkpoint_id=f"{url}/{inside}", storage_writer=mine, planner=outer, no_dist=True)
        assert failures
        assert loaded(f"{url}/{inside}") == 1
    with pytest.raises(dcp.CheckpointException, match=r"no checkpoint here|no complete checkpoint"):
        loaded(f"{url}/inner")


def test_a_save_that_has_failed_keeps_nothing_alive(url: str) -> None:
    class Failing(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            raise OSError("broken")

    mine = writer(url)
    tensor = torch.zeros(1000)
    gone = weakref.ref(tensor)
    with pytest.raises(dcp.CheckpointException, match="broken"):
        dcp.save({"x": tensor}, checkpoint_id=url, storage_writer=mine, planner=Failing(), no_dist=True)
    del tensor
    collect_garbage()
    assert gone() is None


def test_an_error_while_old_data_is_deleted_does_not_fail_the_save(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url))
    fault_service.script("delete", [Status(403)], repeat=True)
    save(state(2), writer(url))
    assert loaded(url) == 2


# -- looks after the commit -------------------------------------------------------------------------------------------


def failed(url: str, **options: Any) -> str:
    """The message of a save that fails."""
    with pytest.raises((dcp.CheckpointException, CheckpointError)) as caught:
        save(state(1), writer(url), **options)
    error = caught.value if isinstance(caught.value, CheckpointError) else reason(caught.value)
    assert isinstance(error, CheckpointError)
    assert error.checkpoint == url
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return str(error)


def when_metadata(service: FaultService, exists: bool, action: Any = None) -> Any:
    """A condition for requests: whether ``.metadata`` or that of rank 0 exists; *action* runs first if it holds."""

    def holds(_request: Any) -> bool:
        found = any(name.endswith(("/.metadata", "/__0.metadata")) for name in service.names("data"))
        if found == exists and action is not None:
            action()
        return found == exists

    return holds


def delete_data(service: FaultService) -> None:
    for name in service.names("data"):
        if name.endswith(".distcp"):
            service.delete("data", name)


def test_a_commit_that_is_refused_has_no_effect(fault_service: FaultService, url: str) -> None:
    fault_service.script(Match("put_blob", path="metadata"), [Status(403)])
    assert "could not be written, so the save has no effect" in failed(url)
    assert not fault_service.exists("data", "run/.metadata")


def test_a_failure_to_look_for_the_data_of_a_committed_save_says_so(fault_service: FaultService, url: str) -> None:
    """A first save looks once more after its commit."""
    is_committed = when_metadata(fault_service, exists=True)
    fault_service.script(Match("head", path="distcp", where=is_committed), [Status(403)], repeat=True)
    message = failed(url)
    assert "is committed, but whether its data is still there could not be checked" in message
    assert "HEAD __0_0." in message
    assert "403" in message
    assert "no effect" not in message
    fault_service.clear_script()
    assert loaded(url) == 1


@pytest.mark.parametrize("own", [False, True])
def test_a_save_whose_data_is_deleted_at_its_commit_takes_itself_back(
    fault_service: FaultService, url: str, own: bool
) -> None:
    """It leaves nothing behind, not even a tombstone."""
    before = when_metadata(fault_service, exists=False, action=lambda: delete_data(fault_service))
    fault_service.script(Match("put_blob", path="metadata", where=before), [Fine()])
    options: dict[str, Any] = {"no_dist": True, "use_collectives": False} if own else {}
    assert "was deleted while the save was in progress, so the save has no effect" in failed(url, **options)
    assert fault_service.names("data") == []


def test_a_save_that_may_not_list_takes_itself_back_too(fault_service: FaultService, url: str) -> None:
    """A placeholder stays, which the next save replaces."""
    before = when_metadata(fault_service, exists=False, action=lambda: delete_data(fault_service))
    fault_service.script(Match("put_blob", path="metadata", where=before), [Fine()])
    fault_service.script("list_blobs", [Status(403)], repeat=True)
    assert "was deleted while the save was in progress, so the save has no effect" in failed(url)
    assert fault_service.names("data") == ["run/.metadata"]
    with pytest.raises(dcp.CheckpointException, match="no checkpoint here"):
        loaded(url)
    save(state(2), writer(url))
    assert loaded(url) == 2


def test_a_save_that_cannot_be_taken_back_says_so(fault_service: FaultService, url: str) -> None:
    before = when_metadata(fault_service, exists=False, action=lambda: delete_data(fault_service))
    after = when_metadata(fault_service, exists=True)
    fault_service.script(Match("put_blob", path="metadata", where=before), [Fine()])
    fault_service.script(Match("put_blob", path="metadata", where=after), [Status(403)], repeat=True)
    message = failed(url)
    assert "is committed, but __0_0." in message
    assert "its metadata could not be taken back; delete the checkpoint" in message
    assert "403" in message
    assert "no effect" not in message
    fault_service.clear_script()
    assert delete_checkpoint(url, credential=False) == 1
    assert fault_service.names("data") == []


def test_a_failure_to_look_for_a_checkpoint_of_all_ranks_says_so(fault_service: FaultService, url: str) -> None:
    """A save of one rank alone looks for one after its commit, since readers would prefer it."""
    is_committed = when_metadata(fault_service, exists=True)
    fault_service.script(Match("head", path=r"/\.metadata", where=is_committed), [Status(403)], repeat=True)
    message = failed(url, no_dist=True, use_collectives=False)
    assert "is committed, but whether there is a checkpoint of all ranks" in message
    assert "403" in message
    assert "no effect" not in message
    assert fault_service.exists("data", "run/__0.metadata")


def test_a_save_of_one_rank_alone_that_cannot_be_taken_back_says_so(fault_service: FaultService, url: str) -> None:
    after = when_metadata(fault_service, exists=True)
    fault_service.script(Match("put_blob", path="__0.metadata", where=after), [Fine(), Status(403)], repeat=True)
    message = failed(url, planner=Meanwhile(lambda: save(state(3), writer(url))), no_dist=True, use_collectives=False)
    assert "is committed, but a save of all ranks was committed while it was in progress" in message
    assert "could not be taken back; delete __0.metadata" in message
    assert loaded(url) == 3


# -- cleaning ---------------------------------------------------------------------------------------------------------


def test_cleaning_leaves_a_save_in_progress_alone(fault_service: FaultService, url: str) -> None:
    """By default, also if there are old leftovers to delete, which rewrites the metadata."""
    save(state(1), writer(url))
    fault_service.put("data", f"run/{OLD}", b"x")
    cleaned: list[str] = []
    save(state(2), writer(url), planner=Meanwhile(lambda: cleaned.extend(clean(url, credential=False))))
    assert [name.rpartition("/")[2] for name in cleaned] == [OLD]
    assert loaded(url) == 2


@pytest.mark.parametrize("had_one", [False, True])
def test_cleaning_without_a_min_age_fails_a_save_in_progress_with_the_previous_one_in_place(
    fault_service: FaultService, url: str, had_one: bool
) -> None:
    """The deletions take effect after the save has ended, since the service is slow."""
    if had_one:
        save(state(1), writer(url))
    original = BlobStorageWriter.finish
    pool = ThreadPoolExecutor(1)
    try:
        with pytest.MonkeyPatch.context() as patch:

            def finish(self: Any, metadata: Any, results: Any) -> None:
                cleaning = pool.submit(clean, url, min_age=0, credential=False)
                cleaning.result()
                original(self, metadata, results)

            patch.setattr(BlobStorageWriter, "finish", finish)
            with pytest.raises(dcp.CheckpointException):
                save(state(2), writer(url))
    finally:
        pool.shutdown()
    assert len(fault_service.names("data")) == (2 if had_one else 0)
    if had_one:
        assert loaded(url) == 1


def test_a_dry_run_says_what_would_go_and_deletes_nothing(fault_service: FaultService, url: str) -> None:
    for step in (1, 2, 3):
        save(state(step), writer(f"{url}/step-{step}"))
    fault_service.put("data", f"run/step-1/{OLD}", b"x")
    before = fault_service.names("data")
    assert [found.rpartition("/")[2] for found in clean(url, dry_run=True, credential=False)] == [OLD]
    assert [found[-1] for found in keep_last(url, 1, dry_run=True, credential=False)] == ["1", "2"]
    assert fault_service.names("data") == before
    assert [found[-1] for found in keep_last(url, 1, credential=False)] == ["1", "2"]
    assert {name.split("/")[1] for name in fault_service.names("data")} == {"step-3"}


def test_names_that_are_not_clear_are_refused_with_the_reason(fault_service: FaultService, url: str) -> None:
    for name in ("0.40-100", "0.31-200"):
        save(state(1), writer(f"{url}/{name}"))
    before = fault_service.names("data")
    with pytest.raises(CheckpointError, match=r"several numbers.*Nothing was deleted"):
        keep_last(url, 1, credential=False)
    assert fault_service.names("data") == before


def test_what_a_killed_cleaner_leaves_is_not_a_checkpoint(fault_service: FaultService, url: str) -> None:
    fault_service.put("data", "run/step-2/.metadata", new_tombstone())
    save(state(1), writer(f"{url}/step-1"))
    assert str(latest_checkpoint(url, credential=False)).endswith("step-1")
    with pytest.raises(CheckpointNotFoundError):
        BlobStorageReader(f"{url}/step-2", credential=False).read_metadata()
    save(state(2), writer(f"{url}/step-2", overwrite=False))
    assert loaded(f"{url}/step-2") == 2


# -- one version ------------------------------------------------------------------------------------------------------


def test_ranks_that_have_read_different_versions_all_raise(url: str) -> None:
    readers = []
    for step in (1, 2):
        save(state(step), writer(url))
        readers.append(BlobStorageReader(url, credential=False))
        readers[-1].set_up_storage_reader(readers[-1].read_metadata(), step == 1, rank=step - 1)
    plans = [reader.prepare_local_plan(dcp.LoadPlan([])) for reader in readers]
    with pytest.raises(CheckpointError, match=r"rank 0 has read the checkpoint of save .* and rank 1"):
        readers[0].prepare_global_plan(plans)


def test_ranks_that_did_not_coordinate_have_a_version_each(url: str) -> None:
    plans = []
    for rank in (0, 1):
        mine = writer(url)
        mine.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(state(rank), None, True)
        made, metadata = planner.create_global_plan([planner.create_local_plan()])
        mine.finish(metadata, [mine.write_data(planner.finish_plan(made[0]), planner).value()])
        reader = BlobStorageReader(url, credential=False)
        reader.set_up_storage_reader(reader.read_metadata(rank=rank), rank == 0, rank=rank)
        plans.append(reader.prepare_local_plan(dcp.LoadPlan([])))
    assert len(BlobStorageReader(url, credential=False).prepare_global_plan(plans)) == 2


def test_a_reader_may_name_the_version(fault_service: FaultService, url: str) -> None:
    save(state(1), writer(url))
    first = save_id(fault_service)
    reader = BlobStorageReader(url, credential=False, version=first)
    assert load({"step": -1}, reader)["step"] == 1
    save(state(2), writer(url))
    with pytest.raises(CheckpointError, match=f"not {first}"):
        reader.read_metadata()
    with pytest.raises(TypeError, match="version"):
        BlobStorageReader(url, version=3)  # type: ignore[arg-type]


def test_cached_metadata_is_the_callers_to_change(url: str) -> None:
    save(state(1), writer(url))
    for _ in range(3):
        metadata = BlobStorageReader(url, credential=False).read_metadata()
        metadata.state_dict_metadata["x"].chunks.clear()  # type: ignore[union-attr]
        for info in metadata.storage_data.values():
            info.relative_path = "nowhere"
        metadata.storage_data.clear()
    assert loaded(url) == 1


def test_an_old_failure_does_not_block_the_next_load(fault_service: FaultService, url: str) -> None:
    """For the metadata of one rank, which torch requests if that of all ranks is missing."""
    dcp.save(state(1), storage_writer=writer(url), no_dist=True, use_collectives=False)
    reader = BlobStorageReader(url, credential=False)
    fault_service.script(Match("get_blob", path="metadata"), [Status(403)])
    with pytest.raises(Exception, match="403"):
        reader.read_metadata()
    with pytest.raises(CheckpointNotFoundError):
        reader.read_metadata()
    assert reader.read_metadata(rank=0).storage_data


def test_what_a_save_costs_in_requests(fault_service: FaultService, url: str) -> None:
    """One more than an undisturbed save: a check, if no checkpoint existed before."""
    sent = []
    for step in (1, 2):
        fault_service.log.clear()
        save(state(step), writer(url, blobs_per_rank=1))
        sent.append([request.operation for request in fault_service.requests()])
    assert sent[0] == ["get_blob", "put_blob", "head", "put_blob", "head"]
    assert sent[1] == ["get_blob", "put_blob", "head", "put_blob", "delete"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_knows_nothing_of_its_parents_checkpoints(url: str) -> None:
    """Knowledge about checkpoints belongs to one process, and no lock guards it that a fork could leave locked."""
    save(state(1), writer(url))
    assert loaded(url) == 1
    assert _folder._known.peek() is not None
    child = os.fork()
    if not child:
        os._exit(0 if _folder._known.peek() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_ranks_saved_that_are_no_more_is_deleted(fault_service: FaultService, url: str) -> None:
    """Without collectives each rank loads separate metadata, and as many ranks as before would load two steps."""
    for rank in range(3):
        mine = writer(url)
        mine.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(state(1), None, True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        mine.finish(metadata, [mine.write_data(planner.finish_plan(plans[0]), planner).value()])
    assert sum(name.endswith(".metadata") for name in fault_service.names("data")) == 3
    dcp.save(state(2), storage_writer=writer(url), no_dist=True, use_collectives=False)
    names = [name.rpartition("/")[2] for name in fault_service.names("data")]
    assert len(names) == 2
    assert all(name.startswith("__0") for name in names)
