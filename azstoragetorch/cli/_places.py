"""The forms of SOURCE, TARGET, and URL: a path, a URL, a URL with ``*``, or ``-``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import click

from azstoragetorch._blob.client import ContainerClient, Page
from azstoragetorch._blob.url import BlobURL, parse_url


class Standard(Enum):
    """``-``: standard input as a source, standard output as a target."""

    STREAM = "-"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class LocalPath:
    """A path on this machine."""

    path: Path
    is_folder: bool
    """The argument ends with a slash."""

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Glob:
    """The blobs of a container whose names match a pattern, which is the blob name in *url*."""

    url: BlobURL

    def __str__(self) -> str:
        return str(self.url).replace("%2A", "*")

    @property
    def folder(self) -> str:
        """The folder that names are relative to: everything up to the last slash before the first ``*``."""
        before = self.url.blob.partition("*")[0]
        return before[: before.rfind("/") + 1]

    def matches(self, name: str, *, recursive: bool = False) -> bool:
        """Whether the blob *name* matches or, with *recursive*, is below a match."""
        return _pattern(self.url.blob, recursive=recursive).fullmatch(name) is not None

    def pages(
        self, container: ContainerClient, *, recursive: bool = False, with_modified: bool = False
    ) -> Iterator[Page]:
        """Pages of a listing that contains all matching blobs, and possibly others."""
        before, _, rest = self.url.blob.partition("*")
        is_one_level = "/" not in rest and not rest.startswith("*") and "**" not in rest and not recursive
        return container.pages(prefix=before, delimiter="/" if is_one_level else "", with_modified=with_modified)

    def blobs(self, container: ContainerClient, *, recursive: bool = False) -> Iterator[tuple[str, int, str]]:
        """Names, sizes, and ETags of the matching blobs."""
        for page in self.pages(container, recursive=recursive):
            yield from (blob for blob in blobs_of(page) if self.matches(blob[0], recursive=recursive))


CopySource: TypeAlias = "BlobURL | Glob | LocalPath | Standard"
Target: TypeAlias = "BlobURL | LocalPath | Standard"


class Place(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """A path, the URL of a blob, folder, or container, or ``-``; as a source, also a URL with ``*``."""

    name = "path or url"

    def __init__(self, *, is_source: bool) -> None:
        self._is_source = is_source
        self._stream = ("-", "/dev/stdin" if is_source else "/dev/stdout")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> CopySource:
        """Parse *value*."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if "://" not in value:
            is_folder = value.endswith("/") or (os.name == "nt" and value.endswith("\\"))
            return Standard.STREAM if value in self._stream else LocalPath(Path(value), is_folder)
        try:
            url = parse_url(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return Glob(url) if self._is_source and is_glob(value) else url


class UrlOrGlob(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """The URL of a blob, folder, or container, or a URL with ``*``."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> BlobURL | Glob:
        """Parse *value*."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            url = parse_url(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return Glob(url) if is_glob(value) else url


def is_glob(text: str) -> bool:
    """Whether the URL *text* has a ``*`` that is not percent-encoded."""
    return "*" in text.partition("?")[0]


def blobs_of(page: Page) -> list[tuple[str, int, str]]:
    """Names, sizes, and ETags of the blobs of *page*."""
    return list(zip(page.names, page.sizes, page.etags, strict=True))


def folder_of(url: BlobURL) -> str:
    """The prefix of the names of the blobs in the folder or container *url*."""
    return f"{url.blob}/" if url.blob and not url.blob.endswith("/") else url.blob


@lru_cache(maxsize=16)
def _pattern(glob: str, *, recursive: bool) -> re.Pattern[str]:
    """``*`` matches any characters except a slash, and ``**`` matches any characters."""
    parts = (
        ".*" if part == "**" else "[^/]*" if part == "*" else re.escape(part) for part in re.split(r"(\*\*?)", glob)
    )
    return re.compile("".join(parts) + ("(?:/.*)?" if recursive else ""), re.DOTALL)
