"""Checkpoints that upload only what changed: the base, the digests, and the comparison with them."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from azure.core.credentials import AccessToken

from azstoragetorch import TransferConfig, metrics
from azstoragetorch._blob import transport
from azstoragetorch._tensors import hashing
from azstoragetorch.checkpoint import (
    BlobStorageReader,
    BlobStorageWriter,
    _base,
    _folder,
    _unchanged,
    checkpoint_to_torch_save,
    clean,
    delete_checkpoint,
    inspect_checkpoint,
    keep_last,
    load_keys,
    torch_save_to_checkpoint,
)
from azstoragetorch.exceptions import CheckpointError
from tests.azurite.container import Container
from tests.checkpoint import jobs
from tests.checkpoint.ranks import run_ranks
from tests.checkpoint.states import blank, load, reason, rich_state, same, save
from tests.faults import FaultService, Status

SMALL = TransferConfig(block_size=1 << 16, part_size=1 << 16, max_attempts=2, max_backoff=0.01)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy also what is too short to be worth it, and cut it into many requests."""
    monkeypatch.setattr(_unchanged, "LEAST", 1)
    monkeypatch.setattr(_unchanged, "MOST", 100_000)


@pytest.fixture
def run(fault_service: FaultService) -> str:
    fault_service.create_container("c")
    return f"{fault_service.container_url('c')}/run"


def model(step: int = 0) -> dict[str, Any]:
    """A frozen part of about 1 MB, and a part that changes with every step."""
    generator = torch.Generator().manual_seed(1)
    frozen = {f"layer{number}": torch.randn(30_000, generator=generator) for number in range(8)}
    return {"frozen": frozen, "adapter": {"a": torch.full((500,), float(step)), "step": step}}


def put(url: str, state: dict[str, Any], credential: Any = False, **options: Any) -> None:
    options.setdefault("transfer", SMALL)
    save(state, BlobStorageWriter(url, credential=credential, **options))


def take(url: str, state: dict[str, Any], credential: Any = False, **options: Any) -> dict[str, Any]:
    return load(blank(state), BlobStorageReader(url, credential=credential, **options))


def sent(action: Any) -> tuple[int, int]:
    """Bytes sent and copied by *action*."""
    before = metrics()
    action()
    after = metrics() - before
    return after.bytes_sent, after.bytes_copied


def the_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The text of the one warning."""
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, warnings
    return warnings[0]


# -- saving with a base ------------------------------------------------------------------------------------------------


def test_what_did_not_change_is_copied_by_the_service(container: Container) -> None:
    """With Azurite, which checks permissions and conditions."""
    run = container.blob_url("run")
    put(f"{run}/step-1", model(1), container.sas_that_copies(), base="latest")
    uploaded, copied = sent(lambda: put(f"{run}/step-2", model(2), container.sas_that_copies(), base="latest"))
    assert copied > 950_000
    assert uploaded < 30_000
    for step in (1, 2):
        same(take(f"{run}/step-{step}", model(step), container.sas_that_copies(), verify=True), model(step))


def test_a_checkpoint_does_not_need_its_base(container: Container, tmp_path: Path) -> None:
    """The base is deleted; a download loads with torch's own reader."""
    run = container.blob_url("run")
    put(f"{run}/step-1", model(1), container.sas_that_copies(), base="latest")
    put(f"{run}/step-2", model(2), container.sas_that_copies(), base=f"{run}/step-1")
    delete_checkpoint(f"{run}/step-1", credential=container.sas_that_copies())
    assert all(name.startswith("run/step-2/") for name in container.names())
    same(take(f"{run}/step-2", model(), container.sas_that_copies(), verify=True), model(2))
    for name in container.names():
        (tmp_path / name.rpartition("/")[2]).write_bytes(container.get(name))
    same(load(blank(model()), dcp.FileSystemReader(str(tmp_path))), model(2))


