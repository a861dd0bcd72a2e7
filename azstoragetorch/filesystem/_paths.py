"""Paths of the file system: ``container/name``, with or without a protocol, an account, and a version.

A path is not a URL: nothing in it is percent-encoded, and ``?`` and ``#`` are part of a name. The one exception is a
version at its end, ``?versionid=2026-01-31T12:00:00.0000000Z`` or ``?snapshot=...``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from azstoragetorch._blob.url import BlobURL, parse_url

PROTOCOLS = ("azt", "az", "abfs", "abfss", "wasb", "wasbs")

_SCHEME = re.compile(rf"({'|'.join(PROTOCOLS)})(?:://|::)", re.IGNORECASE)
_OTHER_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
_VERSION = re.compile(r"\?(versionid|snapshot)=(\d{4}-\d\d-\d\dT[\d:.]+Z)")
_SIGNATURE = re.compile(r"[?&]sig=", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """What a path without its protocol leads to: the account, a container, or a blob or directory in it."""

    container: str = ""
    name: str = ""
    snapshot: str | None = None
    versionid: str | None = None

    @classmethod
    def of(cls, path: str) -> Place:
        """The place of *path*, which `strip` has returned."""
        container, _, name = path.partition("/")
        found = _VERSION.search(name)
        if found is None or found.end() != len(name):
            return cls(container, name)
        return cls(container, name[: found.start()], **{found[1]: found[2]})

    @property
    def folder(self) -> str:
        """The prefix of the names of the blobs in this directory."""
        return f"{self.name}/" if self.name else ""

    @property
    def path(self) -> str:
        """The path without a version."""
        return f"{self.container}/{self.name}" if self.name else self.container


def strip(path: Any) -> str:
    """*path* as ``container/name``, without protocol, account, and slashes at its end.

    Raises:
        ValueError: it has a SAS, or the protocol of another file system.
        TypeError: it is not a path.
    """
    return _split(path)[1]


def account_of(path: Any) -> BlobURL | None:
    """The account that *path* names, as ``abfss://container@account.dfs.core.windows.net/name`` does; else None.

    Raises:
        ValueError: the account is not valid.
    """
    host = _split(path)[0]
    return parse_url(f"abfss://container@{host}", argument="path") if host else None


def _split(path: Any) -> tuple[str, str]:
    """The host of the account, if *path* names one, and the path in it."""
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or os.PathLike, not {type(path).__name__}")
    if _SIGNATURE.search(text):
        raise ValueError("the path has a SAS: remove it, and pass it as the storage option sas_token")
    found = _SCHEME.match(text)
    if found is None:
        if _OTHER_SCHEME.match(text):
            scheme = text.partition(":")[0]
            raise ValueError(f"path: {scheme}:// is not a protocol of this file system: write azt://<container>/<name>")
        return "", text.lstrip("/").rstrip("/")
    authority, slash, rest = text[found.end() :].partition("/")
    container, at, host = authority.rpartition("@")
    if at:
        return host, f"{container}{slash}{rest}".rstrip("/")
    if "." in authority:  # a container has no dots, so this is the host of an account
        return authority, rest.rstrip("/")
    return "", f"{authority}{slash}{rest}".rstrip("/")


def parent(path: str) -> str:
    """The directory of *path*, which `strip` has returned; '' for a container."""
    return path.rpartition("/")[0].rstrip("/")


def ancestors(paths: Iterable[str], root: str) -> set[str]:
    """All directories between *root* and *paths*, which are below it; not *root* itself."""
    found: set[str] = set()
    shortest = len(root) + 1 if root else 0
    for path in paths:
        end = path.rfind("/")
        while end >= shortest and path[:end] not in found:
            found.add(path[:end])
            end = path.rfind("/", 0, end)
    found.discard(root)
    return found
