"""From lines of JSON to a page with tables and plots, the same page for the same lines."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipes.benchmarks.libraries import LIBRARIES

MiB = 1 << 20
COLORS = {"ours": "#0067b8", "published": "#d83b01", "sdk": "#7a7574", "adlfs": "#8764b8", "obstore": "#498205"}
COLORS |= {"filesystem": "#00a2ad", "runai": "#c30052"}
DARK = {"ours": "#4da3ff", "published": "#ff8a5c", "sdk": "#b0aaa8", "adlfs": "#b79ae6", "obstore": "#8bc34a"}
DARK |= {"filesystem": "#4cd3dc", "runai": "#ff6f9f"}
INK = "#242424"  # text, axes and grid
DARK_INK = "#cfd0d0"
PALETTES = (COLORS | {"ink": INK}, DARK | {"ink": DARK_INK})
WIDTH = 4.4  # inches of a plot: its text is legible on a phone
TITLES = {name: library.title for name, library in LIBRARIES.items()}  # type: ignore[attr-defined]
WHAT = {
    "read": "read {size}",
    "write": "write {size}",
    "save": "torch.save, {size} in 16 tensors",
    "load": "torch.load, {size} in 318 tensors",
    "tensors": "safetensors, {size} in 318 tensors",
    "tensors-load": "safetensors into a state dict, {size}",
    "samples": "dataset of {count} blobs of 110 KB",
    "names": "list {count} blobs",
    "stream": "read {size}, 1 MiB at a time",
    "ranges": "read {count} ranges of 16 KiB",
    "latency": "read 4 KiB, sequentially",
    "checkpoint-save": "distributed checkpoint saved, {size}",
    "checkpoint-load": "distributed checkpoint loaded, {size}",
}
# Cases that move many bytes, by table: each table has columns for the libraries that have the function.
MOVED = (
    ("read", "write", "save", "load"),
    ("tensors", "tensors-load"),
    ("checkpoint-save", "checkpoint-load"),
)
COUNTED = {"samples/s, names/s": ("samples", "names"), "ranges/s": ("ranges",)}

INTRODUCTION = """\
The same tasks with azstoragetorch and with the libraries that you might use instead. Measured on {date} on {cpus}
CPUs ({cpu}, {system}, Python {python}) against {where}. Versions: {versions_of}."""

HOW = """\
Each figure is the median of several runs. The libraries took turns, run by run, each in a separate process. The first
run of each library is a warm-up, and is not counted if it was short. If a library does not have a function, the row has
a dash, or the table has no column for the library. *azstoragetorch (fsspec)* is the file system of this package.
*Ratio* is azstoragetorch divided by the published azstoragetorch 0.2, or by the best of the others if 0.2 does not
have the function.

> Compare figures within a row only: the absolute values are those of one machine and one server.

## Throughput
"""

MEMORY = """\
Peak memory over all runs, in addition to the memory of the process before, in MiB. Reading includes the data that is
read. Memory that an allocator kept from earlier cases is not visible, so these are the figures of the server that was
measured first:"""

AGAIN = """\
Every run is a line of JSON in [results.jsonl]({results}). `make bench` creates the virtual environments, runs all
cases, and writes this page. Without options it runs on Azurite, which then limits the results. To run it on your
account:

```sh
export AZURE_STORAGE_SAS_TOKEN='...'
url=https://<account>.blob.core.windows.net
make bench BENCH="--base region=$url --container <container>"
```

The run writes about 2 GiB into a folder of the container and deletes it at the end. `azstoragetorch bench` measures
only this package, and `azstoragetorch doctor` suggests settings.
"""

LIMITS = """\
## Limitations

- **No real account.** A server on loopback does not throttle and has neither the tail latency nor the network of the
  service. It also shares the CPUs with the client.
- **No GPUs or large machines.** The figures include no copy to a device, and the machine has few CPUs.
- **No tuning.** All libraries run with their defaults, except for 16 concurrent requests where a library requires a
  number, and 32 concurrent samples where the user writes the loop. Each may be faster when tuned.
