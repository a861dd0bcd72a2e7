"""Which checkpoints are the latest, by the names of their folders."""

from __future__ import annotations

import pytest

from azstoragetorch.checkpoint._order import all_but_last, in_order


@pytest.mark.parametrize(
    ("names", "count", "doomed"),
    [
        (["step-100", "step-200", "last"], 2, []),
        (["step-100", "step-200", "final"], 1, ["step-100"]),
        (["best", "step-100", "step-200", "step-300"], 2, ["step-100"]),
        (["val_loss=0.40-step=100", "val_loss=0.31-step=200", "val_loss=0.25-step=300"], 1,
         ["val_loss=0.40-step=100", "val_loss=0.31-step=200"]),
        (["epoch=9-step=100", "epoch=8-step=200"], 1, ["epoch=9-step=100"]),
        (["best-step=300", "step=100", "step=200"], 1, ["step=100"]),
        (["iter_0000900", "iter_0001000"], 1, ["iter_0000900"]),
        (["global_step90", "global_step100"], 1, ["global_step90"]),
        (["1", "2", "10", "20"], 2, ["1", "2"]),
        (["llama3-8b-900", "llama3-8b-1000"], 1, ["llama3-8b-900"]),
        (["2026-11-26", "2026-11-27"], 1, ["2026-11-26"]),
        (["step-100", "step=100", "step-200"], 2, []),
        (["step-1", "step-2", "step-2", "step-3", "step-3"], 1, ["step-1", "step-2"]),
        ([], 1, []),
    ],
)  # fmt: skip
def test_the_last_are_those_of_the_highest_steps(names: list[str], count: int, doomed: list[str]) -> None:
    """Each name counts once, and names without a number are neither counted nor deleted."""
    assert list(all_but_last(names, count).doomed) == doomed


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["0.40-100", "0.31-200"], "several numbers"),
        (["step-1-step-2", "step-3"], "several numbers of steps"),
        (["step-100", "epoch-3"], "count different things"),
        (["step-100", "7"], "count different things"),
    ],
)
def test_names_that_do_not_say_which_are_the_last_are_refused(names: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        all_but_last(names, 1)


def test_what_is_left_alone_comes_with_a_reason() -> None:
    skipped = dict(all_but_last(["step-1", "step-2", "last", "readme"], 1).skipped)
    assert set(skipped) == {"last", "readme"}
    assert "no number" in skipped["readme"]


def test_what_has_no_number_is_older_than_all_steps() -> None:
    assert in_order(["step-1000", "final", "step-900", "final"]) == ["final", "step-900", "step-1000"]
