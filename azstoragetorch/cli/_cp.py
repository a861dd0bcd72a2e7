"""``azstoragetorch cp``: files and folders to and from blobs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.engine import Scope, engine_for
from azstoragetorch.cli._output import human
from azstoragetorch.cli._session import FAILED, Session, common, exit_code
from azstoragetorch.cli._transfer import PARTIAL, Advance, copy, download, look, upload
from azstoragetorch.exceptions import AZStorageTorchError

_LARGE_AT_ONCE = 2  # each takes all connections; the second one covers the end of the first


@dataclass(frozen=True)
class _Job:
    source: str
    target: str
    size: int
    run: Callable[[Scope, Advance], str]


class _Place(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """A path, or the URL of a blob, folder or container."""

    name = "path or url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> BlobURL | Path:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if "://" not in value:
            return Path(value)
        try:
            return parse_url(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("source", type=_Place())
@click.argument("target", type=_Place())
@click.option("--recursive", "-r", is_flag=True, help="What is in the folder SOURCE goes under TARGET.")
@click.option("--force", is_flag=True, help="Copy also what is there already.")
@click.option("--dry-run", is_flag=True, help="Say what would be copied.")
@common
def cp(
    session: Session, source: BlobURL | Path, target: BlobURL | Path, recursive: bool, force: bool, dry_run: bool
) -> None:
    """Copy between files and blobs, or blobs and blobs. At least one of SOURCE and TARGET is a URL.

    A TARGET that ends with a slash, is a container or is a folder on this machine takes the file under its own name.

    What the target has already, by length and MD5, is skipped. A download that was interrupted goes on where it
    stopped. No target is ever seen in part.
    """
    if isinstance(source, Path) and isinstance(target, Path):
        raise click.UsageError("SOURCE or TARGET has to be a URL")
    if isinstance(target, BlobURL) and target.is_read_only:
        raise click.UsageError(f"TARGET {target} has a snapshot or versionid, which cannot be written")
    begin = time.monotonic()
    plan = _Plan(session, force)
    jobs = plan.of_folder(source, target) if recursive else [plan.of_one(source, target)]
    if dry_run:
        for job in jobs:
            session.output.record({"source": job.source, "target": job.target, "bytes": job.size, "status": "planned"})
            session.output.line(f"{job.source} -> {job.target}  ({human(job.size)})")
        return
    tally = _Tally(session)
    tally.failed += plan.refused
    try:
        _run(session, plan.config, jobs, tally)
    finally:
        tally.finish(time.monotonic() - begin)
    if tally.failed:
        raise click.exceptions.Exit(FAILED)


class _Plan:
    def __init__(self, session: Session, is_forced: bool) -> None:
        self._session = session
        self._is_forced = is_forced
        self.config = TransferConfig()
        self.refused = 0
        """What cannot be copied under its name."""

    def of_one(self, source: BlobURL | Path, target: BlobURL | Path) -> _Job:
        """Copy one file or blob."""
        if isinstance(source, BlobURL):
            if not source.blob or source.blob.endswith("/"):
                raise click.UsageError(f"{source} is a folder or container: add --recursive")
            try:
                size = look(self._blob(source), Scope()).version.size
            except ResourceNotFoundError as error:
                raise FileNotFoundError(f"{error} If it is a folder, add --recursive.") from None
            name = source.blob.rpartition("/")[2]
        else:
            if source.is_dir():
                raise click.UsageError(f"{source} is a folder: add --recursive")
            size, name = source.stat().st_size, source.name
        if isinstance(target, BlobURL):
            if not target.blob or target.blob.endswith("/"):
                target = target.with_blob(target.blob + name)
            if isinstance(source, BlobURL):
                return self._copy(source, target, size)
            return self._upload(source, target, size, self._size_of(target))
        assert isinstance(source, BlobURL)
        return self._download(source, target / name if target.is_dir() else target, size)

    def of_folder(self, source: BlobURL | Path, target: BlobURL | Path) -> list[_Job]:
        """Copy all that is in the folder *source* under *target*."""
        if isinstance(source, Path):
            assert isinstance(target, BlobURL)
            if not source.is_dir():
                raise click.UsageError(f"{source} is no folder: leave out --recursive")
            known = self._listed(target)
            prefix = _folder(target)
            jobs = []
            for path in _files(source):
                name = prefix + path.relative_to(source).as_posix()
                jobs.append(self._upload(path, target.with_blob(name), path.stat().st_size, known.get(name)))
            return jobs
        prefix = _folder(source)
        found = self._listed(source)
        if not found:
            raise FileNotFoundError(f"{source}: nothing there")
        jobs = []
        for name, size in found.items():
            relative = name[len(prefix) :]
            try:
                url = source.with_blob(name)
                if isinstance(target, BlobURL):
                    jobs.append(self._copy(url, target.with_blob(_folder(target) + relative), size))
                elif _is_path(relative):
                    jobs.append(self._download(url, target.joinpath(*relative.split("/")), size))
                else:
                    raise ValueError(f"{url}: no file can have this name")
            except ValueError as error:
                self._session.output.error(str(error), FAILED)
                self.refused += 1
        return jobs

    def _listed(self, url: BlobURL) -> dict[str, int]:
        container = self._session.access.container(url, self.config)
        found: dict[str, int] = {}
        with self._session.output.progress("listing", None, unit="blobs") as advance:
            for page in container.pages(prefix=_folder(url)):
                found.update(zip(page.names, page.sizes, strict=True))
                advance(len(page.names))
        return found

    def _size_of(self, url: BlobURL) -> int | None:
        version = self._blob(url).version()
        return version.size if version is not None else None

    def _blob(self, url: BlobURL) -> BlobClient:
        return self._session.access.blob(url, self.config)

    def _upload(self, path: Path, url: BlobURL, size: int, known: int | None) -> _Job:
        def run(scope: Scope, advance: Advance) -> str:
            return upload(path, self._blob(url), known, scope, advance, is_forced=self._is_forced)

        return _Job(str(path), str(url), size, run)

    def _download(self, url: BlobURL, path: Path, size: int) -> _Job:
        def run(scope: Scope, advance: Advance) -> str:
            return download(self._blob(url), path, scope, advance, is_forced=self._is_forced)

        return _Job(str(url), str(path), size, run)

    def _copy(self, source: BlobURL, target: BlobURL, size: int) -> _Job:
        def run(scope: Scope, advance: Advance) -> str:
            return copy(self._blob(source), self._blob(target), scope, advance, is_forced=self._is_forced)

        return _Job(str(source), str(target), size, run)


def _folder(url: BlobURL) -> str:
    return f"{url.blob}/" if url.blob and not url.blob.endswith("/") else url.blob


def _files(folder: Path) -> Iterable[Path]:
    """Every regular file below *folder*, in order; linked folders are not entered."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            if path.is_file() and not name.startswith(PARTIAL):
                yield path