- **Unequal work.** Reading with obstore leaves the data in 16 pieces. The SDK, adlfs, and obstore have no dataset:
  theirs is a loop over a thread pool or a batch call, without a DataLoader. Checkpoints with adlfs use torch's
  FsspecWriter and FsspecReader. The SDK downloads a safetensors file, which the library safetensors or torch's
  HuggingFaceStorageReader then maps into memory.
- **No safety.** The figures do not show that a failed write commits nothing, or that a read never mixes versions.
- **One process.** No case uses several ranks or workers.
"""


class Results:
    """The runs, by case."""

    def __init__(self, lines: Iterable[str]) -> None:
        records = [json.loads(line) for line in lines if line.strip()]
        self.setup = next(record for record in records if record["record"] == "setup")
        self.left_out = [record for record in records if record["record"] == "left out"]
        self.runs = [record for record in records if record["record"] == "run"]
        self.libraries = [name for name in LIBRARIES if name in {run["library"] for run in self.runs}]
        self.bases = list(dict.fromkeys(run["base"] for run in self.runs))

    def of(self, library: str, **wanted: Any) -> list[dict[str, Any]]:
        """Runs that count: not the first one where others followed."""
        found = [
            run
            for run in self.runs
            if run["library"] == library and "rate" in run and all(run.get(k) == v for k, v in wanted.items())
        ]
        return [run for run in found if not run["warm_up"]] or found

    def median(self, figure: str | Callable[[dict[str, Any]], float], library: str, **wanted: Any) -> float | None:
        """The median of a *figure* over the runs; None without runs."""
        if figure == "peak_mib":
            return self.peak(library, **wanted)
        values = [figure(run) if callable(figure) else run[figure] for run in self.of(library, **wanted)]
        return statistics.median(values) if values else None

    def peak(self, library: str, **wanted: Any) -> float | None:
        """The most memory of all runs and the warm-up: what an allocator keeps for the next run does not show again."""
        found = [
            run["peak_mib"]
            for run in self.runs
            if run["library"] == library and "rate" in run and all(run.get(k) == v for k, v in wanted.items())
        ]
        return max(found, default=None)

    def cases(self, *names: str) -> list[dict[str, Any]]:
        """What sets the cases of these *names* apart, in order."""
        keys = ("case", "base", "size", "count")
        found = [{key: run[key] for key in keys if key in run} for run in self.runs if run["case"] in names]
        unique = [dict(pairs) for pairs in dict.fromkeys(tuple(case.items()) for case in found)]
        return sorted(unique, key=lambda case: names.index(case["case"]))

    def failure(self, library: str, **wanted: Any) -> str | None:
        """The error of the library, if it failed."""
        for run in self.runs:
            if run["library"] == library and "error" in run and all(run.get(k) == v for k, v in wanted.items()):
                return str(run["error"])
        return None


PAST_ONE_MACHINE = """\
Listing {names:,} names with {workers} workers, **simulated**: the division of the listing is that of
`azstoragetorch.manifest.list_part`, and the service and the clock are a program. A core parses {rate:,.0f} names a
second, as in the fastest run above, while the next page is fetched. The times are those until the last worker has
finished, for two latencies of a request. *Imbalance* is this time divided by the average time that a worker works;
*requests* is the number of requests divided by the fewest that can return so many names:"""

NOT_DIVIDED = """\
Folders divide a listing. The blobs of one folder are listed by one worker, which the last row shows;
[Blob Inventory](guide/scale.md#blob-inventory) lists them without requests. `python -m recipes.benchmarks.scale` runs
the simulation."""


def write_report(results: Path, page: Path) -> None:
    """Write *page*, and the plots next to *results*, from the lines in *results*."""
    found = Results(results.read_text(encoding="utf-8").splitlines())
    plots = draw(found, results.parent)
    folder = results.parent.name
    simulated = results.with_name("scale.json")
    scale = json.loads(simulated.read_text(encoding="utf-8")) if simulated.exists() else None
    names = [f"{folder}/{plot.name}" for plot in plots]
    page.write_text(describe(found, names, f"{folder}/{results.name}", scale), "utf-8")


# -- the page ---------------------------------------------------------------------------------------------------------


def describe(found: Results, plots: list[str], results: str, scale: dict[str, Any] | None = None) -> str:
    setup = found.setup
    server = setup.get("server", "")
    is_azurite = server == "azurite"
    where = "Azurite, the emulator" if is_azurite else server or ", ".join(found.bases)
    versions = ", ".join(
        f"{TITLES[name].removesuffix(' 0.2')} {setup['versions'][name].split(',')[0]}"
        for name in found.libraries
        if name != "filesystem"  # which is part of this package
    )
    python = setup["versions"]["ours"].rpartition("Python ")[2]
    parts = [
        "# Performance",
        "",
        "<!-- Made by `make bench`; edit recipes/benchmarks/report.py instead. -->",
        "",
        INTRODUCTION.format(**setup, python=python, where=where, versions_of=versions),
        "",
    ]
    if is_azurite:
        parts += [
            "**Azurite limited these results**, not the libraries: it serves tens of MiB/s. Run this on an account.",
            "",
        ]
    parts += [HOW]
    for names in (*MOVED, ("stream",)):
        parts += table(found, found.cases(*names), "rate", "MiB/s", is_more_better=True)
    if plots:
        parts += figure(plots[0], "Throughput by case and library", found, "read", "write", "save", "load")
    parts += ["## Many blobs, listing, latency", ""]
    for unit, names in COUNTED.items():
        parts += table(found, found.cases(*names), "rate", unit, is_more_better=True)
    parts += table(found, found.cases("latency"), lambda run: 1000 / run["rate"], "ms a read", is_more_better=False)
    parts += costs(found)
    if len(plots) > 1:
        parts += figure(plots[1], "CPU and memory by case and library", found, "read", "save", "load")
    parts += ["## Scaling", ""]
    if len(plots) > 2:
        caption = "Rate by requests at once, by size of the blob and by number of blobs"
        parts += figure(plots[2], caption, found, "concurrency", "read", "samples")
    parts += [*scaling(found), ""]
    if scale is not None:
        parts += ["## Past one machine", "", PAST_ONE_MACHINE.format(**scale), "", *simulation(scale), ""]
        parts += [NOT_DIVIDED, ""]
    parts += ["## How it was run", "", "```sh", wrapped(setup["command"]), "```", ""]
    parts += [AGAIN.format(results=results), LIMITS]
    failures = sorted(
        {
            f"{TITLES[run['library']]}, {name_of(run)} ({run['base']}): `{run['error']}`"
            for run in found.runs
            if "error" in run
        }
    )
    if failures:
        parts += ["These cases failed and have no figure:", "", *(f"- {text}" for text in failures), ""]
    if found.left_out:
        skipped = sorted({f"{name_of(case)} ({case['base']})" for case in found.left_out})
        parts += ["These cases were skipped for lack of time:", "", *(f"- {name}" for name in skipped), ""]
    return "\n".join(parts)


def cpu_per_gib(run: dict[str, Any]) -> float:
    return float(run["cpu_seconds"] / run["amount"] * 1024)


def costs(found: Results) -> list[str]:
    """CPU time and memory of the cases that move enough bytes to tell."""
    is_tiny = found.setup.get("tiny")
    large = [[case for case in found.cases(*names) if case["size"] >= 32 * MiB or is_tiny] for names in MOVED]
    if not any(large):
        large = [found.cases(*names) for names in MOVED]
    parts = ["## What it costs", "", "CPU seconds of the client per GiB transferred:", ""]
    for cases in large:
        parts += table(found, cases, cpu_per_gib, "s/GiB", is_more_better=False)
    parts += [MEMORY, ""]
    for cases in large:
        first = [case for case in cases if case["base"] == found.bases[0]]
        parts += table(found, first, "peak_mib", "MiB", is_more_better=False)
    return parts


def wrapped(command: str) -> str:
    """*command* with a line for each option, as a shell accepts it."""
    return command.replace(" --", " \\\n  --")


def figure(path: str, caption: str, found: Results, *cases: str) -> list[str]:
    if not found.cases(*cases):
        return []
    return [f"![{caption}]({path})", ""]


def name_of(case: dict[str, Any]) -> str:
    text = WHAT.get(case["case"], case["case"])
    return text.format(size=size_of(case.get("size", 0)), count=f"{case.get('count', 0):,}")


def size_of(count: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", MiB), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:g} {unit}"
    return f"{count} B"


def table(
    found: Results,
    cases: list[dict[str, Any]],
    what: str | Callable[[dict[str, Any]], float],
    unit: str,
    *,
    is_more_better: bool,
) -> list[str]:
    """Rows of cases, columns of the libraries that have figures, and the ratio."""
    rows = [(case, {name: found.median(what, name, **case) for name in found.libraries}) for case in cases]
    rows = [(case, values) for case, values in rows if any(value is not None for value in values.values())]
    failed = {name: [found.failure(name, **case) is not None for case, _ in rows] for name in found.libraries}
    names = [name for name in found.libraries if any(failed[name]) or any(row[name] is not None for _, row in rows)]
    if not rows:
        return []
    lines = [
        f"| {unit} | server | " + " | ".join(TITLES[name] for name in names) + " | ratio |",
        "|---|---|" + "--:|" * (len(names) + 1),
    ]
    for place, (case, values) in enumerate(rows):
        cells = []
        for name in names:
            text = "failed" if values[name] is None and failed[name][place] else number(values[name])
            cells.append(f"**{text}**" if name == "ours" and text != "-" else text)
        lines.append(
            f"| {name_of(case)} | {case['base']} | " + " | ".join(cells) + f" | {ratio(values, is_more_better)} |"
        )
    return [*lines, ""]


def ratio(values: dict[str, float | None], is_more_better: bool) -> str:
    ours = values.get("ours") or values.get("filesystem")
    others = [value for name, value in values.items() if name not in ("ours", "filesystem") and value is not None]
    other = values.get("published")
    if other is None and others:
        other = max(others) if is_more_better else min(others)
    if ours is None or not other:
        return ""
    return f"{ours / other:.2f}" if ours / other < 10 else f"{ours / other:.0f}"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def scaling(found: Results) -> list[str]:
    """The figures of the plots."""
    runs = [run for run in found.runs if run["case"] == "concurrency"]
    if not runs:
        return []
    steps = sorted({run["concurrency"] for run in runs})
    names = [name for name in found.libraries if any(found.of(name, case="concurrency"))]
    base = runs[0]["base"]
    lines = [
        f"Reading {size_of(runs[0]['size'])} from *{base}* in MiB/s, by requests at once:",
        "",
        "| at once | " + " | ".join(TITLES[name] for name in names) + " |",
        "|--:|" + "--:|" * len(names),
    ]
    for step in steps:
        cells = [number(found.median("rate", name, case="concurrency", concurrency=step)) for name in names]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return lines


def simulation(scale: dict[str, Any]) -> list[str]:
    """The figures of a simulation by `recipes.benchmarks.scale`."""
    first, *others = map(str, scale["latencies"])
    columns = [f"s, at {float(latency) * 1000:g} ms" for latency in (first, *others)]
    lines = [
        f"| {scale['names']:,} names in | {' | '.join(columns)} | imbalance | requests |",
        "|---|" + "--:|" * (len(columns) + 2),
    ]
    for row in scale["rows"]:
        runs = row["runs"]
        times = [number(runs[latency]["seconds"]) for latency in (first, *others)]
        lines.append(
            f"| {row['shape']} | {' | '.join(times)} | {runs[first]['imbalance']:.2f} | {runs[first]['requests']:.3f} |"
        )
    return lines


# -- the plots --------------------------------------------------------------------------------------------------------


def draw(found: Results, folder: Path) -> list[Path]:
    """Three plots: throughput, cost, scaling."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "azstoragetorch", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
        | {"axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False, "savefig.transparent": True}
        | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
        | {"grid.color": INK, "grid.alpha": 0.2}
    )
    made = []

    def finish(figure: Any, name: str) -> None:
        path = folder / name
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
        path.write_text(themed(path.read_text()))
        made.append(path)

    large = [case for case in found.cases("read", "write", "save", "load") if not is_step(found, case)]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.6 * len(large)), layout="constrained")
    bars(axes, found, large, "rate")
    axes.set_xlabel("MiB/s")
    figure.legend(loc="outside lower center", ncols=2)
    finish(figure, "throughput.svg")

    first = [case for case in large if case["base"] == found.bases[0]]
    figure, pair = plt.subplots(2, 1, figsize=(WIDTH, 2 * (0.6 + 0.6 * len(first))), layout="constrained")
    bars(pair[0], found, first, cpu_per_gib)
    bars(pair[1], found, first, "peak_mib")
    pair[0].set_xlabel("CPU seconds a GiB")
    pair[1].set_xlabel("peak memory, MiB")
    figure.legend(*pair[1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    finish(figure, "cost.svg")

    figure, three = plt.subplots(3, 1, figsize=(WIDTH, 8), layout="constrained")
    lines(three[0], found, "concurrency", "concurrency", "requests at once", "MiB/s")
    lines(three[1], found, "read", "size", "size of the blob", "MiB/s")
    lines(three[2], found, "samples", "count", "blobs", "samples/s")
    handles, labels = three[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    finish(figure, "scaling.svg")
    return made


def themed(svg: str) -> str:
    """*svg* with its colors as variables, which follow the light or dark theme of the page that shows it.

    Fonts are named, not embedded: the reader's own are used.
    """
    for name, color in {**COLORS, "ink": INK}.items():
        svg = svg.replace(color, f"var(--{name})")
    light, dark = ("; ".join(f"--{name}: {color}" for name, color in colors.items()) for colors in PALETTES)
    style = f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>"
    svg = svg.replace("<defs>", f"{style}\n <defs>", 1)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def is_step(found: Results, case: dict[str, Any]) -> bool:
    """Whether this is a small blob, which stands in another plot."""
    largest = max((run["size"] for run in found.runs if run["case"] == case["case"]), default=0)
    return case["case"] == "read" and case.get("size", 0) < largest


def bars(axes: Any, found: Results, cases: list[dict[str, Any]], what: Any) -> None:
    measured = {name: [found.median(what, name, **case) or 0 for case in cases] for name in found.libraries}
    measured = {name: values for name, values in measured.items() if any(values)}
    height = 0.8 / max(1, len(measured))
    for place, (name, values) in enumerate(measured.items()):
        positions = [row + (place - (len(measured) - 1) / 2) * height for row in range(len(cases))]
        axes.barh(positions, values, height, label=TITLES[name], color=COLORS[name])
    axes.set_yticks(range(len(cases)), [textwrap.fill(f"{name_of(case)}, {case['base']}", 20) for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(axis="x")


def lines(axes: Any, found: Results, case: str, by: str, label: str, unit: str) -> None:
    """One line a library, on the last base that has several points."""
    from matplotlib.ticker import LogLocator, NullLocator

    points = {(run["base"], run[by]) for run in found.runs if run["case"] == case and by in run}
    counts = {base: sum(1 for point in points if point[0] == base) for base in found.bases}
    base = max(found.bases, key=lambda name: (counts[name], found.bases.index(name)))
    steps = sorted(step for name, step in points if name == base)
    for name in found.libraries:
        values = [found.median("rate", name, case=case, base=base, **{by: step}) for step in steps]
        known = [(step, value) for step, value in zip(steps, values, strict=True) if value]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=3, label=TITLES[name], color=COLORS[name])
    if steps:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(steps, [size_of(step) if by == "size" else str(step) for step in steps])
        axes.tick_params(axis="x", which="major", rotation=30 if by == "size" else 0)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # several labels, although it may span one decade
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{label} ({base})")
    axes.set_ylabel(unit)
    axes.grid()
