"""The plan of ``cp``: a job for each file or blob, and an error for each one that cannot be copied."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import click
from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._files.description import describe
from azstoragetorch._files.paths import (
    CopyError,
    check_folders,
    display,
    is_stream_target,
    open_to_read,
    printable,
)
from azstoragetorch._files.transfer import CopyOptions, Hooks, copy_blob, get_file, get_stream, put_file, put_stream
from azstoragetorch._files.walk import Links, walk
from azstoragetorch.cli._places import CopySource, Glob, LocalPath, Standard, Target, blobs_of, folder_of
from azstoragetorch.cli._session import FAILED, Session
from azstoragetorch.exceptions import AZStorageTorchError


@dataclass(frozen=True)
class Job:
    """One file or blob to copy."""

    source: str
    target: str
    size: int | None
    """None if the size is unknown until the source ends."""
    run: Callable[[Hooks], str]
    path: Path | None = None
    """The file that a download creates."""
    is_blocking: bool = False
    """Reads or writes a fifo or device, which may block, and which Ctrl-C interrupts on the main thread only."""


class Plan:
    """Turns sources and a target into jobs."""

    def __init__(self, session: Session, config: TransferConfig, options: CopyOptions, links: Links) -> None:
        self._session = session
        self._config = config
        self._options = options
        self._links = links
        self._targets: set[str] = set()
        self.jobs: list[Job] = []
        self.refused = 0
        """The number of sources that cannot be copied. Each was reported."""
        self.left_out = 0
        """The number of files that are skipped on purpose."""
        self.tagged: deque[BlobURL] = deque()
        """Blobs with index tags that their copies do not get."""

    def add_one(self, source: CopySource, target: Target) -> None:
        """Copy one file or blob, or the blobs that match a glob."""
        if isinstance(source, Glob):
            self._add_glob(source, target, recursive=False)
            return
        if isinstance(source, Standard):
            if not isinstance(target, BlobURL) or _is_container_or_folder(target):
                raise click.UsageError("standard input has no name: TARGET must be the URL of a blob")
            self._append(Job("-", str(target), None, self._from_standard_input(target), is_blocking=True))
            return
        if isinstance(source, LocalPath):
            if source.path.is_dir():
                raise click.UsageError(f"{display(source.path)} is a folder: add --recursive")
            assert isinstance(target, BlobURL)
            url = _below(target, _name_of(source)) if _is_container_or_folder(target) else target
            self._upload(source.path, url, source.path.stat(), self._size_of(url))
            return
        size = self._size_of_source(source)
        if isinstance(target, Standard):
            self._append(Job(str(source), "-", size, self._to_standard_output(source), is_blocking=True))
        elif isinstance(target, LocalPath):
            path = _local(target.path, _name_of(source)) if _is_local_folder(target) else target.path
            self._download(source, path, size, is_blocking=is_stream_target(path))
        else:
            self._copy(source, _below(target, _name_of(source)) if _is_container_or_folder(target) else target, size)

    def add_folder(self, source: CopySource, target: Target) -> None:
        """Copy everything in the folder *source*, or all matches of a glob, to *target*."""
        if isinstance(source, Glob):
            self._add_glob(source, target, recursive=True)
        elif isinstance(source, LocalPath):
            if not source.path.is_dir():
                source.path.stat()
                raise click.UsageError(f"{display(source.path)} is not a folder: omit --recursive")
            assert isinstance(target, BlobURL)
            self._add_local_folder(source.path, target)
        elif isinstance(source, BlobURL):
            prefix = folder_of(source)
            found = self._listed(source)
            if not found:
                raise FileNotFoundError(f"{source}: no blob found")
            self._add_blobs(source, found, len(prefix), target)
        else:
            raise click.UsageError("standard input is not a folder: omit --recursive")

    def add_many(self, sources: tuple[CopySource, ...], target: Target, *, recursive: bool) -> None:
        """Copy each of *sources* into the folder *target*, under its own name."""
        is_folder = _is_local_folder(target) if isinstance(target, LocalPath) else None
        is_folder = _is_container_or_folder(target) if isinstance(target, BlobURL) else is_folder
        if not is_folder:
            raise click.UsageError(
                f"with several sources, TARGET must be a folder: {target} is neither an existing folder nor a name "
                "that ends with a slash"
            )
        for source in sources:
            with self._refusing(source):
                if recursive and self._is_folder(source):
                    is_glob = isinstance(source, Glob)
                    self.add_folder(source, target if is_glob else _inside(target, _name_of(source)))
                else:
                    self.add_one(source, target)

    def _add_glob(self, source: Glob, target: Target, *, recursive: bool) -> None:
        container = self._session.access.container(source.url, self._config)
        found = {name: size for name, size, _ in source.blobs(container, recursive=recursive)}
        if not found:
            raise FileNotFoundError(f"{source}: no blob matches")
        if isinstance(target, BlobURL) and not _is_container_or_folder(target):
            raise click.UsageError(f"several blobs may match {source}: TARGET {target} must end with a slash")
        if isinstance(target, LocalPath) and not _is_local_folder(target):
            raise click.UsageError(
                f"several blobs may match {source}: TARGET {target} must be a folder or end with a slash"
            )
        self._add_blobs(source.url, found, len(source.folder), target)

    def _add_local_folder(self, folder: Path, target: BlobURL) -> None:
        known = self._listed(target)
        prefix = folder_of(target)
        for entry in walk(folder, self._links):
            self.left_out += entry.is_left_out
            if entry.problem:
                self._refuse(str(entry.path), entry.problem)
            elif entry.status is not None:
                with self._refusing(entry.path):
                    url = _named(target, prefix + entry.name, entry.path)
                    self._upload(entry.path, url, entry.status, known.get(url.blob))

    def _add_blobs(self, source: BlobURL, found: dict[str, int], cut: int, target: Target) -> None:
        """Copy the blobs *found* to *target*, under their names without the first *cut* characters."""
        if isinstance(target, Standard):
            raise click.UsageError("only a single blob can be copied to standard output")
        if isinstance(target, LocalPath):
            _check_root(target.path)
        container = str(source.with_blob(""))
        # A file cannot also be a folder: of `a` and `a/b` only one can exist.
        folders = {name[cut : end + cut] for name in found for end in _slashes(name[cut:])}
        for name, size in found.items():
            relative = name[cut:]
            with self._refusing(f"{container}/{name}"):
                url = source.with_blob(name)
                if isinstance(target, BlobURL):
                    self._copy(url, target.with_blob(folder_of(target) + relative), size)
                elif relative[-1:] in ("", "/") and not size:
                    self._make_folder(url, target.path, relative)
                elif not _is_path(relative):
                    raise ValueError(f"{url}: no file can have this name")
                elif relative in folders:
                    raise CopyError(
                        f"{url}: not copied, because there are also blobs below {url}/, and a file cannot be a folder"
                    )
                else:
                    self._download_below(url, target.path, relative, size)

    def _make_folder(self, url: BlobURL, root: Path, relative: str) -> None:
        if relative and not _is_path(relative[:-1]):
            raise ValueError(f"{url}: no folder can have this name")
        check_folders(root, relative)
        path = root.joinpath(*filter(None, relative.split("/")))

        def run(_hooks: Hooks) -> str:
            path.mkdir(parents=True, exist_ok=True)
            return "copied"

        self._append(Job(f"{url}", f"{path}/", 0, run))

    def _download_below(self, url: BlobURL, root: Path, relative: str, size: int) -> None:
        check_folders(root, relative)
        path = root.joinpath(*relative.split("/"))
        if is_stream_target(path):
            raise CopyError(f"{display(path)} is a fifo or device: to write to it, pass it as TARGET of a single blob")
        self._download(url, path, size)

    def _is_folder(self, source: CopySource) -> bool:
        if isinstance(source, LocalPath):
            return source.path.is_dir()
        if not isinstance(source, BlobURL):
            return isinstance(source, Glob)
        return _is_container_or_folder(source) or self._size_of(source) is None

    def _size_of_source(self, source: BlobURL) -> int:
        if _is_container_or_folder(source):
            raise click.UsageError(f"{source} is a folder or container: add --recursive")
        try:
            found = describe(self._blob(source), Scope())
        except ResourceNotFoundError as error:
            raise FileNotFoundError(f"{error} If it is a folder, add --recursive.") from None
        if found.is_folder:
            raise click.UsageError(f"{source} is a folder: add --recursive")
        return found.version.size

    def _listed(self, url: BlobURL) -> dict[str, int]:
        container = self._session.access.container(url, self._config)
        found: dict[str, int] = {}
        with self._session.output.progress("listing", None, unit="blobs") as advance:
            for page in container.pages(prefix=folder_of(url)):
                found.update((name, size) for name, size, _ in blobs_of(page))
                advance(len(page.names))
        return found

    def _size_of(self, url: BlobURL) -> int | None:
        version = self._blob(url).version()
        return version.size if version is not None else None

    def _blob(self, url: BlobURL) -> BlobClient:
        return self._session.access.blob(url, self._config)

    def _append(self, job: Job) -> None:
        if job.target in self._targets and job.target != "-":
            self._refuse(
                job.source, f"{printable(job.source)}: another source has the same target, {printable(job.target)}"
            )
            return
        self._targets.add(job.target)
        self.jobs.append(job)

    @contextmanager
    def _refusing(self, source: object) -> Iterator[None]:
        """Report an error in the block as a source that cannot be copied; the others are copied."""
        try:
            yield
        except ClientAuthenticationError:
            raise  # the others would fail as well
        except (AzureError, AZStorageTorchError, OSError, ValueError) as error:
            self._refuse(str(source), str(error))

    def _refuse(self, source: str, message: str) -> None:
        self._session.output.record({"source": source, "status": "failed"})
        self._session.output.error(message, FAILED)
        self.refused += 1

    def _upload(self, path: Path, url: BlobURL, status: os.stat_result, known: int | None) -> None:
        if not stat.S_ISREG(status.st_mode):
            run = self._from_stream(lambda: open_to_read(path), url)
            self._append(Job(str(path), str(url), None, run, is_blocking=True))
            return

        def copy(hooks: Hooks) -> str:
            return put_file(path, self._blob(url), known, hooks, self._options)

        self._append(Job(str(path), str(url), status.st_size, copy))

    def _from_standard_input(self, url: BlobURL) -> Callable[[Hooks], str]:
        return self._from_stream(lambda: os.fdopen(os.dup(0), "rb", buffering=0), url)

    def _from_stream(self, open_stream: Callable[[], BinaryIO], url: BlobURL) -> Callable[[Hooks], str]:
        def run(hooks: Hooks) -> str:
            with open_stream() as stream:
                put_stream(stream, self._blob(url), hooks)
            return "copied"

        return run

    def _to_standard_output(self, url: BlobURL) -> Callable[[Hooks], str]:
        def run(hooks: Hooks) -> str:
            with os.fdopen(os.dup(1), "wb", buffering=0) as stream:
                get_stream(self._blob(url), stream, hooks, self._options)
            return "copied"

        return run

    def _download(self, url: BlobURL, path: Path, size: int, *, is_blocking: bool = False) -> None:
        def run(hooks: Hooks) -> str:
            return get_file(self._blob(url), path, hooks, self._options)

        self._append(Job(str(url), str(path), size, run, path, is_blocking))

    def _copy(self, source: BlobURL, target: BlobURL, size: int) -> None:
        def run(hooks: Hooks) -> str:
            hooks = replace(hooks, report_tags=lambda _count: self.tagged.append(source))
            return copy_blob(self._blob(source), self._blob(target), hooks, self._options)

        self._append(Job(str(source), str(target), size, run))


def _is_container_or_folder(url: BlobURL) -> bool:
    return url.blob[-1:] in ("", "/")


def _is_local_folder(target: LocalPath) -> bool:
    return target.is_folder or target.path.is_dir()


def _name_of(source: CopySource) -> str:
    """The name of *source* within a folder."""
    if isinstance(source, LocalPath):
        return source.path.name if source.path.name not in ("", "..") else source.path.resolve().name
    assert isinstance(source, BlobURL)
    return source.blob.rstrip("/").rpartition("/")[2] or source.container


def _inside(target: Target, name: str) -> Target:
    if isinstance(target, LocalPath):
        return LocalPath(_local(target.path, name), is_folder=True)
    assert isinstance(target, BlobURL)
    return _below(target, f"{name}/")


def _local(folder: Path, name: str) -> Path:
    if not _is_path(name):
        raise ValueError(f"{printable(name)} cannot be the name of a file in {display(folder)}")
    return folder / name


def _below(folder: BlobURL, name: str) -> BlobURL:
    return _named(folder, folder_of(folder) + name, Path(name))


def _named(url: BlobURL, name: str, path: Path) -> BlobURL:
    """The blob *name* in the container of *url*, for a copy of *path*.

    Raises:
        ValueError: no blob can have this name.
    """
    try:
        name.encode("utf-8")
        return url.with_blob(name)
    except UnicodeEncodeError:
        raise ValueError(
            f"{display(path)}: names of blobs must be UTF-8, and this one is not: rename the file"
        ) from None
    except ValueError as error:
        raise ValueError(f"{display(path)}: this cannot be the name of a blob: {error}") from None


def _slashes(name: str) -> list[int]:
    return [place for place, character in enumerate(name) if character == "/"]


def _is_path(name: str) -> bool:
    """Whether *name*, of a blob, is a path to a file below a folder, and nowhere else."""
    if os.name == "nt" and any(character in name for character in '\\:*?"<>|'):
        return False
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def _check_root(path: Path) -> None:
    """Check that *path* is a folder or can become one.

    Raises:
        UsageError: it is something else.
    """
    if not path.is_dir() and (path.exists() or path.is_symlink()):
        raise click.UsageError(
            f"TARGET {display(path)} is not a folder, but several blobs are copied: choose another TARGET"
        )
