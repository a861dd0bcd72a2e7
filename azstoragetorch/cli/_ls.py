"""``azstoragetorch ls``: list a container or folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from azstoragetorch._blob.client import ContainerClient, Page
from azstoragetorch._blob.url import BlobURL, url_of_name
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._files.paths import printable
from azstoragetorch.cli._output import date_of, human
from azstoragetorch.cli._places import Glob, UrlOrGlob
from azstoragetorch.cli._session import NOT_FOUND, Session, common, examples

_EXAMPLES = """
ls https://ACCOUNT.blob.core.windows.net/CONTAINER
ls -H https://ACCOUNT.blob.core.windows.net/CONTAINER/train
ls -l 'https://ACCOUNT.blob.core.windows.net/CONTAINER/train/*.tar'
ls -r --json https://ACCOUNT.blob.core.windows.net/CONTAINER --prefix train/
"""


@click.command(epilog=examples(_EXAMPLES))
@click.argument("url", type=UrlOrGlob())
@click.option("--recursive", "-r", is_flag=True, help="List everything below URL, not only one level.")
@click.option("--long", "-l", "is_long", is_flag=True, help="Show sizes in bytes, times in UTC, and ETags.")
@click.option("--human", "-H", "is_human", is_flag=True, help="Like --long, with sizes such as 1.5 MiB.")
@click.option("--prefix", default="", help="List only names below URL that start with this prefix.")
@common
def ls(session: Session, url: BlobURL | Glob, recursive: bool, is_long: bool, is_human: bool, prefix: str) -> None:
    """List the blobs and folders at URL: a container, a folder in it, or one blob.

    In the URL, * matches any characters except a slash, and ** also matches slashes.

    Prints one name per line, relative to the container. Names of folders end with a slash. Control characters in names
    are escaped, except with --json.
    """
    place = url.url if isinstance(url, Glob) else url
    listing = _Listing(session.access.container(place, TransferConfig()), is_long or is_human)
    if isinstance(url, Glob):
        if prefix:
            raise click.UsageError(
                f"--prefix cannot be used with a pattern, which {url} is: add the prefix to the pattern"
            )
        entries = listing.matching(url, recursive=recursive)
    else:
        entries = listing.below(url.blob, prefix, "" if recursive else "/")
    blobs = folders = size = 0
    for entry in entries:
        session.output.record(entry)
        blobs += "name" in entry
        folders += "prefix" in entry
        size += entry.get("size", 0)
        session.output.line(_row(entry, is_human=is_human) if listing.has_dates else _name(entry))
    if not blobs and not folders:
        if place.blob or prefix:
            session.output.error(f"{url}: no blob or folder found", NOT_FOUND)
            raise click.exceptions.Exit(NOT_FOUND)
        session.output.note("the container is empty")
    if listing.has_dates:
        session.output.note(f"{blobs:,} blobs, {human(size)}" + (f", {folders:,} folders" if folders else ""))


def _name(entry: dict[str, Any]) -> str:
    return printable(entry.get("name") or entry["prefix"])


def _row(entry: dict[str, Any], *, is_human: bool) -> str:
    if "prefix" in entry:
        size, date, etag = "-", "-", "-"
    else:
        size = human(entry["size"]) if is_human else str(entry["size"])
        date, etag = entry["modified"], entry["etag"]
    return f"{size:>14}  {date:<20}  {etag:<21}  {_name(entry)}"


@dataclass(frozen=True)
class _Listing:
    """The entries of a container: blobs, and folders if only one level is listed."""

    container: ContainerClient
    has_dates: bool

    def below(self, path: str, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        """The entries of the folder *path*, and the blob with that name."""
        if path and not path.endswith("/"):
            if not prefix:
                # Of all names that start with *path*, the equal one is listed first.
                for page in self._pages(path, "/"):
                    if path in page.names[:1]:
                        yield next(self._blobs(page))
                    break
            path += "/"
        for page in self._pages(path + prefix, delimiter):
            found = [*({"prefix": name} for name in page.prefixes), *self._blobs(page)]
            yield from sorted(found, key=lambda entry: str(entry.get("prefix", entry.get("name"))))

    def matching(self, glob: Glob, *, recursive: bool) -> Iterator[dict[str, Any]]:
        """The blobs that match *glob*."""
        for page in glob.pages(self.container, recursive=recursive, with_modified=self.has_dates):
            yield from (entry for entry in self._blobs(page) if glob.matches(entry["name"], recursive=recursive))

    def _pages(self, prefix: str, delimiter: str) -> Iterator[Page]:
        return self.container.pages(prefix=prefix, delimiter=delimiter, with_modified=self.has_dates)

    def _blobs(self, page: Page) -> Iterator[dict[str, Any]]:
        dates = page.modified or [""] * len(page.names)
        for name, size, etag, modified in zip(page.names, page.sizes, page.etags, dates, strict=True):
            date = {"modified": date_of(modified)} if self.has_dates else {}
            url = url_of_name(str(self.container.url), name)
            yield {"name": name, "size": size, "etag": etag, "url": url, **date}
