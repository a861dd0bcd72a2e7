"""Published weights: bit for bit, over kills, lost responses, and missing, late, truncated, and foreign blobs."""

from __future__ import annotations

import json
import logging
import pickle
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from azstoragetorch import metrics, weights
from azstoragetorch.exceptions import WeightsError
from azstoragetorch.weights import _delta, _format
from azstoragetorch.weights._delta import RAW, SPARSE, XOR, Change, apply, difference
from tests.azurite.container import Container
from tests.faults import FaultService, Status
from tests.support import QUICK, Killed, struck

State = dict[str, torch.Tensor]
FAST = replace(QUICK, max_attempts=2)


@pytest.fixture
def url(fault_service: FaultService) -> str:
    fault_service.create_container("c")
    return f"{fault_service.container_url('c')}/policy"


def publisher(url: str, **options: Any) -> weights.Publisher:
    return weights.Publisher(url, credential=False, transfer=FAST, **options)


def subscriber(url: str) -> weights.Subscriber:
    return weights.subscribe(url, credential=False, transfer=FAST)


def state(step: int = 0) -> State:
    """Weights of every kind; a few elements differ from step to step."""
    generator = torch.Generator().manual_seed(1)
    found = {
        "large": torch.randn(400, 100, generator=generator).bfloat16(),
        "float": torch.randn(3000, generator=generator),
        "frozen": torch.randn(500, generator=generator),
        "scalar": torch.tensor(float(step)),
        "mask": torch.tensor([True, False, step % 2 == 0]),
        "empty": torch.empty(0, 3),
        "complex": torch.full((3,), complex(step, 1), dtype=torch.complex128),
        "fp8": torch.full((7,), float(step % 3)).to(torch.float8_e4m3fn),
    }
    for number in range(1, step + 1):
        changed = torch.randint(40_000, (500,), generator=torch.Generator().manual_seed(number))
        found["large"].view(-1)[changed] += 0.5
        found["float"][number * 7 % 3000] = float("nan") if number % 2 else -0.0
    return found


def bits(tensors: State) -> dict[str, bytes]:
    return {name: bytes(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in tensors.items()}


def blank() -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state().items()}


def blobs(service: FaultService, kind: str) -> list[str]:
    return sorted(name for name in service.names("c") if name.rpartition("/")[2].startswith(kind))


# -- differences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.02, 0.4, 1.0])
def test_a_difference_is_exact(dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    old = torch.randint(2, (5000,), generator=generator).to(dtype)
    new = old.clone()
    chosen = torch.rand(5000, generator=generator) < share
    new[chosen] = (1 - new[chosen].to(torch.float32 if dtype == torch.bool else dtype)).to(dtype)
    change = difference(old, new)
    assert (change is None) == (not chosen.any())
    if change is not None:
        assert len(change.data) <= new.nbytes
        apply(old, Change(change.form, change.count, memoryview(bytes(change.data))))
    assert torch.equal(old, new)


def test_long_gaps_and_both_ends() -> None:
    for indices in ([0], [254], [255], [256], [0, 255, 510, 765], [0, 1, 2, 99_999], [99_999]):
        old = torch.zeros(100_000, dtype=torch.int16)
        new = old.clone()
        new[indices] = 7
        change = difference(old, new)
        assert change is not None
        assert change.form == SPARSE
        apply(old, change)
        assert torch.equal(old, new)


def test_the_shortest_form_is_chosen() -> None:
    values = torch.randn(50_000)
    assert difference(values, values + 0) is None
    nudged = values.clone()
    nudged[::50] += 1
    assert difference(values, nudged).form == SPARSE  # type: ignore[union-attr]
    assert difference(values, values * (1 + 1e-6)).form == XOR  # type: ignore[union-attr]
    noise = torch.randint(256, (50_000,), dtype=torch.uint8)
    assert difference(torch.zeros_like(noise), noise).form == RAW  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [
        Change(RAW, 10, memoryview(bytes(39))),
        Change(XOR, 10, memoryview(b"no zlib")),
        Change(XOR, 10, memoryview(_delta.zlib.compress(bytes(1 << 20)))),
        Change(XOR, 10, memoryview(_delta.zlib.compress(bytes(39)))),
        Change(SPARSE, 1, memoryview(bytes(4) + b"\x0b")),  # element 10 of 10
        Change(SPARSE, 1, memoryview(bytes(4) + b"\x00")),  # element -1
        Change(SPARSE, 2, memoryview(bytes(8) + b"\x01\x00")),  # the same twice
        Change(SPARSE, 2, memoryview(bytes(8) + b"\x01")),
        Change(SPARSE, 11, memoryview(bytes(55))),
        Change(SPARSE, 0, memoryview(b"")),
        Change("other", 1, memoryview(bytes(40))),
    ],
    ids=[
        "short",
        "not zlib",
        "long",
        "short inside",
        "past the end",
        "before the start",
        "twice",
        "no gap",
        "too many",
        "none",
        "form",
    ],
)
def test_a_difference_that_does_not_fit_is_refused(change: Change) -> None:
    with pytest.raises(WeightsError):
        apply(torch.zeros(10), change)


