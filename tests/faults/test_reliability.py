"""The tables of the page on reliability show what the cells of the matrix found."""

from __future__ import annotations

from .matrix import RIGHT
from .reliability import Found, side_by_side, table


def test_a_row_shows_each_outcome_and_names_the_errors() -> None:
    found: Found = {
        ("503", "read all", False): [(RIGHT, 1.0)],
        ("503", "torch.save", False): [("OSError", 1.0), ("OSError (but written)", 87.2)],
        ("503", "epoch", False): [(RIGHT, 6.0), ("SAMPLES TWICE", 1.0)],
        ("503", "pipes", False): [("-", 1.0), ("KeyError", 1.0)],
        ("429", "epoch", True): [("OSError", 1.0)],
    }
    operations = ["read all", "torch.load", "torch.save", "epoch", "pipes"]
    assert list(table(found, operations, False)) == [
        "| fault | read all | torch.load | torch.save | epoch | pipes | error |",
        "|---|---|---|---|---|---|---|",
        "| 503 | ✓ |  | E, E (but written) 87\xa0s | ✗, ✓ 6\xa0s | E | OSError, KeyError |",
    ]


def test_two_implementations_are_compared_fault_by_fault() -> None:
    ours: Found = {("503", "epoch", False): [(RIGHT, 1.0)], ("503", "epoch", True): [("OSError", 1.0)]}
    theirs: Found = {("503", "epoch", False): [("SAMPLES TWICE", 1.0)], ("503", "epoch", True): [("no end", 240.0)]}
    assert list(side_by_side(ours, theirs))[2:] == ["| 503 | ✓ | SAMPLES TWICE | OSError | no end 240\xa0s |"]
