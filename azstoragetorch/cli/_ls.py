"""``azstoragetorch ls``: what is in a container or folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from azstoragetorch._blob.client import ContainerClient
from azstoragetorch._blob.url import BlobURL, url_of_name
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._files.places import printable
from azstoragetorch.cli._output import human
from azstoragetorch.cli._session import NOT_FOUND, Session, Url, common


@click.command()
@click.argument("url", type=Url())
@click.option("--recursive", "-r", is_flag=True, help="Everything below, not one level.")
@click.option("--long", "-l", "is_long", is_flag=True, help="Size in bytes, ETag and name.")
@click.option("--human", "-H", "is_human", is_flag=True, help="Like --long, with sizes such as 1.5 MiB.")
@click.option("--prefix", default="", help="Only names that begin so, below URL.")
@common
def ls(session: Session, url: BlobURL, recursive: bool, is_long: bool, is_human: bool, prefix: str) -> None:
    """List the blobs and folders at URL: a container, a folder in it, or one blob.

    Names are relative to the container, one a line, folders end with a slash. Control characters in names are
    escaped; --json has them exact.
    """
    container = session.access.container(url, TransferConfig())
    blobs = folders = size = 0
    for entry in _entries(container, url.blob, prefix, "" if recursive else "/"):
        session.output.record(entry)
        if "prefix" in entry:
            folders += 1
            name, columns = entry["prefix"], ("-", "-")
        else:
            blobs += 1
            size += entry["size"]
            name = entry["name"]
            columns = (human(entry["size"]) if is_human else str(entry["size"]), entry["etag"])
        wide = f"{columns[0]:>14}  {columns[1]:<21}  " if is_long or is_human else ""
        session.output.line(wide + printable(name))
    if not blobs and not folders:
        if url.blob or prefix:
            session.output.error(f"{url}: nothing here", NOT_FOUND)
            raise click.exceptions.Exit(NOT_FOUND)
        session.output.note("the container is empty")
    if is_long or is_human:
        session.output.note(f"{blobs:,} blobs, {human(size)}" + (f", {folders:,} folders" if folders else ""))


def _entries(container: ContainerClient, path: str, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
    if path and not path.endswith("/"):
        if not prefix:
            # The blob of exactly this name comes first among all that begin so.
            for page in container.pages(prefix=path, delimiter="/"):
                if path in page.names[:1]:
                    yield _blob(container, page.names[0], page.sizes[0], page.etags[0])
                break
        path += "/"
    for page in container.pages(prefix=path + prefix, delimiter=delimiter):
        found = [
            *({"prefix": name} for name in page.prefixes),
            *(_blob(container, *blob) for blob in zip(page.names, page.sizes, page.etags, strict=True)),
        ]
        yield from sorted(found, key=lambda entry: str(entry.get("prefix", entry.get("name"))))


def _blob(container: ContainerClient, name: str, size: int, etag: str) -> dict[str, Any]:
    return {"name": name, "size": size, "etag": etag, "url": url_of_name(str(container.url), name)}