# -- publishing and following ------------------------------------------------------------------------------------------


def test_with_azurite(container: Container) -> None:
    url = container.blob_url("policy")
    trainer = weights.Publisher(url, full_every=3, credential=container.key, transfer=FAST)
    actors = [weights.subscribe(url, credential=container.key, transfer=FAST) for _ in range(2)]
    models = [blank(), blank()]
    assert [actor.poll() for actor in actors] == [None, None]
    for step in range(7):
        published = trainer.publish(state(step), step)
        assert published.is_full == (step % 3 == 0)
        for number, (actor, model) in enumerate(zip(actors, models, strict=True)):
            if number == 0 or step in (1, 6):  # one comes late
                assert actor.poll() == step
                assert actor.apply(model) == step
                assert bits(model) == bits(state(step))
    assert all(actor.poll() is None for actor in actors)


def test_a_delta_is_short_and_polling_without_news_is_one_request(fault_service: FaultService, url: str) -> None:
    trainer, actor = publisher(url), subscriber(url)
    full = trainer.publish(state(0), 0)
    assert actor.poll() == 0
    fault_service.reset_log()
    assert actor.poll() is None
    assert [request.operation for request in fault_service.requests()] == ["head"]
    delta = trainer.publish(state(1), 1)
    assert (full.is_full, delta.is_full) == (True, False)
    assert delta.nbytes < full.nbytes / 10
    fault_service.reset_log()
    assert actor.poll() == 1
    assert [request.operation for request in fault_service.requests()] == ["head", "get_blob", "get_blob"]
    assert bits(actor.tensors) == bits(state(1))


def test_the_model_changes_when_weights_are_applied_and_not_before(url: str) -> None:
    trainer, actor, model = publisher(url), subscriber(url), blank()
    trainer.publish(state(3), 3)
    actor.prefetch()
    assert actor.poll() == 3
    assert bits(model) == bits(blank())
    assert actor.apply(model) == 3
    assert bits(model) == bits(state(3))
    before = metrics()
    model["frozen"].fill_(5)
    assert actor.apply(model) == 3
    assert (metrics() - before).requests == 0
    assert model["frozen"][0] == 5  # nothing was new
    with pytest.raises(WeightsError, match="poll first"):
        subscriber(url).apply(model)


@pytest.mark.parametrize("mode", ["inference mode", "another device", "inference tensors"])
def test_in_any_surroundings(url: str, mode: str) -> None:
    """Where only some of the calls are in a mode, and where tensors are made elsewhere by default."""
    trainer, actor, model = publisher(url), subscriber(url), blank()
    surroundings: Any = torch.inference_mode() if mode != "another device" else torch.device("meta")
    states = [state(step) for step in range(5)]
    if mode == "inference tensors":
        with torch.inference_mode():
            model = blank()
        surroundings = nullcontext()
    for step in range(5):
        with surroundings if step % 2 == 0 else nullcontext():
            trainer.publish(states[step], step)
            actor.prefetch() if step == 3 else None
            assert actor.poll() == step
        actor.apply(model)
        assert bits(model) == bits(states[step])


