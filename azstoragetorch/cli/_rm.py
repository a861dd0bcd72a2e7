"""``azstoragetorch rm``: delete blobs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import click
from azure.core.exceptions import AzureError, ClientAuthenticationError

from azstoragetorch._blob.url import BlobURL
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import Scope
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._files.paths import printable
from azstoragetorch.cli._output import human
from azstoragetorch.cli._places import Glob, UrlOrGlob, blobs_of, folder_of
from azstoragetorch.cli._session import FAILED, NOT_FOUND, Session, common, examples, exit_code
from azstoragetorch.exceptions import AZStorageTorchError

_EXAMPLES = """
rm https://ACCOUNT.blob.core.windows.net/CONTAINER/old.pt
rm -r --dry-run https://ACCOUNT.blob.core.windows.net/CONTAINER/run-1
rm --yes 'https://ACCOUNT.blob.core.windows.net/CONTAINER/tmp/*.part'
"""


@dataclass(frozen=True)
class _Blob:
    url: BlobURL
    size: int
    etag: str

    @property
    def record(self) -> dict[str, Any]:
        return {"url": str(self.url), "bytes": self.size}


@click.command(epilog=examples(_EXAMPLES))
@click.argument("urls", metavar="URL...", nargs=-1, required=True, type=UrlOrGlob())
@click.option("--recursive", "-r", is_flag=True, help="Delete everything in the folder or container URL.")
@click.option("--dry-run", is_flag=True, help="Print what would be deleted.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@common
def rm(session: Session, urls: tuple[BlobURL | Glob, ...], recursive: bool, dry_run: bool, yes: bool) -> None:
    """Delete blobs, after asking. Without a terminal, --yes is required.

    In a URL, * matches any characters except a slash, and ** also matches slashes. A blob that was overwritten after
    it was listed is not deleted. A container is never deleted.
    """
    config = TransferConfig()
    found: dict[str, _Blob] = {}
    missing = 0
    for url in urls:
        blobs = _find(session, config, url, recursive)
        if not blobs:
            session.output.error(f"{url}: no blob found", NOT_FOUND)
            missing += 1
        found.update((str(blob.url), blob) for blob in blobs)
    doomed = list(found.values())
    if dry_run:
        for blob in doomed:
            session.output.record({**blob.record, "status": "planned"})
            session.output.line(f"would delete {printable(str(blob.url))}  ({human(blob.size)})")
    elif doomed:
        if not yes:
            size = human(sum(blob.size for blob in doomed))
            question = f"Permanently delete {len(doomed):,} blobs ({size})?"
            session.output.confirm(question, [str(blob.url) for blob in doomed])
        if _delete(session, config, doomed):
            raise click.exceptions.Exit(FAILED)
    if missing:
        raise click.exceptions.Exit(NOT_FOUND)


def _find(session: Session, config: TransferConfig, url: BlobURL | Glob, recursive: bool) -> list[_Blob]:
    if isinstance(url, Glob):
        container = session.access.container(url.url, config)
        blobs = list(url.blobs(container, recursive=recursive))
        return [_Blob(url.url.with_blob(name), size, etag) for name, size, etag in blobs]
    if recursive:
        container = session.access.container(url, config)
        blobs = [blob for page in container.pages(prefix=folder_of(url)) for blob in blobs_of(page)]
        if blobs or url.blob[-1:] in ("", "/"):
            return [_Blob(url.with_blob(name), size, etag) for name, size, etag in blobs]
    elif url.blob[-1:] in ("", "/"):
        raise click.UsageError(f"{url} is a folder or container: add --recursive")
    version = session.access.blob(url, config).version()
    return [_Blob(url, version.size, version.etag)] if version is not None else []


def _delete(session: Session, config: TransferConfig, doomed: list[_Blob]) -> int:
    """Delete *doomed*; returns how many could not be deleted."""
    output = session.output
    failed: deque[_Blob] = deque()

    def delete(blob: _Blob, _scope: Scope) -> None:
        try:
            session.access.blob(blob.url, config).delete(etag=blob.etag)
        except ClientAuthenticationError:
            raise  # the others would fail as well
        except (AzureError, AZStorageTorchError, ValueError) as error:
            failed.append(blob)
            output.record({**blob.record, "status": "failed"})
            output.error(f"{blob.url}: {error}", exit_code(error))
        else:
            output.record({**blob.record, "status": "deleted"})
        advance(1)

    with output.progress("deleting", len(doomed), unit="blobs") as advance:
        engine_for(config).map(delete, doomed, config.max_connections)
    deleted = len(doomed) - len(failed)
    output.note(f"{deleted:,} deleted" + (f", {len(failed):,} failed" if failed else ""))
    return len(failed)
