"""Write whole files, many at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.callbacks import DEFAULT_CALLBACK

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._engine.scope import Scope
from azstoragetorch._files.transfer import CopyOptions, Hooks, put_file
from azstoragetorch.filesystem._errors import is_a_directory, translating
from azstoragetorch.filesystem._plans import plan_put
from azstoragetorch.filesystem._reads import Reads, advance_of

_LARGE_AT_ONCE = 2  # each takes all connections; the second one covers the end of the first


class Writes(Reads):
    """The operations that write files."""

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite") -> None:
        """Replace the content of a file with the bytes *value*; with the mode ``"create"``, it must not exist.

        Raises:
            FileExistsError: the mode is ``"create"``, and the file exists.
        """
        path, view = self.strip(path), memoryview(value)
        if self._intrans:
            with self.open(path, "xb" if mode == "create" else "wb") as file:
                file.write(view)
            return
        client = self.target(path)
        with translating(path):
            client.put(view.cast("B"), create_only=_is_create(mode))
        self.invalidate_cache(path)

    def pipe(self, path: Any, value: Any = None, **options: Any) -> None:
        """Write *value* to *path*; or many files concurrently, as a dict of paths and bytes."""
        files = path if isinstance(path, Mapping) else {path: value}

        def write(item: tuple[Any, Any], _scope: Scope) -> None:
            self.pipe_file(item[0], item[1], **options)

        small = [item for item in files.items() if len(item[1]) <= self.transfer.block_size]
        large = [item for item in files.items() if len(item[1]) > self.transfer.block_size]
        if self._intrans:
            self.engine.map(write, [*large, *small], 1)
            return
        self.engine.map(write, large, _LARGE_AT_ONCE)
        self.engine.map(write, small, self.transfer.max_connections)

    def put_file(self, lpath: Any, rpath: Any, callback: Any = DEFAULT_CALLBACK, mode: str = "overwrite") -> None:
        """Copy a local file, completely or not at all. For a local directory, nothing is created but a container."""
        self._put_one(lpath, rpath, callback, mode, Scope())

    def _put_one(self, lpath: Any, rpath: Any, callback: Any, mode: str, scope: Scope) -> None:
        path, source = self.strip(rpath), Path(lpath)
        if source.is_dir():
            self.makedirs(path, exist_ok=True)
            return
        if self._intrans or _is_create(mode):
            self._put_as_file(source, path, callback, mode)
            return
        client = self.target(path)
        if callback is not DEFAULT_CALLBACK:
            callback.set_size(source.stat().st_size)
        with translating(path):
            put_file(source, client, None, Hooks(scope, advance_of(callback)), CopyOptions(is_forced=True))
        self.invalidate_cache(path)

    def _put_as_file(self, source: Path, path: str, callback: Any, mode: str) -> None:
        with source.open("rb") as file, self.open(path, "xb" if mode == "create" else "wb") as target:
            callback.set_size(os.fstat(file.fileno()).st_size)
            while data := file.read(self.transfer.block_size):
                callback.relative_update(target.write(data))

    def put(
        self,
        lpath: Any,
        rpath: Any,
        recursive: bool = False,
        callback: Any = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        mode: str = "overwrite",
    ) -> None:
        """Copy local files and, with *recursive*, directories, concurrently. Paths follow the rules of fsspec."""
        pairs = plan_put(self, lpath, rpath, recursive, maxdepth).pairs
        limit = self.transfer.block_size
        sizes = [source.stat().st_size if source.is_file() else 0 for source in (Path(pair[0]) for pair in pairs)]
        large = [pair for pair, size in zip(pairs, sizes, strict=True) if size > limit]
        small = [pair for pair, size in zip(pairs, sizes, strict=True) if size <= limit]

        def transfer(pair: tuple[Any, Any], child: Any, scope: Scope) -> None:
            self._put_one(*pair, child, mode, scope)

        callback.set_size(len(pairs))
        at_once = 1 if self._intrans else self.transfer.max_connections
        self.transfer_all(large, transfer, callback, min(at_once, _LARGE_AT_ONCE), is_sized=True)
        self.transfer_all(small, transfer, callback, at_once, is_sized=True)

    def target(self, path: str) -> BlobClient:
        """The client for a file that is written."""
        place = self.place(path)
        if not place.name:
            raise is_a_directory(path)
        client = self.blob(place)
        if client.url.is_read_only:
            raise ValueError(f"{path} is a snapshot or version, which can only be read")
        return client


def _is_create(mode: str) -> bool:
    if mode not in ("overwrite", "create"):
        raise ValueError(f"mode must be 'overwrite' or 'create', not {mode!r}")
    return mode == "create"