def test_a_model_that_does_not_fit_is_not_changed(url: str) -> None:
    publisher(url).publish(state(3), 3)
    actor, model = subscriber(url), blank()
    actor.poll()
    for wrong in (model["large"].float(), model["large"].t(), None):
        found = {name: tensor for name, tensor in {**model, "large": wrong}.items() if tensor is not None}
        with pytest.raises(WeightsError, match=r"'large' is torch\.bfloat16"):
            actor.apply(found)
        assert bits(model) == bits(blank())
    actor.apply(model)
    assert bits(model) == bits(state(3))


def test_a_change_of_the_model_is_published_in_full(url: str) -> None:
    trainer, actor = publisher(url), subscriber(url)
    trainer.publish(state(0), 0)
    actor.poll()
    larger = {**state(1), "new": torch.ones(3)}
    assert trainer.publish(larger, 1).is_full
    assert actor.poll() == 1
    model = {**blank(), "new": torch.zeros(3)}
    actor.apply(model)
    assert bits(model) == bits(larger)


def test_everything_that_changed_is_published_in_full(url: str) -> None:
    trainer = publisher(url)
    trainer.publish({"x": torch.randint(2**62, (1000,))}, 0)
    assert trainer.publish({"x": torch.randint(2**62, (1000,))}, 1).is_full


def test_the_published_weights_are_those_of_the_call(url: str) -> None:
    """What training changes after it does not change what the next delta is a difference to."""
    trainer, actor = publisher(url), subscriber(url)
    values = {"x": torch.zeros(1000)}
    trainer.publish(values, 0)
    values["x"][3] = 1
    trainer.publish(values, 1)
    values["x"][4] = 1
    trainer.publish(values, 2)
    assert actor.poll() == 2
    assert actor.tensors["x"].nonzero().reshape(-1).tolist() == [3, 4]


def test_arguments_are_checked(url: str) -> None:
    with pytest.raises(ValueError, match="full_every must be at least 1"):
        publisher(url, full_every=0)
    with pytest.raises(TypeError, match="full_every must be an integer"):
        publisher(url, full_every=True)
    with pytest.raises(TypeError, match="step must be an integer"):
        publisher(url).publish(state(), 1.5)  # type: ignore[arg-type]
    for value in (3, torch.ones(3).to_sparse(), torch.ones(3, device="meta")):
        with pytest.raises(TypeError, match="only dense tensors"):
            publisher(url).publish({"x": value}, 1)  # type: ignore[dict-item]


def test_no_secret_is_shown(url: str) -> None:
    for made in (publisher(f"{url}?sig=topsecret"), weights.subscribe(f"{url}?sig=topsecret", credential=False)):
        assert "topsecret" not in repr(made)
        assert "topsecret" not in repr(vars(made))
        assert b"topsecret" not in pickle.dumps(made)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_second_publisher_takes_over_and_the_first_gets_an_error(url: str) -> None:
    first, second, actor = publisher(url), publisher(url), subscriber(url)
    first.publish(state(1), 1)
    second.publish(state(2), 2)
    with pytest.raises(WeightsError, match="another publisher"):
        first.publish(state(3), 3)
    assert actor.poll() == 2
    assert bits(actor.tensors) == bits(state(2))


def test_old_blobs_are_deleted_when_no_reader_can_want_them(fault_service: FaultService, url: str) -> None:
    trainer = publisher(url, full_every=3)
    fault_service.put("c", "policy/notes.txt", b"not ours")
    orphan = f"policy/{_format.new_name('delta', 5)}"
    fault_service.put("c", orphan, b"of a killed publisher")
    for step in range(10):
        trainer.publish(state(step), step)
        assert len(blobs(fault_service, "full")) <= 2
        assert len(blobs(fault_service, "delta")) <= 4 + (step == 0)
    assert fault_service.exists("c", "policy/notes.txt")
    assert not fault_service.exists("c", orphan)


