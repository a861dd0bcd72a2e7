"""``python -m recipes.benchmarks``: make the virtual environments, run the cases, write the report.

Without ``--base`` everything runs on Azurite, which this starts. The figures then show the speed of Azurite more than
that of any library. To compare libraries, use your account or a fast server:

    export AZURE_STORAGE_SAS_TOKEN=...      # or AZURE_STORAGE_KEY; neither if the container is public
    python -m recipes.benchmarks --base region=https://<account>.blob.core.windows.net --container <container>
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import AzureError
from azure.storage.blob import AccountSasPermissions, ContainerClient, ResourceTypes, generate_account_sas
from tqdm import tqdm

from recipes.azurite import run_azurite
from recipes.benchmarks.libraries import LIBRARIES
from recipes.benchmarks.report import write_report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MiB = 1 << 20
PREFIX = "azstoragetorch-benchmarks"
MODEL = "model/model.safetensors"
SHORT = 3.0  # seconds; a first run that is shorter only warms up


@dataclass(frozen=True)
class Sizes:
    """How much is moved."""

    large: int = 256 * MiB
    model: int = 94 * MiB
    checkpoint: int = 128 * MiB
    samples: int = 300
    steps: tuple[int, ...] = (64 << 10, 1 * MiB, 8 * MiB, 64 * MiB)
    counts: tuple[int, ...] = (10, 60)
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16)
    rounds: int = 2
    ranges: int = 1000


TINY = Sizes(1 * MiB, 1 * MiB, 1 * MiB, 8, (1 << 10,), (4,), (1, 2), 1, 8)


@dataclass(frozen=True)
class Options:
    """What a run is told."""

    bases: dict[str, str]
    container: str
    sizes: Sizes
    listing: tuple[str, int] | None = None
    """A container to list that is there already, and how many blobs it has."""
    sas: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    only: frozenset[str] = frozenset()
    server: str = ""
    command: str = "make bench"
    """What made it, without addresses."""


class Worker:
    """A process in the virtual environment of a library."""

    def __init__(self, library: str, python: str, options: Options) -> None:
        self._command = [python, str(HERE / "worker.py"), library]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if python != sys.executable:
            self._environment.pop("PYTHONPATH", None)  # this package would take the place of the published one
        if options.sas:
            self._environment["BENCHMARK_SAS"] = options.sas
        if options.ca_file:
            self._environment |= dict.fromkeys(
                ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "BENCHMARK_OWN_AUTHORITY"), options.ca_file
            )
        self._process: subprocess.Popen[str] | None = None

    def ask(self, command: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """Have *command* run; one that takes longer than *timeout* seconds is an error, as is one that dies."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.close()
            return {"error": f"ended, or took more than {timeout:g} s"}
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def cases(options: Options) -> Iterator[dict[str, Any]]:
    """Every case, with the base that it runs on; what matters most comes first.

    All bases are read; the rest is for the first, for the one with latency and for the one that is farthest.
    """
    sizes, bases = options.sizes, list(options.bases)
    first = bases[0]
    slow, far = (name if name in bases else bases[-1] for name in ("slow", "wan"))
    for base in bases:
        yield {"case": "read", "base": base, "name": "large", "size": sizes.large}
        if base in (first, far):
            yield {"case": "write", "base": base, "name": "written", "size": sizes.large}
            yield {"case": "save", "base": base, "name": "saved.pt", "state": "few", "size": sizes.large}
        if base in (first, slow) or options.bases[base].startswith("https"):
            yield {"case": "tensors", "base": base, "name": MODEL, "state": "many", "size": sizes.model}
        if base in (first, slow):
            yield {"case": "tensors-load", "base": base, "name": MODEL, "state": "many", "size": sizes.model}
            yield {"case": "load", "base": base, "name": "model.pt", "state": "many", "size": sizes.model}
            yield {"case": "stream", "base": base, "name": "half", "size": sizes.large // 2}
            yield {"case": "ranges", "base": base, "name": "half", "size": sizes.large // 2, "count": sizes.ranges}
            yield {"case": "latency", "base": base, "name": "step-4096", "size": 4096}
            yield {"case": "samples", "base": base, "name": f"samples-{sizes.samples}/", "count": sizes.samples}
            for operation in ("checkpoint-save", "checkpoint-load"):
                yield {"case": operation, "base": base, "name": operation, "state": "few", "size": sizes.checkpoint}
    if options.listing is not None:
        container, count = options.listing
        yield {"case": "names", "base": first, "name": "", "count": count, "container": container}
    else:
        name = f"{PREFIX}/samples-{sizes.samples}/"
        yield {"case": "names", "base": first, "name": name, "count": sizes.samples}
    for concurrency in sizes.concurrencies:
        size = sizes.large // 2
        yield {"case": "concurrency", "base": far, "name": "half", "size": size, "concurrency": concurrency}
    for count in sizes.counts:
        yield {"case": "samples", "base": slow, "name": f"samples-{count}/", "count": count}
    for size in sizes.steps:
        yield {"case": "read", "base": slow, "name": f"step-{size}", "size": size}


def preparations(options: Options) -> Iterator[dict[str, Any]]:
    """What is written before anything is read."""
    sizes = options.sizes
    yield {"what": "blob", "name": "large", "size": sizes.large}
    yield {"what": "blob", "name": "half", "size": sizes.large // 2}
    for size in (4096, *sizes.steps):
        yield {"what": "blob", "name": f"step-{size}", "size": size}
    yield {"what": "state", "name": "model.pt", "state": "many", "size": sizes.model}
    yield {"what": "tensors", "name": MODEL, "state": "many", "size": sizes.model}
    for count in (*sizes.counts, sizes.samples):
        yield {"what": "samples", "name": f"samples-{count}/", "count": count, "size": 0}


def run(
    options: Options,
    pythons: dict[str, str],
    results: Path,
    budget: float = float("inf"),
    *,
    is_more: bool = False,
) -> None:
    """Run all cases, the libraries in turns, and write a line of JSON for each run to *results*.

    Cases that would begin after *budget* seconds are left out. *is_more* adds to *results* what it left out before.
    """
    planned = [case for case in cases(options) if not options.only or case["case"] in options.only]
    if is_more:
        setup, *known = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        planned = [
            {name: value for name, value in case.items() if name != "record"}
            for case in known
            if case["record"] == "left out"
        ]
        setup["command"] += f"\n{options.command}"
        kept = [setup, *(record for record in known if record["record"] != "left out")]
        results.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
    with ExitStack() as stack, results.open("a" if is_more else "w", encoding="utf-8") as file:
        workers = {library: Worker(library, python, options) for library, python in pythons.items()}
        for worker in workers.values():
            stack.callback(worker.close)

        def note(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        if not is_more:
            versions = {
                library: worker.ask({"case": "version"}).get("version", "?") for library, worker in workers.items()
            }
            note(
                {
                    "record": "setup",
                    **describe_machine(),
                    "server": options.server,
                    "command": options.command,
                    "versions": versions,
                }
            )
        stack.enter_context(prepared(options, workers["ours"]))
        deadline = time.monotonic() + budget
        bar = stack.enter_context(tqdm(planned, desc="benchmarks", unit="case", disable=None))
        for case in bar:
            if time.monotonic() > deadline:
                note({"record": "left out", **case})
                continue
            bar.set_postfix_str(f"{case['case']} {case['base']}")
            for record in turns(case, options, workers):
                note(record)


def turns(case: dict[str, Any], options: Options, workers: dict[str, Worker]) -> Iterator[dict[str, Any]]:
    """One case by all libraries, in turns; who fails or has no such thing has no further turn."""
    command = {"account_url": options.bases[case["base"]], "container": options.container, **case}
    if "container" not in case and case["case"] != "names":
        command["name"] = f"{PREFIX}/{case['name']}"
    out: set[str] = set()
    for number in range(options.sizes.rounds + 1):
        for library, worker in workers.items():
            if library in out:
                continue
            own = f"-{library}" if case["case"].startswith("checkpoint") else ""
            found = worker.ask({**command, "name": command["name"] + own, "first": number == 0})
            if "rate" not in found:
                out.add(library)
            is_warm_up = number == 0 and options.sizes.rounds > 0 and found.get("seconds", SHORT) < SHORT
            took = found.get("seconds", 0.0)
            is_last = number == options.sizes.rounds or took > 4 * SHORT or (number > 0 and took > SHORT)
            yield {"record": "run", "library": library, **case, "round": number, "warm_up": is_warm_up, **found}
            if is_last:
                out.add(library)


@contextmanager
def prepared(options: Options, worker: Worker) -> Iterator[None]:
    """The blobs that are read, for as long as they are."""
    stores: dict[str | None, str] = {}
    for base in options.bases.values():
        stores.setdefault(urlsplit(base).hostname, base)  # several ways to one store
    proof = AzureSasCredential(options.sas) if options.sas else None
    verify = options.ca_file or True
    clients = [
        ContainerClient(base, options.container, credential=proof, connection_verify=verify) for base in stores.values()
    ]
    for base, client in zip(stores.values(), clients, strict=True):
        with suppress(AzureError):
            client.create_container()
        for command in preparations(options):
            place = {"account_url": base, "container": options.container, "name": f"{PREFIX}/{command['name']}"}
            found = worker.ask({"case": "prepare", **command, **place}, timeout=600)
            if "error" in found:
                raise SystemExit(f"cannot write to {base}/{options.container}: {found['error']}")
    try:
        yield
    finally:
        for client in clients:
            with suppress(AzureError):
                for name in list(client.list_blob_names(name_starts_with=f"{PREFIX}/")):
                    client.delete_blob(name)


def describe_machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
    }


def make_environments(folder: Path, names: list[str]) -> dict[str, str]:
    """A virtual environment for each library but ours, which runs in this one; returns their interpreters."""
    pythons = {}
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    for name in names:
        if name in ("ours", "filesystem"):
            pythons[name] = sys.executable
            continue
        home = folder / name
        python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        done = home / ".done"
        if not done.exists():
            print(f"making {home}: torch and {LIBRARIES[name].requirements[0]}", file=sys.stderr)  # type: ignore[attr-defined]
            if not python.exists():
                venv.create(home, with_pip=True)
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            # torch goes first and pinned: resolving it with the rest may take another, far larger build.
            subprocess.run([*pip, torch, "numpy"], check=True)
            subprocess.run([*pip, *LIBRARIES[name].requirements], check=True)  # type: ignore[attr-defined]
            done.touch()
        pythons[name] = str(python)
    return pythons


def sas_for(base: str) -> str | None:
    """The SAS of the environment, or one made with the key of the environment; None without either."""
    if token := os.environ.get("AZURE_STORAGE_SAS_TOKEN"):
        return token.lstrip("?")
    if key := os.environ.get("AZURE_STORAGE_KEY"):
        account = urlsplit(base)
        return mint(account.path.strip("/") or account.netloc.partition(".")[0], key)
    return None


def mint(account: str, key: str) -> str:
    return generate_account_sas(
        account,
        key,
        ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions.from_string("rwdlac"),
        expiry=datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=12),
    )


def command(options: argparse.Namespace) -> str:
    """The command that was given, without addresses and files of this machine."""
    words = [f"--base {item.partition('=')[0]}=<url>" for item in options.base]
    words += ["--ca-file <pem>"] if options.ca_file else []
    words += [f"--listing {options.listing}"] if options.listing else []
    words += [f"--only {options.only}"] if options.only else []
    words += ["--more"] if options.more else []
    words += [f"--minutes {options.minutes:g}"] if options.minutes < float("inf") else []
    return f'make bench BENCH="{" ".join(words)}"' if words else "make bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", default=[], metavar="NAME=URL", help="an account; may be repeated")
    parser.add_argument("--container", default=PREFIX, help="a container there, made if it is missing")
    parser.add_argument("--listing", metavar="CONTAINER=COUNT", help="list this container, which has COUNT blobs")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="which to compare, ours among them")
    parser.add_argument("--only", default="", help="cases to run, such as read,save")
    parser.add_argument("--ca-file", help="PEM file of the authority behind an https base")
    parser.add_argument("--server", default="", help="what the report says about where it ran")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".bench", help="where virtual environments are made"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "docs/performance/results.jsonl")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--report-only", action="store_true", help="from results that are there")
    parser.add_argument("--more", action="store_true", help="run what the last run left out, and add it")
    parser.add_argument("--tiny", action="store_true", help="next to no data: whether it runs at all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so long")
    options = parser.parse_args()
    if not options.report_only:
        names = [name for name in options.libraries.split(",") if name]
        if unknown := set(names) - set(LIBRARIES):
            parser.error(f"unknown libraries: {', '.join(sorted(unknown))}")
        if "ours" not in names:
            parser.error("--libraries must have 'ours' among them: it writes what all read")
        pythons = make_environments(options.environments, names)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            bases = dict(item.split("=", 1) for item in options.base)
            server, sas = options.server, None
            if bases:
                sas = sas_for(next(iter(bases.values())))
            else:
                azurite = stack.enter_context(run_azurite())
                bases, server = {"azurite": azurite.account_url}, "azurite"
                sas = mint(azurite.account_name, azurite.account_key)
            listing = None
            if options.listing:
                container, _, count = options.listing.partition("=")
                listing = container, int(count)
            told = Options(
                bases,
                options.container,
                TINY if options.tiny else Sizes(),
                listing,
                sas,
                options.ca_file,
                frozenset(filter(None, options.only.split(","))),
                server,
                command(options),
            )
            run(told, pythons, options.results, options.minutes * 60, is_more=options.more)
    write_report(options.results, options.report)


if __name__ == "__main__":
    main()
