"""``azstoragetorch manifest``: make, show, verify, and compare manifests, which store a listing."""

from __future__ import annotations

import click

from azstoragetorch._blob.url import BlobURL
from azstoragetorch._files.paths import printable
from azstoragetorch.cli._access import with_sas
from azstoragetorch.cli._output import human
from azstoragetorch.cli._session import FAILED, Session, Url, common, examples
from azstoragetorch.manifest import ManifestComparison, ManifestInfo

_DATA = "https://ACCOUNT.blob.core.windows.net/CONTAINER"
_MANIFEST = f"{_DATA}/manifests/2026-11-27"
_MARKS = {"added": "+", "removed": "-", "changed": "~"}


@click.group()
def manifest() -> None:
    """Store listings as manifests, so that training jobs do not list. Needs pyarrow."""


@manifest.command(
    epilog=examples(f"manifest make {_DATA} {_MANIFEST}\nmanifest make {_DATA} {_MANIFEST} --prefix train/")
)
@click.argument("url", type=Url())
@click.argument("target", type=Url())
@click.option("--prefix", default="", help="List only names that start with this prefix.")
@click.option("--inventory", type=Url(), help="Read this report of Blob Inventory (RULE-manifest.json); do not list.")
@click.option("--overwrite", is_flag=True, help="Replace the manifest in the folder TARGET.")
@common
def make(
    session: Session, url: BlobURL, target: BlobURL, prefix: str, inventory: BlobURL | None, overwrite: bool
) -> None:
    """List the container URL and store the result in the folder TARGET.

    The manifest appears when it is complete. A dated folder for each manifest is better than --overwrite: a job that
    reads a manifest while it is replaced fails.
    """
    from azstoragetorch.manifest import make_manifest

    credential = session.access.for_both(url, target)
    with session.output.progress("listing", None, unit="blobs") as bar:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            bar(count - done)
            done = count

        info = make_manifest(
            with_sas(url),
            with_sas(target),
            prefix=prefix,
            inventory_url=None if inventory is None else with_sas(inventory),
            overwrite=overwrite,
            progress=advance,
            credential=credential,
        )
    _print(session, info)


@manifest.command(epilog=examples(f"manifest show {_MANIFEST}"))
@click.argument("target", type=Url())
@common
def show(session: Session, target: BlobURL) -> None:
    """Show what the manifest in the folder TARGET lists, and when it was made. Takes one request."""
    from azstoragetorch.manifest import describe_manifest

    _print(session, describe_manifest(with_sas(target), credential=session.access.credential(target)))


@manifest.command(epilog=examples(f"manifest verify {_MANIFEST}\nmanifest verify {_MANIFEST} --no-listing"))
@click.argument("target", type=Url())
@click.option("--no-listing", is_flag=True, help="Check the manifest itself, and do not list the container.")
@common
def verify(session: Session, target: BlobURL, no_listing: bool) -> None:
    """Check that the manifest in the folder TARGET is complete and undamaged, and that the container has not changed.

    Prints blobs that were added (+), removed (-), or overwritten (~) since. The exit code is 1 if there are any.
    """
    from azstoragetorch.manifest import compare_manifest, verify_manifest

    credential = session.access.credential(target)
    info = verify_manifest(with_sas(target), credential=credential)
    session.output.note(f"{info.count:,} blobs, {human(info.size)}: the manifest is complete")
    if not no_listing:
        _report(session, compare_manifest(with_sas(target), credential=credential), "the container")


@manifest.command(epilog=examples(f"manifest diff {_MANIFEST} {_MANIFEST[:-2]}28"))
@click.argument("first", type=Url())
@click.argument("second", type=Url())
@common
def diff(session: Session, first: BlobURL, second: BlobURL) -> None:
    """Print blobs that only the manifest SECOND has (+), that only FIRST has (-), or whose ETag differs (~).

    The exit code is 1 if there are any.
    """
    from azstoragetorch.manifest import compare_manifest

    credential = session.access.for_both(first, second)
    _report(session, compare_manifest(with_sas(first), with_sas(second), credential=credential), "the second")


def _print(session: Session, info: ManifestInfo) -> None:
    session.output.record(vars(info))
    session.output.line(
        f"{info.count:,} blobs, {human(info.size)}, of {info.container_url}"
        + (f" below {printable(info.prefix)!r}" if info.prefix else "")
        + f", listed at {info.made}, digest {info.digest}"
    )


def _report(session: Session, found: ManifestComparison, what: str) -> None:
    for change in found.changes:
        session.output.record({"change": change.kind, "name": change.name})
        session.output.line(f"{_MARKS[change.kind]} {printable(change.name)}")
    counts = {"added": found.added, "removed": found.removed, "changed": found.changed}
    session.output.record({"summary": counts})
    more = sum(counts.values()) - len(found.changes)
    session.output.note(
        f"{what} has the same blobs"
        if found.is_equal
        else f"{found.added:,} added, {found.removed:,} removed, {found.changed:,} changed"
        + (f"; {more:,} of them are not printed" if more else "")
    )
    if not found.is_equal:
        raise click.exceptions.Exit(FAILED)