def damaged(service: FaultService, name: str, how: str) -> Callable[[], None]:
    """Damage the blob *name*; return what repairs it."""
    data = service.get("c", name)
    if how == "missing":
        service.delete("c", name)
    elif how == "truncated":
        service.put("c", name, data[:-64])
    elif how == "a flipped bit":
        service.put("c", name, data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    elif how == "another":
        service.put("c", name, bytes(len(data)))
    return lambda: service.put("c", name, data) and None


@pytest.mark.parametrize("how", ["missing", "truncated", "a flipped bit", "another"])
def test_a_lost_delta_falls_back_to_the_next_full(
    fault_service: FaultService, url: str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    trainer, actor, late = publisher(url, full_every=4), subscriber(url), subscriber(url)
    trainer.publish(state(0), 0)
    assert actor.poll() == 0
    trainer.publish(state(1), 1)
    trainer.publish(state(2), 2)
    damaged(fault_service, blobs(fault_service, "delta")[1], how)
    for follower in (actor, late):
        caplog.clear()
        assert follower.poll() == 1
        assert follower.poll() is None
        assert bits(follower.tensors) == bits(state(1))
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert "stay at step 1 until the next full ones" in warning
    trainer.publish(state(3), 3)  # refers to the lost one
    assert actor.poll() is None
    assert trainer.publish(state(4), 4).is_full
    for follower in (actor, late):
        assert follower.poll() == 4
        assert bits(follower.tensors) == bits(state(4))


def test_a_late_delta_is_applied_when_it_is_there(fault_service: FaultService, url: str) -> None:
    trainer, actor = publisher(url), subscriber(url)
    trainer.publish(state(0), 0)
    trainer.publish(state(1), 1)
    repair = damaged(fault_service, blobs(fault_service, "delta")[0], "missing")
    assert actor.poll() == 0
    repair()
    assert actor.poll() == 1
    assert bits(actor.tensors) == bits(state(1))


@pytest.mark.parametrize("how", ["missing", "truncated", "a flipped bit", "another"])
def test_without_any_weights_the_error_says_what_is_missing(fault_service: FaultService, url: str, how: str) -> None:
    publisher(url).publish(state(0), 0)
    (name,) = blobs(fault_service, "full")
    repair = damaged(fault_service, name, how)
    actor = subscriber(url)
    with pytest.raises(WeightsError, match=f"step 0 cannot be loaded.*{name}"):
        actor.poll()
    repair()
    assert actor.poll() == 0


def relinked(service: FaultService, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the pointer."""
    whole = json.loads(service.get("c", "policy/latest.json"))
    change(whole)
    service.put("c", "policy/latest.json", json.dumps(whole).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole["chain"].pop(1),
        lambda whole: whole["chain"].pop(0),
        lambda whole: whole["chain"].reverse(),
        lambda whole: whole["chain"].clear(),
        lambda whole: whole.update(version=2),
        lambda whole: whole.pop("chain"),
        lambda whole: whole["chain"][1].update(name="../../x"),
        lambda whole: whole["chain"][1].update(size="1"),
        lambda whole: whole["chain"][1].update(digest="x"),
        lambda whole: whole["chain"].append(3),
    ],
    ids=["gap", "no full", "reversed", "empty", "version", "no chain", "outside", "size", "digest", "type"],
)
def test_a_gap_in_the_chain_is_an_error_and_the_weights_stay(
    fault_service: FaultService, url: str, change: Callable[[dict[str, Any]], None]
) -> None:
    trainer, actor = publisher(url), subscriber(url)
    for step in range(3):
        trainer.publish(state(step), step)
        actor.poll()
    trainer.publish(state(3), 3)
    relinked(fault_service, change)
    with pytest.raises(WeightsError, match=r"latest\.json: "):
        actor.poll()
    assert bits(actor.tensors) == bits(state(2))


def test_a_delta_to_another_base_is_not_applied(fault_service: FaultService, url: str) -> None:
    """The pointer names a delta of another stream, with its true digest."""
    other = publisher(f"{url}/other")
    for step in (5, 6):
        other.publish(state(step), step)
    trainer, actor = publisher(url), subscriber(url)
    trainer.publish(state(0), 0)
    trainer.publish(state(1), 1)
    actor.poll()
    foreign = json.loads(fault_service.get("c", "policy/other/latest.json"))["chain"][1]
    fault_service.put("c", f"policy/{foreign['name']}", fault_service.get("c", f"policy/other/{foreign['name']}"))
    relinked(fault_service, lambda whole: whole["chain"].append({**foreign, "sequence": 2}))
    assert actor.poll() is None
    assert bits(actor.tensors) == bits(state(1))
    late = subscriber(url)
    assert late.poll() == 1
    assert bits(late.tensors) == bits(state(1))


def test_a_copy_that_was_changed_is_noticed_and_fetched_again(url: str) -> None:
    """The memory of a subscriber is not what was published any more."""
    trainer, actor = publisher(url), subscriber(url)
    trainer.publish(state(0), 0)
    trainer.publish(state(1), 1)
    assert actor.poll() == 1
    assert actor._state is not None
    actor._state.tensors["large"][0, 0] += 1
    trainer.publish(state(2), 2)
    actor.poll()
    actor.poll()
    model = blank()
    assert actor.apply(model) == 2
    assert bits(model) == bits(state(2))


# -- kills and lost responses ------------------------------------------------------------------------------------------


ALONE = replace(FAST, max_connections=1, max_concurrency=1, max_attempts=3)


@pytest.mark.parametrize("kind", ["killed before", "killed after", "lost"])
def test_a_publisher_is_struck_at_every_request(url: str, kind: str) -> None:
    """What was published last stays, or the new step is there; a lost response changes nothing."""
    for is_full in (False, True):
        nth, was_struck = 0, True
        while was_struck:
            place = f"{url}/{kind.replace(' ', '-')}-{is_full}-{nth}"
            trainer = weights.Publisher(place, full_every=1 if is_full else 5, credential=False, transfer=ALONE)
            actor = weights.subscribe(place, credential=False, transfer=ALONE)
            trainer.publish(state(1), 1)
            with struck(nth, kind) as sent:
                try:
                    trainer.publish(state(2), 2)
                    is_done = True
                except Killed:
                    is_done = False
            was_struck = sent[0] > nth
            step = actor.poll()
            assert step == 2 if is_done else step in (1, 2)
            assert bits(actor.tensors) == bits(state(step))
            again = weights.Publisher(place, credential=False, transfer=ALONE)
            again.publish(state(3), 3)
            assert actor.poll() == 3
            assert bits(actor.tensors) == bits(state(3))
            nth += 1
        assert nth > 2


def test_a_hundred_steps_with_kills_are_bit_exact(url: str) -> None:
    chance = random.Random(5)
    trainer = weights.Publisher(url, full_every=7, credential=False, transfer=ALONE)
    actors = [weights.subscribe(url, credential=False, transfer=ALONE) for _ in range(2)]
    models, kills = [blank(), blank()], 0
    for step in range(100):
        kind = chance.choice(["killed before", "killed after", "lost", "none", "none"])
        with struck(chance.randrange(6) if kind != "none" else 1000, kind):
            try:
                trainer.publish(state(step), step)
            except Killed:
                kills += 1
                trainer = weights.Publisher(url, full_every=7, credential=False, transfer=ALONE)
        for number, (actor, model) in enumerate(zip(actors, models, strict=True)):
            if number == 0 or chance.random() < 0.3:
                with struck(chance.randrange(5), chance.choice(["lost", "killed after", "none"])):
                    try:
                        actor.poll()
                    except Killed:
                        actors[number] = weights.subscribe(url, credential=False, transfer=ALONE)
                        continue
                found = actor.apply(model) if actor.step is not None else None
                assert found is None or bits(model) == bits(state(found)), found
    assert kills > 10
    trainer.publish(state(100), 100)
    for actor in actors:
        assert actor.poll() == 100
        assert bits(actor.tensors) == bits(state(100))


def test_a_service_that_refuses_leaves_everything_as_it_is(fault_service: FaultService, url: str) -> None:
    trainer, actor = publisher(url), subscriber(url)
    trainer.publish(state(1), 1)
    rule = fault_service.script("put_blob", [Status(403)])
    with pytest.raises(Exception, match="403"):
        trainer.publish(state(2), 2)
    assert rule.is_exhausted
    assert actor.poll() == 1
    assert trainer.publish(state(3), 3).is_full
    assert actor.poll() == 3
    assert bits(actor.tensors) == bits(state(3))