def _is_path(name: str) -> bool:
    """Whether *name*, of a blob, names a file below a folder and no other place."""
    if os.name == "nt" and any(character in name for character in '\\:*?"<>|'):
        return False
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


class _Tally:
    """What became of the jobs."""

    def __init__(self, session: Session) -> None:
        self._output = session.output
        self._lock = threading.Lock()
        self.counts = {"copied": 0, "resumed": 0, "skipped": 0}
        self.failed = 0
        self.bytes = 0

    def add(self, job: _Job, status: str) -> None:
        """*job* came to an end."""
        with self._lock:
            self.counts[status] += 1
            self.bytes += job.size if status != "skipped" else 0
            self._output.record({"source": job.source, "target": job.target, "bytes": job.size, "status": status})

    def fail(self, job: _Job, error: Exception) -> None:
        """*job* failed."""
        with self._lock:
            self.failed += 1
            self._output.record({"source": job.source, "target": job.target, "bytes": job.size, "status": "failed"})
            self._output.error(f"{job.source} -> {job.target}: {error}", exit_code(error))

    def finish(self, seconds: float) -> None:
        """Say what became of all."""
        summary = {**self.counts, "failed": self.failed, "bytes": self.bytes, "seconds": round(seconds, 3)}
        self._output.record({"summary": summary})
        words = ", ".join(
            f"{count:,} {word}" for word, count in [*self.counts.items(), ("failed", self.failed)] if count
        )
        rate = f", {human(self.bytes / seconds)}/s" if self.bytes and seconds else ""
        self._output.note(f"{words or 'nothing to do'}: {human(self.bytes)} in {seconds:.1f} s{rate}")


def _run(session: Session, config: TransferConfig, jobs: list[_Job], tally: _Tally) -> None:
    engine = engine_for(config)
    scope = Scope()

    def task(job: _Job, advance: Advance) -> Callable[[Scope], None]:
        def run(scope: Scope) -> None:
            try:
                status = job.run(scope, advance)
            except ClientAuthenticationError:
                raise  # the others would fail as well
            except (AzureError, AZStorageTorchError, OSError, ValueError) as error:
                if isinstance(error.__cause__, ClientAuthenticationError):
                    raise
                tally.fail(job, error)
            else:
                tally.add(job, status)

        return run

    # A large one uses all connections itself; of the small ones each takes one.
    large = [job for job in jobs if job.size > min(config.part_size, config.block_size)]
    small = [job for job in jobs if job.size <= min(config.part_size, config.block_size)]
    with session.output.progress("copying", sum(job.size for job in jobs)) as advance:
        engine.run_all([task(job, advance) for job in large], _LARGE_AT_ONCE, scope)
        engine.run_all([task(job, advance) for job in small], config.max_connections, scope)
