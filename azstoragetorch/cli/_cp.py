"""``azstoragetorch cp``: copy files and folders to and from blobs."""

from __future__ import annotations

import errno
import time
from collections import deque
from typing import get_args

import click
from azure.core.exceptions import AzureError, ClientAuthenticationError

from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._files.paths import CopyError, WrongMD5Error, printable
from azstoragetorch._files.record import Record
from azstoragetorch._files.transfer import CopyOptions, Hooks
from azstoragetorch._files.walk import Links
from azstoragetorch.cli._output import human
from azstoragetorch.cli._places import CopySource, LocalPath, Place, Standard, Target
from azstoragetorch.cli._plan import Job, Plan
from azstoragetorch.cli._session import FAILED, INTERRUPTED, Session, common, examples, exit_code
from azstoragetorch.exceptions import AZStorageTorchError

_LARGE_AT_ONCE = 2  # each uses all connections; the second one fills those that the end of the first leaves idle
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EROFS}

_EXAMPLES = """
cp model.pt https://ACCOUNT.blob.core.windows.net/CONTAINER/models/
cp -r https://ACCOUNT.blob.core.windows.net/CONTAINER/train ./train
cp 'https://ACCOUNT.blob.core.windows.net/CONTAINER/train/*.tar' ./shards/
cp a.txt b.txt https://ACCOUNT.blob.core.windows.net/CONTAINER/folder/
tar c data | azstoragetorch cp - https://ACCOUNT.blob.core.windows.net/CONTAINER/data.tar
cp https://ACCOUNT.blob.core.windows.net/CONTAINER/data.tar - | tar x
"""


class _DiskFull(CopyError):  # noqa: N818 - says what it is
    """The disk is full, so every other file would fail as well."""


@click.command(epilog=examples(_EXAMPLES))
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=Place(is_source=True))
@click.argument("target", type=Place(is_source=False))
@click.option("--recursive", "-r", is_flag=True, help="Copy everything in the folder SOURCE to TARGET.")
@click.option("--force", is_flag=True, help="Copy unchanged files as well.")
@click.option("--dry-run", is_flag=True, help="Print what would be copied.")
@click.option("--no-check-md5", is_flag=True, help="Do not check downloads against the MD5 of the blob.")
@click.option("--no-tier", is_flag=True, help="Between blobs: do not copy the access tier.")
@click.option("--tags", is_flag=True, help="Between blobs: copy index tags, which needs a separate permission.")
@click.option(
    "--links",
    type=click.Choice(get_args(Links)),
    default="files",
    show_default=True,
    help="Which symbolic links in a folder SOURCE to follow: those to files, all, or none (skip them).",
)
@common
def cp(
    session: Session,
    sources: tuple[CopySource, ...],
    target: Target,
    recursive: bool,
    force: bool,
    dry_run: bool,
    no_check_md5: bool,
    no_tier: bool,
    tags: bool,
    links: Links,
) -> None:
    """Copy files to blobs, blobs to files, or blobs to blobs.

    If TARGET is a container, a local folder, or ends with a slash, each file keeps its name in it. '-' is standard
    input or output. In the URL of a SOURCE, * matches any characters except a slash, and ** also matches slashes.

    Unchanged files (same length and MD5) are skipped. An interrupted download resumes where it stopped. A target
    appears only when it is complete.

    Copies between blobs keep content headers, metadata, and an access tier that was set explicitly; --tags also keeps
    index tags. Snapshots, older versions, leases, and immutability policies are not copied.
    """
    _check(session, sources, target)
    begin = time.monotonic()
    config = TransferConfig()
    plan = Plan(session, config, CopyOptions(force, not no_check_md5, not no_tier, tags), links)
    if len(sources) > 1:
        plan.add_many(sources, target, recursive=recursive)
    elif recursive:
        plan.add_folder(sources[0], target)
    else:
        plan.add_one(sources[0], target)
    if plan.left_out:
        session.output.note(f"{plan.left_out:,} skipped: links, or files of unfinished downloads")
    if dry_run:
        _show(session, plan)
        raise click.exceptions.Exit(FAILED if plan.refused else 0)
    _carry_out(session, config, plan, begin)


def _carry_out(session: Session, config: TransferConfig, plan: Plan, begin: float) -> None:
    """Carry out *plan*, which was started at *begin*, and report the outcome."""
    tally = _Tally(session, plan)
    try:
        _run(session, config, plan.jobs, tally)
    except KeyboardInterrupt:
        tally.interrupted(INTERRUPTED)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except SystemExit as stop:  # a signal
        tally.interrupted(stop.code)
        raise
    except Exception:
        tally.finish(time.monotonic() - begin)
        raise
    tally.finish(time.monotonic() - begin)
    if tally.failed:
        raise click.exceptions.Exit(FAILED)


def _show(session: Session, plan: Plan) -> None:
    for job in plan.jobs:
        session.output.record({"source": job.source, "target": job.target, "bytes": job.size, "status": "planned"})
        size = human(job.size) if job.size is not None else "unknown size"
        session.output.line(f"{printable(job.source)} -> {printable(job.target)}  ({size})")


