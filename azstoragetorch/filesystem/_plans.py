"""Which files a `get`, `put`, or `copy` transfers, by the rules of fsspec, before any of them is transferred.

fsspec's own methods find the pairs of source and target one by one, and transfer each at once. They are called here on
a stand-in for the file system that only notes the pairs, so the rules are fsspec's, and the transfers are concurrent.
"""

from __future__ import annotations

from typing import Any

from fsspec import AbstractFileSystem

from azstoragetorch.filesystem._listings import Listings


class Plan:
    """A stand-in for *fs* that notes what would be transferred, and remembers which paths are directories."""

    def __init__(self, fs: Listings) -> None:
        self._fs = fs
        self._entries: dict[str, dict[str, Any]] = {}
        self.pairs: list[tuple[Any, Any]] = []

    def get_file(self, rpath: Any, lpath: Any, **_options: Any) -> None:
        """Note the pair."""
        self.pairs.append((rpath, lpath))

    def put_file(self, lpath: Any, rpath: Any, **_options: Any) -> None:
        """Note the pair."""
        self.pairs.append((lpath, rpath))

    def cp_file(self, path1: Any, path2: Any, **_options: Any) -> None:
        """Note the pair."""
        self.pairs.append((path1, path2))

    def entry_of(self, path: Any) -> dict[str, Any] | None:
        """What a listing has shown at *path*."""
        return self._entries.get(path)

    def is_known_directory(self, path: Any) -> bool:
        """Whether a listing has shown that *path* is a directory."""
        entry = self._entries.get(path)
        return entry is not None and entry["type"] == "directory"

    def isdir(self, path: Any) -> bool:
        """Like the file system, without a request if a listing has shown it."""
        return self.is_known_directory(path) if path in self._entries else self._fs.isdir(path)

    def exists(self, path: Any, **options: Any) -> bool:
        """Like the file system, without a request if a listing has shown it."""
        return path in self._entries or self._fs.exists(path, **options)

    def find(self, path: Any, **options: Any) -> Any:
        """Like the file system."""
        return self._listed("find", path, options)

    def glob(self, path: Any, **options: Any) -> Any:
        """Like the file system."""
        return self._listed("glob", path, options)

    def expand_path(self, path: Any, *arguments: Any, **options: Any) -> Any:
        """By the rules of fsspec."""
        return AbstractFileSystem.expand_path(self, path, *arguments, **options)

    def _listed(self, operation: str, path: Any, options: dict[str, Any]) -> Any:
        detail = options.pop("detail", False)
        found = getattr(self._fs, operation)(path, detail=True, **options)
        self._entries.update(found)
        return found if detail else list(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)


def plan_get(fs: Listings, rpath: Any, lpath: Any, recursive: bool, maxdepth: int | None) -> Plan:
    """What ``get`` transfers: pairs of a path here and a local path."""
    plan = Plan(fs)
    AbstractFileSystem.get(plan, rpath, lpath, recursive=recursive, maxdepth=maxdepth)
    return plan


def plan_put(fs: Listings, lpath: Any, rpath: Any, recursive: bool, maxdepth: int | None) -> Plan:
    """What ``put`` transfers: pairs of a local path and a path here."""
    plan = Plan(fs)
    AbstractFileSystem.put(plan, lpath, rpath, recursive=recursive, maxdepth=maxdepth)
    return plan


def plan_copy(fs: Listings, path1: Any, path2: Any, recursive: bool, maxdepth: int | None) -> Plan:
    """What ``copy`` copies: pairs of a path and its new path."""
    plan = Plan(fs)
    AbstractFileSystem.copy(plan, path1, path2, recursive=recursive, maxdepth=maxdepth)
    return plan
