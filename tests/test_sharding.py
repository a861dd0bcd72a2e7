"""The planners: every sample exactly once, with any number of shards and interruptions."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azstoragetorch._samples.resume import ResumeState, merge, positions_after
from azstoragetorch._samples.sharding import Even, Order, Permutation, Remaining, even_length, shard_range

LENGTHS = st.integers(0, 300)
SHARDS = st.integers(1, 13)


@given(LENGTHS, SHARDS)
def test_shards_divide_a_sequence_exactly_once(length: int, shards: int) -> None:
    dealt = [position for shard in range(shards) for position in shard_range(length, shards, shard)]
    assert sorted(dealt) == list(range(length))


@given(LENGTHS, SHARDS, st.sampled_from(["drop", "pad"]))
def test_even_shards_have_one_length_and_leave_out_or_repeat_as_little_as_possible(
    length: int, shards: int, even: Even
) -> None:
    stripes = [shard_range(length, shards, shard, even) for shard in range(shards)]
    assert len({len(stripe) for stripe in stripes}) == 1
    dealt = Counter(position % length for stripe in stripes for position in stripe) if length else Counter()
    if even == "drop":
        assert max(dealt.values(), default=1) == 1
        assert length - dealt.total() < shards
    else:
        assert set(dealt) == set(range(length))
        assert dealt.total() - length < shards


def test_a_shard_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="shard must be between 0 and 2"):
        shard_range(10, 3, 3)


@pytest.mark.parametrize("consumed", [[], [3, -1]])
def test_what_are_not_positions_of_shards_is_refused(consumed: list[int]) -> None:
    with pytest.raises(ValueError, match="not a list of positions of shards"):
        Remaining(10, consumed)


@given(LENGTHS, st.integers(-400, 400), st.integers(-400, 400), st.sampled_from([-3, -1, 1, 2]))
def test_a_slice_of_an_order_is_that_of_its_list(length: int, start: int, stop: int, step: int) -> None:
    for whole in (Order(length, seed=1), Remaining(length, [length // 5, 0])):
        assert list(whole[start:stop:step]) == [whole[index] for index in range(len(whole))][start:stop:step]


@given(st.integers(0, 3000), st.integers(0, 2**70), st.integers(0, 1000))
def test_a_permutation_has_every_element_once(length: int, seed: int, epoch: int) -> None:
    assert sorted(Permutation(length, seed, epoch)) == list(range(length))


def test_a_permutation_is_the_same_everywhere() -> None:
    """Fixed values: a release that changes them cannot resume what an older one saved."""
    assert list(Permutation(10, seed=0)) == PINNED_SMALL
    assert list(Permutation(10**6, seed=7, epoch=3)[:6]) == PINNED_LARGE


PINNED_SMALL = [4, 2, 8, 0, 3, 7, 6, 5, 9, 1]
PINNED_LARGE = [501246, 518697, 561205, 479719, 579722, 705768]


@pytest.mark.parametrize("varied", ["seed", "epoch"])
def test_all_orders_of_a_short_sequence_are_about_equally_likely(varied: str) -> None:
    rounds = 24_000
    seen = Counter(
        tuple(Permutation(4, number, 0) if varied == "seed" else Permutation(4, 0, number)) for number in range(rounds)
    )
    assert len(seen) == 24
    assert all(abs(count - 1000) < 200 for count in seen.values())  # six standard deviations


def test_a_long_permutation_spreads_neighbours() -> None:
    length = 100_000
    order = Permutation(length, seed=1)[:2000]
    distances = [abs(b - a) for a, b in itertools.pairwise(order)]
    assert abs(sum(distances) / len(distances) / length - 1 / 3) < 0.03  # of two independent places
    fixed = sum(place == value for place, value in enumerate(order))
    assert fixed <= 5
    assert not set(Permutation(length, seed=2)[:50]) & set(order[:50])


def test_a_permutation_of_millions_takes_no_memory_worth_mentioning() -> None:
    order = Permutation(10**12, seed=0)
    assert len({order[i] for i in range(1000)}) == 1000
    assert 0 <= order[10**12 - 1] < 10**12
    with pytest.raises(IndexError):
        order[10**12]


@given(LENGTHS, st.lists(st.integers(0, 40), min_size=1, max_size=9))
def test_what_remains_is_what_was_not_consumed(length: int, consumed: list[int]) -> None:
    shards = len(consumed)
    gone = {p for shard, count in enumerate(consumed) for p in shard_range(length, shards, shard)[:count]}
    remaining = Remaining(length, consumed)
    assert list(remaining) == [p for p in range(length) if p not in gone]
    assert [remaining[i] for i in range(len(remaining))] == list(remaining)


@settings(max_examples=200)
@given(
    length=LENGTHS,
    seed=st.none() | st.integers(0, 99),
    stages=st.lists(st.tuples(SHARDS, st.randoms(use_true_random=False)), max_size=4),
    last=SHARDS,
)
def test_an_epoch_resumed_with_other_shards_again_and_again_is_read_exactly_once(
    length: int, seed: int | None, stages: list[tuple[int, object]], last: int
) -> None:
    """The state is stored as JSON each time, with shards at different positions."""
    state = ResumeState("f", seed, 0, 1, (0,))
    read: list[int] = []
    for shards, random in [*stages, (last, None)]:
        states = []
        for shard in range(shards):
            consumed, position = state.for_shard(shard, shards)
            layer = ResumeState("f", seed, 0, shards, (), consumed)
            order = layer.order(length)
            stripe = shard_range(len(order), shards, shard)
            stop = len(stripe) if random is None else random.randint(min(position, len(stripe)), len(stripe))  # type: ignore[attr-defined]
            read += [order[at] for at in stripe[position:stop]]
            states.append(json.loads(json.dumps(layer.of_shard(shard, stop))))
        state = merge(states)
        assert ResumeState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert sorted(read) == list(range(length))
    if not stages and last == 1:
        assert read == list(Order(length, seed))


def test_the_same_number_of_shards_continues_where_it_was() -> None:
    state = ResumeState("f", None, 2, 3, (5, 4, 6))
    assert state.for_shard(1, 3) == ((), 4)
    assert state.for_shard(0, 2) == (((5, 4, 6),), 0)


def test_states_that_do_not_belong_together_are_not_merged() -> None:
    one = ResumeState("f", 1, 2, 2, (5, None))
    assert merge([one.to_dict(), ResumeState("f", 1, 2, 2, (None, 4)).to_dict()]).positions == (5, 4)
    for other, name in [
        (ResumeState("g", 1, 2, 2, (None, 4)), "fingerprint"),
        (ResumeState("f", 2, 2, 2, (None, 4)), "seed"),
        (ResumeState("f", 1, 3, 2, (None, 4)), "epoch"),
        (ResumeState("f", 1, 2, 3, (None, 4, 0)), "shards"),
        (ResumeState("f", 1, 2, 2, (4, None)), "twice"),
    ]:
        with pytest.raises(ValueError, match=name):
            merge({"rank0": one.to_dict(), "rank1": [other.to_dict()]})
    with pytest.raises(ValueError, match="no state"):
        merge([{"a": 1}])
    with pytest.raises(ValueError, match="snapshot_every_n_steps=1"):
        merge({"_snapshot": one.to_dict(), "_steps_since_snapshot": 3})


def test_an_incomplete_state_fits_only_the_shards_that_it_knows() -> None:
    state = ResumeState("f", None, 0, 3, (5, None, None))
    assert state.for_shard(0, 3) == ((), 5)
    with pytest.raises(ValueError, match=r"shard \[0\] of 3, but this process reads shard 1"):
        state.for_shard(1, 3)
    with pytest.raises(ValueError, match=r"those of \[1, 2\] are missing"):
        state.for_shard(0, 2)


GOOD = ResumeState("f", None, 0, 2, (5, None)).to_dict()


@pytest.mark.parametrize(
    "broken",
    [
        {},
        [],
        None,
        {**GOOD, "version": 2},
        {**GOOD, "position": -1},
        {**GOOD, "position": "x"},
        {**GOOD, "shards": 0, "positions": []},
        {**GOOD, "positions": [1]},
        {**GOOD, "consumed": [[]]},
        {key: value for key, value in GOOD.items() if key != "epoch"},
    ],
)
def test_what_is_not_a_state_is_refused(broken: object) -> None:
    with pytest.raises(ValueError, match="state:"):
        ResumeState.from_dict(broken)


@settings(max_examples=200)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), min_size=1, max_size=5),
    st.booleans(),
    st.data(),
)
def test_positions_after_some_batches_are_those_of_a_loader_that_takes_turns(
    batch_size: int, shards: list[tuple[int, int]], drop_last: bool, data: st.DataObject
) -> None:
    lengths, starts = [length for length, _ in shards], [min(start, length) for length, start in shards]
    queue = []
    for turn in range(max(lengths) + 1):
        for worker, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            left = length - start - turn * batch_size
            if left >= batch_size or (left > 0 and not drop_last):
                queue.append((worker, min(left, batch_size)))
    batches = data.draw(st.integers(0, len(queue)))
    expected = list(starts)
    for worker, taken in queue[:batches]:
        expected[worker] += taken
    assert positions_after(batches, batch_size, lengths, starts, drop_last=drop_last) == expected
    with pytest.raises(ValueError, match="no more than"):
        positions_after(len(queue) + 1, batch_size, lengths, starts, drop_last=drop_last)


def test_even_length_of_nothing_is_nothing() -> None:
    assert [even_length(0, 3, even) for even in ("none", "drop", "pad")] == [0, 0, 0]