def test_every_kind_of_value_is_saved_with_a_base_and_verified(container: Container) -> None:
    url = container.blob_url("run/step")
    state = rich_state()
    put(f"{url}-1", state, container.sas_that_copies(), base="latest")
    _, copied = sent(lambda: put(f"{url}-2", state, container.sas_that_copies(), base="latest"))
    assert copied > 3_000_000
    same(take(f"{url}-2", state, container.sas_that_copies(), verify=True), state)
    state["model"]["weight"][3, 3] += 1
    state["bf16"][5] += 1
    put(f"{url}-3", state, container.sas_that_copies(), base="latest", blobs_per_rank=1)
    same(take(f"{url}-3", state, container.sas_that_copies(), verify=True), state)


def test_the_latest_is_what_the_save_replaces_or_else_the_newest_next_to_it(run: str) -> None:
    put(f"{run}/step-1", model(1), digests=True)
    put(f"{run}/step-20", model(20), base="latest")
    put(f"{run}/step-3", {"other": torch.ones(5)}, digests=True)
    assert sent(lambda: put(f"{run}/step-21", model(20), base="latest"))[0] < 12_000
    assert sent(lambda: put(f"{run}/step-20", model(20), base="latest"))[0] < 12_000  # over itself
    assert sent(lambda: put(f"{run}/step-3", model(20), base="latest"))[1] == 0  # over the other one
    same(take(f"{run}/step-20", model(), verify=True), model(20))


def test_equal_tensors_are_found_under_other_names_and_in_another_order(run: str) -> None:
    put(f"{run}/1", model(1), digests=True)
    renamed = {"x": dict(reversed(model()["frozen"].items()))}
    uploaded, copied = sent(lambda: put(f"{run}/2", renamed, base=f"{run}/1"))
    assert copied > 950_000
    assert uploaded < 12_000
    same(take(f"{run}/2", renamed, verify=True), renamed)


def test_equal_bytes_of_another_type_or_shape_are_not_taken_from_the_base(run: str) -> None:
    """Their envelopes differ."""
    ones = torch.ones(40_000)
    put(f"{run}/1", {"x": ones}, digests=True)
    for other in (ones.view(torch.int32), ones.reshape(200, 200)):
        assert sent(lambda other=other: put(f"{run}/2", {"x": other}, base=f"{run}/1"))[1] == 0
        same(take(f"{run}/2", {"x": other}, verify=True), {"x": other})


def test_neighbors_are_copied_together(fault_service: FaultService, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_unchanged, "MOST", 1 << 26)
    put(f"{run}/1", model(1), digests=True, blobs_per_rank=1)
    fault_service.reset_log()
    put(f"{run}/2", model(2), base="latest", blobs_per_rank=1)
    assert len(fault_service.requests("put_block_from_url")) == 1
    same(take(f"{run}/2", model(), verify=True), model(2))


def test_short_runs_are_uploaded(fault_service: FaultService, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_unchanged, "LEAST", 1 << 20)
    put(f"{run}/1", model(1), digests=True)
    fault_service.reset_log()
    put(f"{run}/2", model(1), base="latest")
    assert not fault_service.requests("put_block_from_url")
    same(take(f"{run}/2", model(), verify=True), model(1))


