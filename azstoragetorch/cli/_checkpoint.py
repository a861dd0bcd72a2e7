"""``azstoragetorch checkpoint``: list, inspect, verify, convert, and delete distributed checkpoints."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator

import click

from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import GiB, TransferConfig
from azstoragetorch._files.paths import printable
from azstoragetorch.cli._convert import export, import_, needs_trust, trust
from azstoragetorch.cli._output import date_of, human
from azstoragetorch.cli._places import folder_of
from azstoragetorch.cli._session import FAILED, Session, Url, common, examples
from azstoragetorch.exceptions import CheckpointError

_RUN = "https://ACCOUNT.blob.core.windows.net/CONTAINER/run"
_AT_ONCE = 1 * GiB  # bytes of entries in memory while a checkpoint is verified


@click.group()
def checkpoint() -> None:
    """Manage distributed checkpoints (torch.distributed.checkpoint)."""


checkpoint.add_command(export)
checkpoint.add_command(import_)


@checkpoint.command(epilog=examples(f"checkpoint ls {_RUN}\ncheckpoint ls -H {_RUN}\ncheckpoint ls --latest {_RUN}"))
@click.argument("url", type=Url())
@click.option("--latest", is_flag=True, help="List only the newest one.")
@click.option("--long", "-l", "is_long", is_flag=True, help="Show sizes in bytes and save times in UTC.")
@click.option("--human", "-H", "is_human", is_flag=True, help="Like --long, with sizes such as 1.5 GiB.")
@common
def ls(session: Session, url: BlobURL, latest: bool, is_long: bool, is_human: bool) -> None:
    """List the complete checkpoints in the folders of URL, oldest first."""
    from azstoragetorch.checkpoint import list_checkpoints

    found = list_checkpoints(str(url), credential=session.access.credential(url))
    facts = _facts(session, url) if found and (is_long or is_human) else {}
    for place in found[-1:] if latest else found:
        size, saved = facts.get(parse_url(place).blob.rstrip("/"), (0, "-"))
        session.output.record({"url": place, **({"bytes": size, "saved": saved} if facts else {})})
        wide = f"{human(size) if is_human else size:>14}  {saved:<20}  " if facts else ""
        session.output.line(wide + place)
    if not found:
        session.output.note(f"no complete checkpoint found in {url}")


def _facts(session: Session, url: BlobURL) -> dict[str, tuple[int, str]]:
    """By name of each folder in *url*: the bytes of its blobs, and the time at which its metadata was written."""
    container = session.access.container(url, TransferConfig())
    prefix = folder_of(url)
    sizes: Counter[str] = Counter()
    dates: dict[str, str] = {}
    for page in container.pages(prefix=prefix, with_modified=True):
        for name, size, modified in zip(page.names, page.sizes, page.modified, strict=True):
            folder, _, rest = name[len(prefix) :].partition("/")
            sizes[prefix + folder] += size
            if rest == ".metadata":
                dates[prefix + folder] = date_of(modified)
    return {folder: (sizes[folder], dates.get(folder, "-")) for folder in sizes}


@checkpoint.command(epilog=examples(f"checkpoint inspect {_RUN}/step-1000"))
@click.argument("url", type=Url())
@common
def inspect(session: Session, url: BlobURL) -> None:
    """Show the entries of the checkpoint in the folder URL: types, shapes, and sizes.

    Reads only the metadata of the checkpoint.
    """
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
    session.output.record({"summary": {**summary, "digests": found.has_digests}})
    digests = ", with digests" if found.has_digests else ""
    session.output.note(f"{len(rows):,} entries, {human(found.nbytes)}, {found.blobs:,} data blobs{digests}")


@checkpoint.command(epilog=examples(f"checkpoint verify {_RUN}/step-1000"))
@click.argument("url", type=Url())
@trust
@common
def verify(session: Session, url: BlobURL, trust: bool) -> None:
    """Read every entry of the checkpoint in the folder URL, and report those that are damaged or cannot be loaded.

    If the checkpoint was saved with digests, every entry is compared with its digest. Detects missing, truncated, and
    overwritten data blobs in any case, and entries that cannot be decoded. The exit code is 1 if any entry is broken.
    Entries without a digest that would be unpickled only with --trust are reported as unchecked.
    """
    from azstoragetorch.checkpoint import inspect_checkpoint, load_keys

    credential = session.access.credential(url)
    found = inspect_checkpoint(str(url), credential=credential)
    sizes = {entry.key: entry.nbytes for entry in found.entries}
    broken: dict[str, str] = {}
    unchecked: dict[str, str] = {}
    compares = True
    try:
        load_keys(str(url), [], credential=credential, verify=True)
    except CheckpointError as error:
        compares = False
        session.output.note(f"entries are read, but not compared with what was saved: {error}")
    with session.output.progress("verifying", found.nbytes) as advance:

        def check(keys: list[str]) -> None:
            told = 0

            def report(done: int, _planned: int) -> None:
                nonlocal told
                advance(done - told)
                told = done

            try:
                load_keys(
                    str(url),
                    keys,
                    weights_only=not trust,
                    credential=credential,
                    progress=report,
                    verify=compares,
                )
            except (CheckpointError, pickle.UnpicklingError) as error:
                if len(keys) > 1:
                    advance(-told)
                    for key in keys:  # one by one, to find the broken ones
                        check([key])
                    return
                text = str(error.__cause__ or error).split("\n", 1)[0]
                is_refused = needs_trust(error) and not trust
                if not (is_refused and compares):  # it is compared before it is unpickled
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
    session.output.record({"summary": {**summary, "compared": compares}})
    counts = f"{good:,} good, {len(broken):,} broken, {len(unchecked):,} unchecked, {human(found.nbytes)}"
    session.output.line(counts + (", compared with the digests of the save" if compares else ""))
    if broken:
        raise click.exceptions.Exit(FAILED)


@checkpoint.command(
    epilog=examples(f"checkpoint prune {_RUN} --keep 3 --dry-run\ncheckpoint prune {_RUN} --incomplete --yes")
)
@click.argument("url", type=Url())
@click.option(
    "--keep", type=click.IntRange(1), help="Keep this many of the newest complete checkpoints, and delete the others."
)
@click.option("--incomplete", is_flag=True, help="Delete the data of interrupted saves.")
@click.option(
    "--min-age",
    metavar="HOURS",
    default=24.0,
    show_default=True,
    help="With --incomplete: keep younger data, which may belong to a save in progress.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be deleted.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@common
def prune(
    session: Session, url: BlobURL, keep: int | None, incomplete: bool, min_age: float, dry_run: bool, yes: bool
) -> None:
    """Delete old checkpoints in the folders of URL, or the data of interrupted saves."""
    from azstoragetorch.checkpoint import clean, delete_checkpoint, keep_last

    if keep is None and not incomplete:
        raise click.UsageError("nothing to delete was chosen: pass --keep N, --incomplete, or both")
    place, credential = str(url), session.access.credential(url)
    min_seconds = min_age * 3600
    doomed = keep_last(place, keep, dry_run=True, credential=credential) if keep is not None else []
    leftovers = clean(place, min_age=min_seconds, dry_run=True, credential=credential) if incomplete else []
    if (doomed or leftovers) and not dry_run and not yes:
        session.output.confirm("Permanently delete these?", [*doomed, *leftovers])
    with session.output.progress("deleting", len(doomed), unit="checkpoints") as advance:
        for folder in doomed:
            if not dry_run:
                delete_checkpoint(folder, credential=credential)
            advance(1)
            _say_deleted(session, folder, dry_run)
    if leftovers and not dry_run:
        with session.output.progress("deleting incomplete saves", None, unit="blobs"):
            leftovers = clean(place, min_age=min_seconds, credential=credential)
    for blob in leftovers:
        _say_deleted(session, blob, dry_run)
    if not doomed and not leftovers:
        session.output.note("nothing to delete")


def _say_deleted(session: Session, place: str, is_planned: bool) -> None:
    session.output.record({"url": place, "status": "planned" if is_planned else "deleted"})
    session.output.line(f"{'would delete' if is_planned else 'deleted'} {place}")


def _batches(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Batches of keys with about `_AT_ONCE` bytes each."""
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
