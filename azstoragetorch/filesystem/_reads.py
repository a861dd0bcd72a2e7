"""Open files, and read whole files and ranges, many at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from azure.core.exceptions import HttpResponseError
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.utils import isfilelike

from azstoragetorch._blob.client import BlobClient
from azstoragetorch._blob.url import check_name
from azstoragetorch._engine.memory import filled_bytes
from azstoragetorch._engine.ranges import ByteRange, coalesce
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._engine.threads import one_at_a_time
from azstoragetorch._files.transfer import CopyOptions, Hooks, get_file, get_stream
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.filesystem._errors import (
    EXPECTED,
    already_exists,
    as_os_error,
    is_a_directory,
    translating,
)
from azstoragetorch.filesystem._file import AzureBlobFile
from azstoragetorch.filesystem._listings import Listings, is_marker
from azstoragetorch.filesystem._plans import Plan, plan_get

_MAX_GAP = 64 << 10  # bytes between two ranges that are fetched anyway: cheaper than a second request
_FORWARDED = ("block_size", "cache_type", "cache_options", "fill_cache", "size")  # of fsspec; they have no effect here


_Fetch: TypeAlias = "Callable[[Scope], list[tuple[int, Any]]]"
"""Fetches some ranges; returns their numbers, and for each the bytes or an error."""


@dataclass(frozen=True, slots=True)
class _Ranges:
    """Ranges of one file that one request fetches: their numbers, and where they begin and end."""

    path: str
    span: ByteRange
    members: tuple[tuple[int, int, int], ...]


class Reads(Listings):
    """The operations that read, and `open`."""

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,  # noqa: ARG002
        autocommit: bool = True,
        cache_options: Any = None,  # noqa: ARG002
        **options: Any,
    ) -> AzureBlobFile:
        for name in options:
            if name not in _FORWARDED:
                raise TypeError(f"open: unknown option {name!r}")
        if mode not in ("rb", "wb", "xb"):
            raise NotImplementedError(
                f"mode {mode!r}: a blob is read ('rb') or written as a whole ('wb', 'xb'); to append, read it and "
                "write it again"
            )
        place = self.place(path)
        if not place.name:
            raise is_a_directory(place.path)
        client = self.blob(place)
        if mode != "rb" and client.url.is_read_only:
            raise ValueError(f"mode {mode!r}: {path} is a snapshot or version, which can only be read")
        if mode == "xb":
            with translating(path):
                if client.find_properties() is not None:
                    raise already_exists(path)
        file = AzureBlobFile.create(self, path, client, mode, autocommit=autocommit)
        if mode == "rb":
            with on_error(file.close):
                self._check_readable(file, client)
        return file

    def _check_readable(self, file: AzureBlobFile, client: BlobClient) -> None:
        """Request the first part of *file*, so that a missing file is an error of `open`."""
        try:
            size = file.size
        except FileNotFoundError as error:
            cause = error.__cause__
            if isinstance(cause, HttpResponseError):
                raise self.missing(file.path, cause) from cause
            raise
        if not size:
            self._refuse_marker(file.path, client)

    def _refuse_marker(self, path: str, client: BlobClient) -> None:
        with translating(path):
            found = client.find_properties()
        if found is not None and is_marker(found.headers):
            raise is_a_directory(path)

    def cat_file(self, path: Any, start: int | None = None, end: int | None = None) -> bytes:
        """The content of a file, or the bytes from *start* to *end*, which work as in a slice.

        Raises:
            FileNotFoundError: *path* is not a file.
        """
        place = self.place(path)
        if not place.name:
            raise is_a_directory(place.path)
        client = self.blob(place)
        with translating(place.path):
            data = client.read()[0] if not start and end is None else _read(client, start or 0, end)
        if not data:
            self._refuse_marker(place.path, client)
        return data

    def cat_ranges(
        self,
        paths: list[Any],
        starts: list[int | None] | int | None,
        ends: list[int | None] | int | None,
        max_gap: int | None = None,
        on_error: str = "return",
    ) -> list[Any]:
        """The bytes of many ranges, fetched concurrently. Ranges of one file that are close are fetched together.

        Args:
            paths: A file for each range.
            starts: Where each range begins; one number for all ranges.
            ends: Where each range ends.
            max_gap: Bytes between two ranges that are fetched as well, if that saves a request; 64 KiB by default.
            on_error: ``"return"`` puts the error in the place of the bytes; ``"raise"`` raises it.

        All ranges of one file are of one version of it, or the ranges of the other version are errors.
        """
        if not isinstance(paths, list):
            raise TypeError(f"paths must be a list, not {type(paths).__name__}")
        begins, stops = (value if isinstance(value, list) else [value] * len(paths) for value in (starts, ends))
        if not len(paths) == len(begins) == len(stops):
            raise ValueError(f"{len(paths)} paths need as many starts and ends, not {len(begins)} and {len(stops)}")
        results: list[Any] = [b""] * len(paths)
        groups, others = self._plan_ranges(paths, begins, stops, _MAX_GAP if max_gap is None else max_gap)
        etags: dict[str, str] = {}
        calls: list[_Fetch] = [partial(self._fetch_group, group, etags) for group in groups]
        calls += [partial(self._fetch_other, number, paths[number], begins[number], stops[number]) for number in others]

        def call(fetch: _Fetch, scope: Scope) -> list[tuple[int, Any]]:
            found = fetch(scope)
            for _, result in found:
                if on_error != "return" and isinstance(result, Exception):
                    raise result
            return found

        for found in self.engine.map(call, calls, self.transfer.max_connections):
            for number, result in found:
                results[number] = result
        return results

    def _plan_ranges(
        self, paths: list[Any], starts: list[int | None], ends: list[int | None], max_gap: int
    ) -> tuple[list[_Ranges], list[int]]:
        """The groups of ranges to fetch with one request each, and the numbers of ranges that need another way."""
        part = self.transfer.effective_part_size
        by_path: dict[str, list[tuple[int, int, int]]] = {}
        others = []
        for number, (path, start, end) in enumerate(zip(paths, starts, ends, strict=True)):
            begin = start or 0
            if end is None or end < 0 or begin < 0 or end - begin > part:
                others.append(number)
            elif end > begin:
                by_path.setdefault(path, []).append((number, begin, end))
        groups = []
        for path, ranges in by_path.items():
            ranges.sort(key=lambda item: item[1])
            spans = coalesce([ByteRange(begin, end) for _, begin, end in ranges], max_gap=max_gap, limit=part)
            at = 0
            for span in spans:
                first = at
                while at < len(ranges) and ranges[at][1] < span.stop:
                    at += 1
                groups.append(_Ranges(path, span, tuple(ranges[first:at])))
        return groups, others

    def _fetch_group(self, group: _Ranges, etags: dict[str, str], scope: Scope) -> list[tuple[int, Any]]:
        try:
            client = self._file_client(group.path)
            opened = client.open_range(group.span, scope=scope)
            etag = opened.version.etag
            if etag and etags.setdefault(group.path, etag) != etag:
                opened.close()
                raise BlobChangedError(f"{client.url} was overwritten while ranges of it were fetched")
            data = filled_bytes(len(opened.span), lambda view: opened.receive([view]))
        except EXPECTED as error:
            failure = as_os_error(error, group.path)
            failure.__cause__ = error
            return [(number, failure) for number, _, _ in group.members]
        except (OSError, ValueError) as error:
            return [(number, error) for number, _, _ in group.members]
        low = group.span.start
        if len(group.members) == 1:
            return [(group.members[0][0], data)]
        return [(number, data[begin - low : end - low]) for number, begin, end in group.members]

    def _fetch_other(
        self, number: int, path: Any, start: int | None, end: int | None, _scope: Scope
    ) -> list[tuple[int, Any]]:
        try:
            return [(number, self.cat_file(path, start, end))]
        except (OSError, ValueError) as error:
            return [(number, error)]

    def _file_client(self, path: Any) -> BlobClient:
        place = self.place(path)
        if not place.name:
            raise is_a_directory(place.path)
        return self.blob(place)

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise") -> Any:
        """The content of one file, or a dict of the contents of many, which are fetched concurrently.

        Args:
            path: A file, a pattern, or a list of these. Directories that match a pattern are skipped.
            recursive: Fetch the files below directories.
            on_error: ``"raise"``, ``"omit"``, or ``"return"``, which puts the error in the place of the content.
        """
        plan = Plan(self)
        paths = [item for item in plan.expand_path(path, recursive=recursive) if not plan.is_known_directory(item)]
        if len(paths) == 1 and not isinstance(path, list) and paths[0] == self.strip(path):
            return self.cat_file(paths[0])

        def fetch(item: str, _scope: Scope) -> Any:
            try:
                return self.cat_file(item)
            except OSError as error:
                if on_error == "raise":
                    raise
                return error

        contents = zip(paths, self.engine.map(fetch, paths, self.transfer.max_connections), strict=True)
        return {item: data for item, data in contents if on_error == "return" or not isinstance(data, OSError)}

    def get_file(self, rpath: Any, lpath: Any = None, callback: Any = DEFAULT_CALLBACK, outfile: Any = None) -> None:
        """Copy a file to the local file *lpath*, completely or not at all, or to the open file *outfile*.

        For a directory, a local directory is created.
        """
        stream = outfile if outfile is not None else lpath if isfilelike(lpath) else None
        entry = self.info(rpath)
        if entry["type"] != "directory":
            self._get_one(rpath, lpath if stream is None else stream, callback, entry["size"], Scope())
        elif stream is not None:
            raise is_a_directory(entry["name"])
        else:
            Path(lpath).mkdir(parents=True, exist_ok=True)

    def _get_one(self, rpath: Any, target: Any, callback: Any, size: int | None, scope: Scope) -> None:
        """Copy a file to *target*, a local path or an open file."""
        path = self.strip(rpath)
        client = self._file_client(path)
        if size is not None and callback is not DEFAULT_CALLBACK:
            callback.set_size(size)
        hooks = Hooks(scope, advance_of(callback))
        with translating(path):
            if isfilelike(target):
                get_stream(client, target, hooks)
                return
            local = Path(target)
            local.parent.mkdir(parents=True, exist_ok=True)
            if local.is_dir():
                raise is_a_directory(str(local))
            get_file(client, local, hooks, CopyOptions(is_forced=True))

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Any = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
    ) -> None:
        """Copy files and, with *recursive*, directories to local ones, concurrently, by the rules of fsspec."""
        plan = plan_get(self, rpath, lpath, recursive, maxdepth)

        def transfer(pair: tuple[Any, Any], child: Any, scope: Scope) -> None:
            source, target = pair
            entry = plan.entry_of(source) or self.info(source)
            if entry["type"] != "directory":
                self._get_one(source, target, child, entry["size"], scope)
            else:
                check_name(self.place(source).name, "path")  # '..' in it would lead out of the local directory
                Path(target).mkdir(parents=True, exist_ok=True)

        self.transfer_all(plan.pairs, transfer, callback, self.transfer.initial_concurrency)

    def transfer_all(
        self,
        pairs: list[tuple[Any, Any]],
        transfer: Callable[[tuple[Any, Any], Any, Scope], None],
        callback: Any,
        at_once: int,
        *,
        is_sized: bool = False,
    ) -> None:
        """Transfer *pairs* concurrently. Callbacks are called one at a time."""
        if not is_sized:
            callback.set_size(len(pairs))
        turn = one_at_a_time()

        def call(pair: tuple[Any, Any], scope: Scope) -> None:
            if callback is DEFAULT_CALLBACK:
                transfer(pair, callback, scope)
                return
            with callback.branched(*pair) as child:
                transfer(pair, child, scope)
            with turn:
                callback.relative_update(1)

        self.engine.map(call, pairs, at_once)


def _read(client: BlobClient, start: int, end: int | None) -> bytes:
    """The bytes of the slice from *start* to *end*, all of one version."""
    version = None
    if start < 0 or (end is not None and end < 0):
        version = client.get_properties().version
        start, end, _ = slice(start, end).indices(version.size)
    if end is not None and end <= start:
        return b""
    reader = client.reader(version)
    try:
        return reader.read(start, None if end is None else end - start)
    finally:
        reader.close()


def advance_of(callback: Any) -> Callable[[int], None]:
    if callback is DEFAULT_CALLBACK:
        return _ignore
    turn = one_at_a_time()

    def advance(size: int) -> None:
        with turn:
            callback.relative_update(size)

    return advance


def _ignore(_size: int) -> None:
    pass
