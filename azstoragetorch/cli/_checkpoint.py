"""``azstoragetorch checkpoint``: list, look into, check, convert and remove distributed checkpoints."""

from __future__ import annotations

import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azstoragetorch._blob.url import BlobURL, parse_blob_url
from azstoragetorch._engine.config import GiB
from azstoragetorch._files.places import printable
from azstoragetorch.cli._output import Bar, human
from azstoragetorch.cli._session import FAILED, Session, Url, common
from azstoragetorch.exceptions import CheckpointError
from azstoragetorch.io import BlobIO

if TYPE_CHECKING:
    from azstoragetorch.checkpoint import Progress

_AT_ONCE = 1 * GiB  # bytes of entries that are held while a checkpoint is verified

trust = click.option("--trust", is_flag=True, help="Unpickle entries that are not tensors, which may run any code.")


@click.group()
def checkpoint() -> None:
    """Distributed checkpoints (torch.distributed.checkpoint)."""


@checkpoint.command()
@click.argument("url", type=Url())
@click.option("--latest", is_flag=True, help="Only the last one.")
@common
def ls(session: Session, url: BlobURL, latest: bool) -> None:
    """List the complete checkpoints in the folders of URL, oldest first."""
    from azstoragetorch.checkpoint import list_checkpoints

    found = list_checkpoints(str(url), credential=session.access.credential(url))
    for place in found[-1:] if latest else found:
        session.output.record({"url": place})
        session.output.line(place)
    if not found:
        session.output.note("no complete checkpoint is here")


@checkpoint.command()
@click.argument("url", type=Url())
@common
def inspect(session: Session, url: BlobURL) -> None:
    """Show the entries of the checkpoint in the folder URL: types, shapes, bytes. Reads its metadata only."""
    from azstoragetorch.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(str(url), credential=session.access.credential(url))
    rows = []
    for entry in found.entries:
        kind = str(entry.dtype).removeprefix("torch.") if entry.dtype is not None else "object"
        shape = list(entry.shape) if entry.shape is not None else None
        session.output.record(
            {"key": entry.key, "type": kind, "shape": shape, "shards": entry.shards, "bytes": entry.nbytes}
        )
        rows.append([entry.key, kind, "x".join(map(str, shape or [])), str(entry.shards), f"{entry.nbytes:,}"])
    session.output.line(str(found.url))
    session.output.table("", ["key", "type", "shape", "shards", "bytes"], rows)
    summary = {"url": found.url, "entries": len(rows), "bytes": found.nbytes, "blobs": found.blobs}
    session.output.record({"summary": summary})
    session.output.note(f"{len(rows):,} entries, {human(found.nbytes)}, {found.blobs:,} data blobs")


@checkpoint.command()
@click.argument("url", type=Url())
@trust
@common
def verify(session: Session, url: BlobURL, trust: bool) -> None:
    """Read every entry of the checkpoint in the folder URL, and say which cannot be loaded.

    Missing, truncated and overwritten data blobs show, and entries that do not decode. The exit code is 1 if there is
    any. Entries that only --trust would unpickle are reported as unchecked.
    """
    from azstoragetorch.checkpoint import inspect_checkpoint, load_keys

    credential = session.access.credential(url)
    found = inspect_checkpoint(str(url), credential=credential)
    sizes = {entry.key: entry.nbytes for entry in found.entries}
    broken: dict[str, str] = {}
    unchecked: dict[str, str] = {}
    with session.output.progress("verifying", found.nbytes) as advance:

        def check(keys: list[str]) -> None:
            told = 0

            def report(done: int, _planned: int) -> None:
                nonlocal told
                advance(done - told)
                told = done

            try:
                load_keys(str(url), keys, weights_only=not trust, credential=credential, progress=report)
            except (CheckpointError, pickle.UnpicklingError) as error:
                if len(keys) > 1:
                    advance(-told)
                    for key in keys:  # one by one, to name those that are at fault
                        check([key])
                    return
                text = str(error.__cause__ or error).split("\n", 1)[0]
                is_refused = _needs_trust(error) and not trust
                (unchecked if is_refused else broken)[keys[0]] = text
            advance(sum(sizes[key] for key in keys) - told)

        for keys in _batches(sizes):
            check(keys)
    for word, entries in (("broken", broken), ("unchecked", unchecked)):
        for key, text in entries.items():
            session.output.record({"key": key, "status": word, "reason": text})
            session.output.line(f"{word}: {printable(key)}: {printable(text)}")
    good = len(sizes) - len(broken) - len(unchecked)
    summary = {"url": found.url, "good": good, "broken": len(broken), "unchecked": len(unchecked)}
    session.output.record({"summary": summary})
    session.output.line(f"{good:,} good, {len(broken):,} broken, {len(unchecked):,} unchecked, {human(found.nbytes)}")
    if broken:
        raise click.exceptions.Exit(FAILED)


@checkpoint.command()
@click.argument("url", type=Url())
@click.argument("target")
@click.option("--key", "keys", multiple=True, help="Only this entry or what is below it; may be repeated.")
@trust
@common
def export(session: Session, url: BlobURL, target: str, keys: tuple[str, ...], trust: bool) -> None:
    """Write the checkpoint in the folder URL as TARGET, a file or the URL of a blob that torch.load reads.

    The state dict has to fit into memory. TARGET is replaced when all is written, not before.
    """
    import torch

    from azstoragetorch.checkpoint import load_keys

    place = _place(target)
    credential = session.access.credential(url)
    with session.output.progress("reading", None) as bar:
        try:
            state = load_keys(
                str(url),
                keys or None,
                weights_only=not trust,
                credential=credential,
                progress=_steps(bar),
            )
        except KeyError as error:
            raise FileNotFoundError(str(error.args[0])) from None
        except (CheckpointError, pickle.UnpicklingError) as error:
            if not _needs_trust(error):
                raise
            raise CheckpointError(_untrusted(str(url), error.__cause__ or error)) from None
    session.output.note(f"writing {target if isinstance(place, Path) else place}")
    with session.output.progress("writing", bar.total) as bar:
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".azstoragetorch-") as folder:
                unfinished = Path(folder) / "state"
                with unfinished.open("wb") as file:
                    torch.save(state, _Watched(file, bar))
                unfinished.replace(place)
        else:
            with BlobIO(str(place), "wb", credential=session.access.credential(place)) as blob:
                torch.save(state, _Watched(blob, bar))
    session.output.record({"url": str(url), "target": str(place), "entries": len(state)})


