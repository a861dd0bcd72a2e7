"""The benchmarks run and say what they should; how fast is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from azstoragetorch import TransferConfig
from recipes.benchmarks.__main__ import TINY, Options, cases, mint, run
from recipes.benchmarks.libraries import LIBRARIES
from recipes.benchmarks.report import Results, write_report
from recipes.benchmarks.sweep import CONCURRENCIES, SIZES, check, compare, settings
from tests.azurite.container import Container
from tests.support import ROOT

ALL = {"read", "write", "save", "load", "samples", "names", "latency", "concurrency", "stream", "ranges"} | {
    "checkpoint-save",
    "checkpoint-load",
    "tensors",
    "tensors-load",
}
UNSUPPORTED = {
    "ours": {"ranges"},
    "sdk": {"checkpoint-save", "checkpoint-load", "stream", "ranges"},
    "filesystem": {"checkpoint-save", "checkpoint-load", "concurrency", "tensors", "tensors-load"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, azurite: Any) -> Path:
    """Every case at a tiny size on Azurite, by this package and by the SDK, which need no separate environment."""
    folder = tmp_path_factory.mktemp("benchmarks") / "performance"
    folder.mkdir()
    sas = mint(azurite.account_name, azurite.account_key)
    options = Options({"azurite": azurite.account_url}, "benchmarks", TINY, None, sas, server="azurite")
    run(options, dict.fromkeys(UNSUPPORTED, sys.executable), folder / "results.jsonl")
    assert sas not in (folder / "results.jsonl").read_text()
    return folder / "results.jsonl"


@pytest.mark.exhaustive
def test_every_case_has_its_figures(results: Path) -> None:
    setup, *runs = [json.loads(line) for line in results.read_text().splitlines()]
    assert setup["record"] == "setup"
    assert set(setup["versions"]) == set(UNSUPPORTED)
    by_case = {(record["library"], record["case"]): record for record in runs}
    assert {case for library, case in by_case if library == "ours"} == ALL
    for record in runs:
        assert "error" not in record
        if record["case"] in UNSUPPORTED[record["library"]]:
            assert record["unsupported"]
        else:
            assert record["rate"] > 0
            assert record["seconds"] > 0
            assert record["cpu_seconds"] >= 0
            assert record["peak_mib"] >= 0
            assert record["unit"] in ("MiB/s", "samples/s", "names/s", "reads/s", "ranges/s")
    assert {record["warm_up"] for record in runs if record["case"] == "write"} == {True, False}


def test_nothing_is_left_behind(results: Path, container: Container) -> None:
    from tests.azurite.container import open_service

    with open_service(container.service) as service:
        names = list(service.get_container_client("benchmarks").list_blob_names())
    assert names == []


def test_the_page_is_made_of_the_results(results: Path, tmp_path: Path) -> None:
    """The same lines give the same page and plots."""
    pages = []
    for name in ("one", "two"):
        folder = tmp_path / name / "performance"
        folder.mkdir(parents=True)
        (folder / "results.jsonl").write_bytes(results.read_bytes())
        write_report(folder / "results.jsonl", folder.parent / "performance.md")
        plots = sorted(folder.glob("*.svg"))
        assert [plot.name for plot in plots] == ["cost.svg", "scaling.svg", "throughput.svg"]
        assert all(1_000 < plot.stat().st_size < 300_000 for plot in plots)
        pages.append([path.read_bytes() for path in (folder.parent / "performance.md", *plots)])
    assert pages[0] == pages[1]
    text = pages[0][0].decode()
    assert "## Limitations" in text
    assert "Azurite limited these results" in text
    assert "make bench" in text
    for plot in ("throughput", "cost", "scaling"):
        assert f"performance/{plot}.svg" in text
    for word in ("read 1 MiB", "torch.load", "dataset of 8 blobs", "list 8 blobs", "distributed checkpoint loaded"):
        assert word in text


def test_medians_leave_out_the_warm_up_and_ratios_are_of_one_case() -> None:
    def run_of(library: str, rate: float, *, warm_up: bool = False) -> str:
        return json.dumps(
            {
                "record": "run",
                "library": library,
                "case": "read",
                "base": "b",
                "size": 1,
                "warm_up": warm_up,
                "rate": rate,
            }
        )

    found = Results(
        [
            json.dumps({"record": "setup"}),
            *(run_of("ours", rate) for rate in (10.0, 30.0, 20.0)),
            run_of("ours", 1000.0, warm_up=True),
            run_of("sdk", 5.0, warm_up=True),
        ]
    )
    assert found.median("rate", "ours", case="read", base="b") == 20.0
    assert found.median("rate", "sdk", case="read", base="b") == 5.0  # there is no other
    assert found.median("rate", "adlfs", case="read", base="b") is None


def test_all_bases_are_read_and_a_listing_that_is_there_is_used() -> None:
    options = Options({"http": "http://h/a", "slow": "http://s/a", "wan": "http://w/a"}, "c", TINY, ("big", 7))
    planned = list(cases(options))
    assert {case["base"] for case in planned if case["case"] == "read"} == {"http", "slow", "wan"}
    assert [case["container"] for case in planned if case["case"] == "names"] == ["big"]
    assert {case["base"] for case in planned if case["case"] == "load"} == {"http", "slow"}
    assert {case["case"] for case in planned} == ALL


def test_every_library_can_be_asked_for_its_name() -> None:
    for library in LIBRARIES.values():
        assert library.title  # type: ignore[attr-defined]
        assert isinstance(library.requirements, tuple)  # type: ignore[attr-defined]


def test_a_library_that_fails_is_reported_and_stops_no_other(tmp_path: Path, azurite: Any) -> None:
    sas = mint(azurite.account_name, azurite.account_key)
    only = frozenset({"write"})
    options = Options({"azurite": azurite.account_url}, "benchmarks", TINY, None, sas, only=only, server="azurite")
    run(options, {"ours": sys.executable, "obstore": sys.executable}, tmp_path / "results.jsonl")
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][1:]
    assert all("obstore" in record["error"] for record in runs if record["library"] == "obstore")
    assert any("rate" in record for record in runs if record["library"] == "ours")
    write_report(tmp_path / "results.jsonl", tmp_path / "page.md")
    assert "These cases failed and have no figure" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_what_was_left_out_is_added_later(tmp_path: Path, azurite: Any) -> None:
    """The page then shows both commands, and the figures of all cases."""
    sas = mint(azurite.account_name, azurite.account_key)
    only = frozenset({"write", "latency"})
    options = Options({"azurite": azurite.account_url}, "benchmarks", TINY, None, sas, only=only, server="azurite")
    results = tmp_path / "results.jsonl"
    run(options, {"ours": sys.executable}, results, budget=0)
    assert {case["case"] for case in Results(results.read_text().splitlines()).left_out} == only
    again = replace(options, only=frozenset(), command="make bench BENCH=--more")
    run(again, {"ours": sys.executable}, results, is_more=True)
    found = Results(results.read_text().splitlines())
    assert (found.left_out, {case["case"] for case in found.runs}) == ([], only)
    write_report(results, tmp_path / "page.md")
    assert "make bench\nmake bench BENCH=--more\n" in (tmp_path / "page.md").read_text()


def test_mistakes_are_explained() -> None:
    for arguments, word in ((["--libraries", "nothing"], "unknown"), (["--libraries", "sdk"], "'ours'")):
        ended = subprocess.run(
            [sys.executable, "-m", "recipes.benchmarks", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert ended.returncode == 2
        assert word in ended.stderr


MiB = 1 << 20


def test_a_suggestion_is_held_against_the_best_of_a_sweep() -> None:
    """On a made-up network of 1,000 MiB/s, and 60 a connection."""

    def rate(config: TransferConfig) -> float:
        return min(1000.0, 60.0 * config.max_concurrency) * MiB

    swept = settings("part_size", CONCURRENCIES, SIZES)
    assert len(swept) == len(set(swept)) == len(CONCURRENCIES) * len(SIZES)
    found = compare(rate, TransferConfig(max_concurrency=8), swept, rounds=1)
    assert (found["suggested"], found["best"], found["slowest"], found["share"]) == (480, 1000, 60, 0.48)
    assert found["best_setting"]["max_concurrency"] >= 32
    assert compare(rate, TransferConfig(max_concurrency=32), swept, rounds=1)["share"] == 1.0


def test_a_sweep_asks_doctor_and_leaves_nothing_behind(container: Container) -> None:
    found = check(
        container.url,
        container.sas(),
        size=1 * MiB,
        rounds=1,
        concurrencies=(1, 2),
        sizes=(8 * MiB,),
        doctor=("--size", "8", "--rounds", "1", "--seconds", "0.01"),
    )
    assert found["settings"] == 2
    for direction in ("download", "upload"):
        assert found[direction]["share"] > 0
        assert found[direction]["best_setting"]["max_concurrency"] in (1, 2)
    assert container.names() == []