def _check(session: Session, sources: tuple[CopySource, ...], target: Target) -> None:
    """Refuse sources and targets that do not fit together."""
    if not isinstance(target, BlobURL) and any(isinstance(source, (LocalPath, Standard)) for source in sources):
        raise click.UsageError("SOURCE or TARGET must be a URL")
    if isinstance(target, BlobURL) and target.is_read_only:
        raise click.UsageError(f"TARGET {target} names a snapshot or version, which cannot be written")
    if isinstance(target, Standard) and session.output.is_json:
        raise click.UsageError("--json prints to standard output, which is also TARGET: omit --json or choose a file")


class _Tally:
    """Counts the outcomes of the jobs."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self._output = session.output
        self._plan = plan
        self._started: deque[Job] = deque()
        self._ended: deque[tuple[Job, str, int]] = deque()

    @property
    def failed(self) -> int:
        """The number of sources that were not copied."""
        return self._plan.refused + sum(status == "failed" for _, status, _ in self._ended)

    def start(self, job: Job) -> None:
        """Note that *job* has started."""
        self._started.append(job)

    def add(self, job: Job, status: str, size: int) -> None:
        """Note that *job* has ended and copied *size* bytes."""
        self._ended.append((job, status, size))
        self._output.record({"source": job.source, "target": job.target, "bytes": size, "status": status})

    def fail(self, job: Job, error: Exception) -> None:
        """Note and report that *job* has failed."""
        self._ended.append((job, "failed", 0))
        self._output.record({"source": job.source, "target": job.target, "bytes": job.size, "status": "failed"})
        hint = ". If the stored MD5 is wrong, pass --no-check-md5 to copy the data anyway"
        self._output.error(
            f"{printable(job.source)} -> {printable(job.target)}: {error}"
            + (hint if isinstance(error, WrongMD5Error) else ""),
            exit_code(error),
        )

    def finish(self, seconds: float) -> None:
        """Print the summary."""
        summary = self._summary()
        tagged = len(self._plan.tagged)
        tags = {"index_tags_not_copied": tagged} if tagged else {}
        self._output.record({"summary": {**summary, "seconds": round(seconds, 3), **tags}})
        words = ", ".join(f"{count:,} {word}" for word, count in summary.items() if count and word != "bytes")
        size = summary["bytes"]
        rate = f", {human(size / seconds)}/s" if size and seconds else ""
        self._output.note(f"{words or 'nothing to do'}: {human(size)} in {seconds:.1f} s{rate}")
        if tagged:
            blobs = "1 blob" if tagged == 1 else f"{tagged:,} blobs"
            self._output.note(f"index tags of {blobs} were not copied: pass --tags to copy them")

    def interrupted(self, code: object) -> None:
        """Print how much a second run does not need to copy again."""
        done = {id(job) for job, status, _ in self._ended if status != "failed"}
        kept = sum(job.size or 0 for job in self._plan.jobs if id(job) in done)
        kept += sum(
            Record.kept_bytes(job.path) for job in self._started if job.path is not None and id(job) not in done
        )
        total = sum(job.size or 0 for job in self._plan.jobs)
        self._output.record({"summary": {**self._summary(), "interrupted": True, "kept": kept, "total": total}})
        self._output.error(
            f"interrupted; run it again to resume ({human(kept)} of {human(total)} kept)",
            code if isinstance(code, int) else FAILED,
        )

    def _summary(self) -> dict[str, int]:
        ended = list(self._ended)
        counts = {word: sum(status == word for _, status, _ in ended) for word in ("copied", "resumed", "skipped")}
        size = sum(size for _, status, size in ended if status != "skipped")
        return {**counts, "failed": self.failed, "bytes": size}


def _run(session: Session, config: TransferConfig, jobs: list[Job], tally: _Tally) -> None:
    engine = engine_for(config)
    scope = Scope()
    # A large file uses all connections; each small one uses a single connection.
    threshold = min(config.part_size, config.block_size)
    blocking = [job for job in jobs if job.is_blocking]
    large = [job for job in jobs if not job.is_blocking and (job.size or 0) > threshold]
    small = [job for job in jobs if not job.is_blocking and (job.size or 0) <= threshold]
    total = None if any(job.size is None for job in jobs) else sum(job.size or 0 for job in jobs)
    with session.output.progress("copying", total) as advance:

        def copy(job: Job, scope: Scope) -> None:
            _copy(job, Hooks(scope, advance), tally)

        for job in blocking:
            copy(job, scope)
        engine.map(copy, large, _LARGE_AT_ONCE, scope)
        engine.map(copy, small, config.max_connections, scope)


def _copy(job: Job, hooks: Hooks, tally: _Tally) -> None:
    """Run *job*, and count its outcome."""
    copied: deque[int] = deque()

    def count(size: int) -> None:
        copied.append(size)
        hooks.advance(size)

    tally.start(job)
    try:
        status = job.run(Hooks(hooks.scope, count))
    except ClientAuthenticationError:
        raise  # the others would fail as well
    except (AzureError, AZStorageTorchError, OSError, ValueError) as error:
        cause = error.__cause__
        if hooks.scope.is_cancelled or isinstance(cause, ClientAuthenticationError):
            raise
        if isinstance(error, BrokenPipeError) and job.target == "-":
            raise  # the reader of standard output is gone
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _DiskFull(
                f"{printable(job.target)}: {error.strerror}; the remaining files were not copied. Free some space "
                "and run it again to resume"
            ) from error
        tally.fail(job, error)
    else:
        tally.add(job, status, sum(copied))