@checkpoint.command("import")
@click.argument("source")
@click.argument("url", type=Url())
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@trust
@common
def import_(session: Session, source: str, url: BlobURL, overwrite: bool, trust: bool) -> None:
    """Write SOURCE, a file or the URL of a blob that torch.save wrote, as a checkpoint in the folder URL.

    The state dict has to fit into memory, unless SOURCE is a file: that is mapped.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    from azstoragetorch.checkpoint import BlobStorageWriter

    place = _place(source)
    try:
        if isinstance(place, Path):
            state = torch.load(place, map_location="cpu", mmap=True, weights_only=not trust)
        else:
            with (
                BlobIO(str(place), "rb", credential=session.access.credential(place)) as blob,
                session.output.progress("reading", blob.size) as bar,
            ):
                state = torch.load(_Watched(blob, bar), map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_untrusted(str(place), error)) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{place} holds a {type(state).__name__}; a checkpoint is made from a dict")
    with session.output.progress("writing", None) as bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # that is the intent
        writer = BlobStorageWriter(
            str(url), credential=session.access.credential(url), overwrite=overwrite, progress=_steps(bar)
        )
        try:
            save(state, storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            raise next(iter(_causes(error)), CheckpointError(str(error))) from None
    session.output.note(f"{len(state):,} entries are in {url} now")
    session.output.record({"source": str(place), "url": str(url), "entries": len(state)})


@checkpoint.command()
@click.argument("url", type=Url())
@click.option("--keep", type=click.IntRange(1), help="Delete all complete checkpoints but the last so many.")
@click.option("--incomplete", is_flag=True, help="Delete what interrupted saves left.")
@click.option(
    "--min-age", default=24.0, show_default=True, help="Hours; younger leftovers may belong to a save in progress."
)
@click.option("--dry-run", is_flag=True, help="Say what --keep would delete.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
def prune(
    session: Session, url: BlobURL, keep: int | None, incomplete: bool, min_age: float, dry_run: bool, yes: bool
) -> None:
    """Delete old checkpoints in the folders of URL, or what interrupted saves left there."""
    from azstoragetorch.checkpoint import clean, delete_checkpoint, list_checkpoints

    if keep is None and not incomplete:
        raise click.UsageError("say what to delete: --keep N, --incomplete, or both")
    if dry_run and incomplete:
        raise click.UsageError("--dry-run is for --keep")
    credential = session.access.credential(url)
    doomed = list_checkpoints(str(url), credential=credential)[:-keep] if keep is not None else []
    if (doomed or incomplete) and not dry_run and not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("this deletes for good: add --yes")
        for place in doomed:
            session.output.note(place)
        click.confirm("Delete for good?", abort=True, err=True)
    with session.output.progress("deleting", len(doomed), unit="checkpoints") as advance:
        for place in doomed:
            if not dry_run:
                delete_checkpoint(place, credential=credential)
            advance(1)
            session.output.record({"url": place, "status": "planned" if dry_run else "deleted"})
            session.output.line(f"{'would delete' if dry_run else 'deleted'} {place}")
    leftovers: list[str] = []
    if incomplete:
        with session.output.progress("deleting what is incomplete", None, unit="blobs"):
            leftovers = clean(str(url), min_age=min_age * 3600, credential=credential)
        for place in leftovers:
            session.output.record({"url": place, "status": "deleted"})
            session.output.line(f"deleted {place}")
    if not doomed and not leftovers:
        session.output.note("there is nothing to delete")


def _place(text: str) -> Path | BlobURL:
    try:
        return parse_blob_url(text) if "://" in text else Path(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _batches(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Keys of about `_AT_ONCE` bytes at a time."""
    batch: list[str] = []
    held = 0
    for key, size in sizes.items():
        if batch and held + size > _AT_ONCE:
            yield batch
            batch, held = [], 0
        batch.append(key)
        held += size
    if batch:
        yield batch


class _Watched:
    """A file that reports to *bar* what is read from it and written to it."""

    def __init__(self, file: Any, bar: Bar) -> None:
        self._file = file
        self._bar = bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._bar(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        self._bar(count)
        return count

    def write(self, data: Any) -> int:
        count: int = self._file.write(data)
        self._bar(count)
        return count


def _steps(bar: Bar) -> Progress:
    """Reports to *bar* how far a save or load is."""
    before = 0

    def report(done: int, planned: int) -> None:
        nonlocal before
        bar.plan(planned)
        bar(done - before)
        before = done

    return report


def _causes(error: Any) -> Iterable[Exception]:
    """What the ranks of a failed save or load say, without torch's wrapping."""
    return (found[0] for found in error.failures.values() if isinstance(found[0], Exception))


def _needs_trust(error: BaseException) -> bool:
    """Whether *error* says that `torch.load` refused something with ``weights_only=True``."""
    return isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError)


def _untrusted(place: str, error: BaseException) -> str:
    first = str(error).split("\n", 1)[0]
    return f"{place}: {first} If you trust who wrote it, add --trust: it may then run what is in there."