def test_without_a_base_nothing_is_digested(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise AssertionError("a digest was computed")

    monkeypatch.setattr("azstoragetorch.checkpoint._encoding.digest_of", refuse)
    put(f"{run}/1", model(1))
    assert not inspect_checkpoint(f"{run}/1", credential=False).has_digests
    with pytest.raises(dcp.CheckpointException):
        put(f"{run}/2", model(1), digests=True)


def test_ranks_copy_their_shards_and_other_ranks_verify_them(container: Container) -> None:
    run = container.blob_url("run")
    results = run_ranks(2, jobs.save_with_a_base, run, container.sas_that_copies())
    assert all(copied > 0 and uploaded < 20_000 for uploaded, copied in results)
    run_ranks(3, jobs.load_verified, run, container.sas_that_copies())


def test_async_save_digests_on_another_thread(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def noting(pieces: Any, algorithm: str) -> str:
        threads.add(threading.get_ident())
        return hashing.digest_of(pieces, algorithm)

    monkeypatch.setattr("azstoragetorch.checkpoint._encoding.digest_of", noting)
    run = container.blob_url("run")
    for step in (1, 2):
        writer = BlobStorageWriter(f"{run}/step-{step}", credential=container.sas_that_copies(), base="latest")
        state = model(step)
        future = dcp.async_save(state, storage_writer=writer, no_dist=True)
        state["frozen"]["layer0"].zero_()  # the save has a copy
        future.result()
    assert threads
    assert threading.get_ident() not in threads
    same(take(f"{run}/step-2", model(), container.sas_that_copies(), verify=True), model(2))


def test_a_layout_in_memory_that_needs_a_copy(run: str) -> None:
    """Also larger than the buffer that it is copied through."""
    state = {"t": torch.arange(600 * 500.0).reshape(600, 500).t(), "small": torch.arange(400.0).reshape(20, 20).t()}
    put(f"{run}/1", state, digests=True)
    assert sent(lambda: put(f"{run}/2", state, base="latest"))[0] < 5_000
    same(take(f"{run}/2", state, verify=True), state)


# -- a base that cannot be used ----------------------------------------------------------------------------------------


def test_a_base_is_refused_halfway(fault_service: FaultService, run: str, caplog: pytest.LogCaptureFixture) -> None:
    put(f"{run}/1", model(1), digests=True)
    fault_service.script("put_block_from_url", [*[Status(404, "CannotVerifyCopySource")] * 4])
    put(f"{run}/2", model(1), base=f"{run}/1")
    assert "CannotVerifyCopySource" in the_warning(caplog)
    same(take(f"{run}/2", model(), verify=True), model(1))


@pytest.mark.parametrize("code", [401, 403, 409, 412, 500, 503])
def test_any_refusal_to_copy_ends_in_an_upload_with_one_warning(
    fault_service: FaultService, run: str, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    state = {**model(1), "transposed": torch.arange(600 * 500.0).reshape(600, 500).t()}
    put(f"{run}/1", state, digests=True)
    fault_service.script("put_block_from_url", [Status(code)], repeat=True)
    uploaded, copied = sent(lambda: put(f"{run}/2", state, base="latest"))
    assert (copied, uploaded > 1_000_000) == (0, True)
    text = "\n".join(r.getMessage() for r in caplog.records if "the base is not used" in r.getMessage())
    assert text.count("\n") == 0
    assert "the rest is uploaded" in text
    same(take(f"{run}/2", state, verify=True), state)


def test_a_base_without_permission_to_read_it(container: Container, caplog: pytest.LogCaptureFixture) -> None:
    run = container.blob_url("run")
    put(f"{run}/1", model(1), container.sas_that_copies(), digests=True)
    put(
        f"{run}/2",
        model(1),
        container.sas_that_copies(),
        base=f"{run}/1?{container.sas_that_copies('wl').signature}",
    )
    assert "the base is not used, and everything is uploaded" in the_warning(caplog)
    assert "sig=" not in caplog.text
    same(take(f"{run}/2", model(), container.sas_that_copies(), verify=True), model(1))


def test_the_data_of_the_base_changed(container: Container, caplog: pytest.LogCaptureFixture) -> None:
    run = container.blob_url("run")
    put(f"{run}/1", model(1), container.sas_that_copies(), digests=True)
    for name in [name for name in container.names() if name.endswith(".distcp")]:
        container.put(name, container.get(name))
    put(f"{run}/2", model(1), container.sas_that_copies(), base="latest")
    assert "overwritten" in caplog.text
    assert "the rest is uploaded" in the_warning(caplog)
    same(take(f"{run}/2", model(), container.sas_that_copies(), verify=True), model(1))


def test_a_base_in_another_account_gets_no_credential(
    fault_service: FaultService, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultService() as other:
        other.create_container("c")
        elsewhere = f"{other.container_url('c')}/run/1"
        put(elsewhere, model(1), digests=True)
        other.reset_log()
        put(f"{run}/2", model(1), base=elsewhere)
        put(f"{run}/3", model(1), base=f"{elsewhere}?sv=1&sig=secret")
        assert other.requests() == []
    assert caplog.text.count("another account") == 2
    assert "secret" not in caplog.text
    same(take(f"{run}/2", model()), model(1))


def test_a_base_that_does_not_exist(run: str, caplog: pytest.LogCaptureFixture) -> None:
    put(f"{run}/2", model(1), base=f"{run}/1")
    assert "there is no checkpoint here" in the_warning(caplog)
    same(take(f"{run}/2", model()), model(1))


def test_a_base_that_was_copied_to_its_place(
    fault_service: FaultService, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(f"{run}/1", model(1), digests=True)
    for name in fault_service.names("c"):
        fault_service.put("c", name.replace("/1/", "/copy-1/"), fault_service.get("c", name))
    put(f"{run}/2", model(1), base=f"{run}/copy-1")
    assert "copied here" in the_warning(caplog)
    same(take(f"{run}/copy-1", model(), verify=True), model(1))


def digests_name(fault_service: FaultService) -> str:
    (name,) = [name for name in fault_service.names("c") if name.endswith(".digests")]
    return name


def _resealed(whole: Any) -> bytes:
    body = json.dumps(whole).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


@pytest.mark.parametrize("damage", ["missing", "truncated", "a flipped bit", "not JSON", "deep", "foreign", "hostile"])
def test_digests_that_are_damaged_are_treated_as_absent(
    fault_service: FaultService, run: str, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    put(f"{run}/1", model(1), digests=True)
    name = digests_name(fault_service)
    content = fault_service.get("c", name)
    whole = json.loads(content[65:])
    at = content.rindex(b'"]') - 1  # the last digit of a digest
    broken = {
        "truncated": content[:-10],
        "a flipped bit": content[:at] + (b"1" if content[at : at + 1] != b"1" else b"2") + content[at + 1 :],
        "not JSON": hashlib.sha256(b"nothing").hexdigest().encode() + b"\nnothing",
        "deep": hashlib.sha256(b"[" * 100_000).hexdigest().encode() + b"\n" + b"[" * 100_000,
        "foreign": _resealed({**whole, "save_id": "another"}),
        "hostile": _resealed({**whole, "blobs": {"../x": {"sha256": [[0, "1", "zz"]]}}}),
    }
    if damage == "missing":
        fault_service.delete("c", name)
    else:
        fault_service.put("c", name, broken[damage])
    _folder._known.forget()
    assert sent(lambda: put(f"{run}/2", model(1), base=f"{run}/1"))[1] == 0
    assert "its digests" in the_warning(caplog)
    same(take(f"{run}/1", model()), model(1))
    with pytest.raises(dcp.CheckpointException) as failed:
        take(f"{run}/1", model(), verify=True)
    assert "cannot be verified: its digests" in str(reason(failed.value))
    same(take(f"{run}/2", model(), verify=True), model(1))


def test_an_algorithm_that_is_not_installed(run: str, caplog: pytest.LogCaptureFixture) -> None:
    put(f"{run}/1", model(1), digests=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "_blake3", lambda: None)
        put(f"{run}/2", model(1), base=f"{run}/1")
        assert "pip install blake3" in the_warning(caplog)
        same(take(f"{run}/2", model(), verify=True), model(1))  # by SHA-256
        with pytest.raises(dcp.CheckpointException) as failed:
            take(f"{run}/1", model(), verify=True)
        assert "pip install blake3" in str(reason(failed.value))
    assert sent(lambda: put(f"{run}/3", model(1), base=f"{run}/2"))[0] < 12_000  # in the algorithm of the base


def test_arguments_are_checked(run: str) -> None:
    with pytest.raises(TypeError, match="base must be a URL"):
        BlobStorageWriter(run, base=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="URL"):
        BlobStorageWriter(run, base="step-1")


def test_the_sas_of_a_base_is_in_no_pickle(run: str) -> None:
    writer = BlobStorageWriter(run, credential=False, base=f"{run}/1?sv=2020&sig=topsecret")
    assert b"topsecret" not in pickle.dumps(writer)
    assert "topsecret" not in repr(vars(writer))


class _Token:
    def get_token(self, *_scopes: str, **_options: Any) -> AccessToken:
        return AccessToken("the-token", 4_000_000_000)


def test_a_token_goes_along_as_the_authorization_of_the_source(
    https_fault_service: FaultService, caplog: pytest.LogCaptureFixture
) -> None:
    service = https_fault_service
    service.create_container("c")
    service.require_token("the-token")
    run = f"{service.container_url('c')}/run"
    put(f"{run}/1", model(1), _Token(), base="latest")
    assert sent(lambda: put(f"{run}/2", model(1), _Token(), base="latest"))[1] > 950_000
    copies = service.requests("put_block_from_url")
    assert {copy.headers["x-ms-copy-source-authorization"] for copy in copies} == {"Bearer the-token"}
    assert all(copy.headers["x-ms-source-if-match"].startswith('"') for copy in copies)
    assert "the-token" not in caplog.text


# -- verifying ---------------------------------------------------------------------------------------------------------


def flip(service: FaultService, name: str, at: int) -> None:
    data = bytearray(service.get("c", name))
    data[at] ^= 1
    service.put("c", name, bytes(data))


def test_a_flipped_bit_is_named_with_both_digests(fault_service: FaultService, run: str) -> None:
    put(f"{run}/1", {"x": torch.ones(50_000), "y": torch.zeros(50_000)}, digests=True, blobs_per_rank=1)
    (name,) = [name for name in fault_service.names("c") if name.endswith(".distcp")]
    flip(fault_service, name, 300_000)
    state = {"x": torch.zeros(50_000), "y": torch.ones(50_000)}
    same(take(f"{run}/1", {"x": torch.ones(50_000)}, verify=True, check_etags=False), {"x": torch.ones(50_000)})
    with pytest.raises(dcp.CheckpointException) as failed:
        take(f"{run}/1", state, verify=True, check_etags=False)
    error = reason(failed.value)
    assert isinstance(error, CheckpointError)
    assert error.key == "y"
    text = str(error)
    assert "'y' is not what was saved" in text
    assert f"{run}/1/{name.rpartition('/')[2]}" in text
    assert text.count("blake3:") == 2


@pytest.mark.parametrize("at", [0, 170_000, 199_999])
def test_a_part_of_a_tensor_and_a_converted_one_are_compared_as_a_whole(
    fault_service: FaultService, run: str, at: int
) -> None:
    """Whether or not the damage is in the part that is loaded."""
    values = torch.arange(100_000, dtype=torch.int16)
    put(f"{run}/1", {"x": values}, digests=True)
    (name,) = [name for name in fault_service.names("c") if name.endswith(".distcp")]

    def as_float() -> torch.Tensor:
        state = {"x": torch.zeros(100_000, dtype=torch.float64)}
        load(state, BlobStorageReader(f"{run}/1", credential=False, verify=True, check_etags=False))
        return state["x"]

    assert torch.equal(as_float(), values.double())
    head = inspect_head(fault_service, name)
    flip(fault_service, name, head + at)
    with pytest.raises(dcp.CheckpointException, match="is not what was saved"):
        as_float()


def inspect_head(service: FaultService, name: str) -> int:
    """Where the bytes of the only tensor begin."""
    whole = json.loads(service.get("c", digests_name(service))[65:])
    ((start, _, _),) = whole["blobs"][name.rpartition("/")[2]]["blake3"]
    return int(start)


def test_entries_other_than_tensors_are_compared_before_they_are_unpickled(
    fault_service: FaultService, run: str
) -> None:
    put(f"{run}/1", {"note": {"text": "hello hello hello"}}, digests=True)
    (name,) = [name for name in fault_service.names("c") if name.endswith(".distcp")]
    data = fault_service.get("c", name)
    fault_service.put("c", name, data.replace(b"hello hello", b"jello hello"))
    with pytest.raises(dcp.CheckpointException, match=r"'note\.text' is not what was saved"):
        take(f"{run}/1", {"note": {"text": "?"}}, verify=True, check_etags=False)


def test_a_checkpoint_without_digests_is_not_verified(run: str) -> None:
    put(f"{run}/1", model(1))
    with pytest.raises(dcp.CheckpointException) as failed:
        take(f"{run}/1", model(), verify=True)
    assert "saved without digests" in str(reason(failed.value))


# -- management --------------------------------------------------------------------------------------------------------


def test_cleaning_and_deleting_know_the_side_blob(fault_service: FaultService, run: str) -> None:
    for step in (1, 2, 3):
        put(f"{run}/step-{step}", model(step), base="latest")
    orphan = "run/step-1/__0_0.20200101000000-0123456789abcdef.digests"
    fault_service.put("c", orphan, b"of an interrupted save")
    assert [url.rpartition("/")[2] for url in clean(run, credential=False)] == [orphan.rpartition("/")[2]]
    _folder._known.forget()  # as another process
    clean(run, min_age=-100, credential=False)
    _folder._known.forget()
    for step in (1, 2, 3):
        same(take(f"{run}/step-{step}", model(), verify=True), model(step))
    assert len(keep_last(run, 1, credential=False)) == 2
    assert all(name.startswith("run/step-3/") for name in fault_service.names("c"))
    put(f"{run}/step-3", model(4), base="latest")  # the side blob of the replaced one goes, too
    assert sum(name.endswith(".digests") for name in fault_service.names("c")) == 1
    put(f"{run}/step-3", model(4))
    assert sum(name.endswith(".digests") for name in fault_service.names("c")) == 0
    put(f"{run}/step-3", model(4), digests=True)
    delete_checkpoint(f"{run}/step-3", credential=False)
    assert fault_service.names("c") == []


def test_pruning_after_each_save_harms_no_checkpoint(run: str) -> None:
    """Each is whole: its base, and the base of its base, are deleted."""
    for step in range(1, 6):
        _, copied = sent(lambda step=step: put(f"{run}/step-{step}", model(step), base="latest"))  # type: ignore[misc]
        assert (copied > 900_000) == (step > 1)
        keep_last(run, 2, credential=False)
        clean(run, credential=False)
        _folder._known.forget()  # as another process
        for kept in range(max(1, step - 1), step + 1):
            same(take(f"{run}/step-{kept}", model(), verify=True), model(kept))


@contextmanager
def before_copy(nth: int, action: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run *action* before the request *nth* that copies from a base; what it returned is in the list."""
    original, copies, done = transport.send, itertools.count(), list[Any]()

    def send(origin: Any, method: str, target: str, headers: Any, **options: Any) -> Any:
        if "x-ms-copy-source" in headers and next(copies) == nth:
            done.append(action())
        return original(origin, method, target, headers, **options)

    transport.send = send  # type: ignore[assignment]
    try:
        yield done
    finally:
        transport.send = original


ALONE = replace(SMALL, max_connections=1, max_concurrency=1)


@pytest.mark.parametrize("nth", [0, 3])
@pytest.mark.parametrize("what", ["clean", "keep_last", "delete"])
def test_the_base_is_cleaned_or_deleted_while_a_save_copies_from_it(
    run: str, what: str, nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The save is whole, and so is the base where it was not deleted; what can no longer be copied is uploaded."""
    put(f"{run}/step-1", model(1), digests=True)
    put(f"{run}/step-2", model(7))  # what keep_last keeps
    actions: dict[str, Callable[[], Any]] = {
        "clean": lambda: clean(f"{run}/step-1", min_age=-100, credential=False, transfer=ALONE),
        "keep_last": lambda: keep_last(run, 1, credential=False, transfer=ALONE),
        "delete": lambda: delete_checkpoint(f"{run}/step-1", credential=False, transfer=ALONE),
    }
    with before_copy(nth, actions[what]) as done:
        uploaded, _ = sent(lambda: put(f"{run}/step-3", model(3), base=f"{run}/step-1", transfer=ALONE))
    assert done == [[f"{run}/step-1"] if what == "keep_last" else [] if what == "clean" else done[0]]
    _folder._known.forget()
    same(take(f"{run}/step-3", model(), verify=True), model(3))
    if what == "clean":
        same(take(f"{run}/step-1", model(), verify=True), model(1))
        assert uploaded < 50_000
    else:
        assert "the base is not used, and the rest is uploaded" in the_warning(caplog)
        assert uploaded > 500_000


def test_a_save_that_is_cleaned_away_while_it_copies_has_no_effect(run: str) -> None:
    """With a cutoff that includes the save: it fails, or is whole, and the base is as it was."""
    put(f"{run}/step-1", model(1), digests=True)
    saved = 1
    with (
        before_copy(5, lambda: clean(run, min_age=-100, credential=False, transfer=ALONE)) as done,
        suppress(CheckpointError),
    ):
        put(f"{run}/step-1", model(2), base="latest", transfer=ALONE)
        saved = 2
    assert len(done) == 1
    _folder._known.forget()
    same(take(f"{run}/step-1", model(), verify=True), model(saved))
    put(f"{run}/step-1", model(3), base="latest")
    same(take(f"{run}/step-1", model(), verify=True), model(3))


def test_the_little_that_changed_is_spread_over_connections(
    fault_service: FaultService, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut into short blocks, and the copies are as many at once as there are connections."""
    monkeypatch.setattr(_unchanged, "MOST", 64 << 20)
    monkeypatch.setattr(_base, "_SPREAD_BLOCK", 20_000)
    config = TransferConfig(max_connections=8, max_concurrency=2)
    state = model(1) | {"new": torch.zeros(50_000)}
    put(f"{run}/step-1", state, base="latest", transfer=config, blobs_per_rank=1)
    fault_service.reset_log()
    state["new"] += 1
    put(f"{run}/step-2", state, base="latest", transfer=config, blobs_per_rank=1)
    sizes = [request.body_length for request in fault_service.requests("put_block")]
    assert len(sizes) >= 10
    assert max(sizes) <= 20_000
    same(take(f"{run}/step-2", state, verify=True), state)


def test_export_and_import(container: Container) -> None:
    run = container.blob_url("run")
    put(f"{run}/1", model(1), container.sas_that_copies(), base="latest")
    assert "with digests" in str(inspect_checkpoint(f"{run}/1", credential=container.sas_that_copies()))
    blob = container.blob_url("model.pt")
    checkpoint_to_torch_save(f"{run}/1", blob, credential=container.sas_that_copies(), verify=True)
    torch_save_to_checkpoint(blob, f"{run}/2", credential=container.sas_that_copies(), base=f"{run}/1")
    assert inspect_checkpoint(f"{run}/2", credential=container.sas_that_copies()).has_digests
    same(load_keys(f"{run}/2", credential=container.sas_that_copies(), verify=True), model(1))


def test_a_save_of_one_rank_alone_has_its_base_and_its_digests(run: str) -> None:
    for _ in range(2):
        last = sent(lambda: put_alone(run))
    assert last[1] > 950_000
    assert clean(run, min_age=-100, credential=False) == []
    state = blank(model(1))
    reader = BlobStorageReader(run, credential=False, verify=True)
    load(state, reader, process_group=None)
    same(state, model(1))


def put_alone(url: str) -> None:
    writer = BlobStorageWriter(url, credential=False, transfer=SMALL, base="latest")
    save(model(1), writer, use_collectives=False)
