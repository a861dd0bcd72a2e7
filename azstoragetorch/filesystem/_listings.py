"""What there is: `ls`, `find`, `info`, and everything that follows from them.

A directory exists if a name has it as its prefix, or if it has a marker: in an account with a hierarchical namespace a
blob with the metadata ``hdi_isfolder``, elsewhere often a blob whose name ends with a slash. Only `ls` and `walk` use
the cache of listings. Everything else asks the service.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any

from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceNotFoundError

from azstoragetorch._blob.client import Page
from azstoragetorch._engine.scope import Scope
from azstoragetorch.filesystem._base import Base
from azstoragetorch.filesystem._errors import as_os_error, is_a_directory, translating
from azstoragetorch.filesystem._paths import Place, ancestors

Entry = dict[str, Any]

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass
class Found:
    """Files and directories by path. *markers* are the names of the blobs that only mark a directory."""

    files: dict[str, Any] = field(default_factory=dict)
    directories: dict[str, Entry] = field(default_factory=dict)
    markers: list[Place] = field(default_factory=list)

    def update(self, other: Found) -> None:
        """Add *other*."""
        self.files.update(other.files)
        self.directories.update(other.directories)
        self.markers += other.markers


class Listings(Base):
    """The operations that list blobs or describe one."""

    def ls(self, path: Any, detail: bool = True, refresh: bool = False) -> list[Any]:
        """List the entries of the directory *path*; of a file, the file itself.

        Args:
            path: A directory, a container, or ``""`` for the containers of the account.
            detail: Return dicts with ``name``, ``size``, ``type``, ``etag`` and ``last_modified``; else paths.
            refresh: Ask the service even if the listing is cached.

        Raises:
            FileNotFoundError: *path* does not exist.
            PermissionError: the credential does not allow listing.
        """
        place = self.place(path)
        entries: list[Entry] | None = None if refresh else self.dircache.get(place.path)
        if entries is None:
            entries = self._list_directory(place)
        return [dict(entry) for entry in entries] if detail else [entry["name"] for entry in entries]

    def _list_directory(self, place: Place) -> list[Entry]:
        epoch = self._epoch
        with translating(place.path):
            found, exists = self._list_level(place)
        entries = sorted([*found.files.values(), *found.directories.values()], key=_name_of)
        entries = [entry for entry in entries if entry["name"] != f"{place.path}/"]  # its path is that of the directory
        if not entries and not exists:
            entry = self.info(place.path)
            if entry["type"] == "file":
                return [entry]
        if self._epoch is epoch:  # else something was changed meanwhile
            self.dircache[place.path] = entries
        return entries

    def info(self, path: Any, refresh: bool = False) -> Entry:  # noqa: ARG002 - always fresh
        """Describe a file or directory, as the dicts of `ls` do. If both exist at *path*, this is the file.

        Raises:
            FileNotFoundError: *path* does not exist.
        """
        place = self.place(path)
        if not place.container:
            return _directory("")
        with translating(place.path):
            if not place.name:
                self.container(place).has_names()  # raises if the container does not exist
                return _directory(place.path)
            try:
                found = self.blob(place).get_properties()
            except ResourceNotFoundError as error:
                if not self._has_blobs(place, error):
                    raise
                return _directory(place.path)
        if is_marker(found.headers):
            return _directory(place.path)
        return _file(self.strip(path), found.version.size, found.version.etag, found.headers.get("Last-Modified", ""))

    def exists(self, path: Any, refresh: bool = False) -> bool:  # noqa: ARG002 - always fresh
        """Whether a file or directory exists.

        Raises:
            OSError: the service refused the request, or cannot be reached.
        """
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: Any) -> bool:
        """Whether a file exists at *path*. There can be a directory as well."""
        place = self.place(path)
        if not place.name:
            return False
        with suppress(FileNotFoundError), translating(place.path):
            found = self.blob(place).find_properties()
            return found is not None and not is_marker(found.headers)
        return False

    def isdir(self, path: Any) -> bool:
        """Whether a directory exists at *path*. There can be a file as well."""
        place = self.place(path)
        if not place.container:
            return True
        with suppress(FileNotFoundError), translating(place.path):
            if self._has_blobs(place):
                return True
            found = self.blob(place).find_properties() if place.name else None
            return found is not None and is_marker(found.headers)
        return False

    def sizes(self, paths: Iterable[Any]) -> list[int]:
        """The size of each of *paths* in bytes."""
        return self.engine.map(
            lambda path, _scope: int(self.info(path)["size"]), list(paths), self.transfer.max_connections
        )

    def created(self, path: Any) -> datetime:
        """When the file was created.

        Raises:
            FileNotFoundError: *path* is not a file.
        """
        return self._date(path, "x-ms-creation-time")

    def modified(self, path: Any) -> datetime:
        """When the file was modified last.

        Raises:
            FileNotFoundError: *path* is not a file.
        """
        return self._date(path, "Last-Modified")

    def find(
        self,
        path: Any,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        prefix: str = "",
        refresh: bool = False,  # noqa: ARG002 - always fresh
    ) -> Any:
        """All files below *path*, sorted; if it is a file itself, that file; nothing if it does not exist.

        Args:
            path: A directory, a container, or ``""`` for all containers.
            maxdepth: The number of levels to descend; all by default. Levels are listed concurrently.
            withdirs: Add directories, *path* among them.
            detail: Return a dict of dicts as `info` returns, by path; else a list.
            prefix: Only names that begin so after *path* and a slash; fewer are requested.
            refresh: Without effect: the service is always asked.
        """
        if maxdepth is not None and maxdepth < 1:
            raise ValueError(f"maxdepth must be at least 1, not {maxdepth}")
        place = self.place(path)
        found = self.find_below(place, prefix, maxdepth, dated=detail)
        if place.name and not prefix and not found.files and not found.directories:
            self._add_itself(place, found)
        entries: dict[str, Any] = dict(found.files)
        if withdirs:
            for name, entry in found.directories.items():
                entries.setdefault(name, entry)
            if place.container and (entries or (not prefix and self.isdir(place.path))):
                entries.setdefault(place.path, _directory(place.path))
        names = sorted(entries)
        return {name: entries[name] for name in names} if detail else names

    def glob(self, path: Any, maxdepth: int | None = None, **options: Any) -> Any:
        """The paths that match a pattern with ``*``, ``**``, ``?`` or ``[...]``, as in `AbstractFileSystem.glob`."""
        text = self.strip(path)
        magic = min((at for at in map(text.find, "*?[") if at >= 0), default=-1)
        if magic >= 0:
            options.setdefault("prefix", text[:magic].rpartition("/")[2])
        return super().glob(path, maxdepth=maxdepth, **options)

    def du(
        self, path: Any, total: bool = True, maxdepth: int | None = None, withdirs: bool = False, **options: Any
    ) -> Any:
        """The number of bytes of all files below *path*; with ``total=False``, of each file by its path."""
        found = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True, **options)
        sizes = {name: int(entry["size"]) for name, entry in found.items()}
        return sum(sizes.values()) if total else sizes

    # -- listings of the service ------------------------------------------------------------------------------------

    def find_below(self, place: Place, prefix: str = "", maxdepth: int | None = None, *, dated: bool = False) -> Found:
        """Everything below *place*. Files have entries only if *dated*. Nothing if the container does not exist."""
        with suppress(FileNotFoundError), translating(place.path):
            if maxdepth is not None:
                return self._find_levels(place, prefix, maxdepth)
            if place.container:
                return self._find_flat(place, prefix, dated=dated)
            found, _ = self._list_level(place, prefix)
            places = map(Place, found.directories)
            for part in self._map(partial(self._find_flat, dated=dated), list(places)):
                found.update(part)
            return found
        return Found()  # no container can have this name

    def _find_flat(self, place: Place, prefix: str = "", *, dated: bool) -> Found:
        found, container = Found(), place.container
        try:
            for page in self.container(place).pages(prefix=place.folder + prefix, with_modified=dated):
                self._add_markers(found, container, page)
                names = [f"{container}/{name}" for name in page.names]
                if dated:
                    rows = zip(names, page.sizes, page.etags, page.modified, strict=True)
                    found.files.update({row[0]: _file(*row) for row in rows})
                else:
                    found.files.update(dict.fromkeys(names))
        except ResourceNotFoundError:
            return Found()
        for name in ancestors(found.files, place.path):
            found.directories[name] = _directory(name)
        for marker in found.markers:
            name = marker.path.rstrip("/")
            for directory in (name, *ancestors([name], place.path)):
                if directory != place.path:
                    found.directories[directory] = _directory(directory)
            found.files.pop(f"{container}/{marker.name}", None)
        return found

    def _add_markers(self, found: Found, container: str, page: Page) -> None:
        marks = [*page.directories, *(name for name in page.names if name.endswith("/"))]
        found.markers += [Place(container, name) for name in marks]

    def _find_levels(self, place: Place, prefix: str, maxdepth: int) -> Found:
        found, level = Found(), [place]
        for _ in range(maxdepth):
            parts = self._map(partial(self._list_level, prefix=prefix), level)
            level = []
            for part, _ in parts:
                found.update(part)
                level += [Place(*_halves(name)) for name in part.directories]
            prefix = ""
        return found

    def _list_level(self, place: Place, prefix: str = "") -> tuple[Found, bool]:
        """What is in the directory *place* itself, and whether the directory exists."""
        found = Found()
        if not place.container:
            for entry in self.account_client().containers():
                if entry.name.startswith(prefix):
                    found.directories[entry.name] = _directory(entry.name)
            return found, True
        folder, container, exists = place.folder, place.container, not place.name
        try:
            for page in self.container(place).pages(prefix=folder + prefix, delimiter="/", with_modified=True):
                exists = exists or bool(page.names or page.prefixes or page.directories)
                for directory in (*page.directories, *(name[:-1] for name in page.prefixes)):
                    path = f"{container}/{directory}"
                    found.directories[path] = _directory(path)
                found.markers += [Place(container, name) for name in page.directories]
                rows = zip(page.names, page.sizes, page.etags, page.modified, strict=True)
                for name, size, etag, modified in rows:
                    if name == folder:
                        found.markers.append(Place(container, name))
                    else:
                        found.files[f"{container}/{name}"] = _file(f"{container}/{name}", size, etag, modified)
        except ResourceNotFoundError:
            return Found(), False
        return found, exists

    def _map(self, function: Any, places: Sequence[Any]) -> list[Any]:
        return self.engine.map(lambda place, _scope: function(place), places, self.transfer.max_connections, Scope())

    def _has_blobs(self, place: Place, missing: HttpResponseError | None = None) -> bool:
        """Whether something is in the directory *place*. An empty container exists as well.

        *missing* is the error for the blob at *place*. With it, a credential that cannot list is not an error.
        """
        if getattr(missing, "error_code", "") == "ContainerNotFound":
            return False
        try:
            return self.container(place).has_names(place.folder) or not place.name
        except ResourceNotFoundError:
            return False
        except ClientAuthenticationError:
            if missing is None:
                raise
            return False

    def _add_itself(self, place: Place, found: Found) -> None:
        try:
            entry = self.info(place.path)
        except FileNotFoundError:
            return
        (found.directories if entry["type"] == "directory" else found.files)[place.path] = entry

    def _date(self, path: Any, header: str) -> datetime:
        place = self.place(path)
        if not place.name:
            raise is_a_directory(place.path)
        with translating(place.path):
            found = self.blob(place).get_properties()
        date = _date(found.headers.get(header, ""))
        if date is None:
            raise NotImplementedError(f"{self.blob(place).url}: the service sent no {header}")
        return date

    def sign(self, path: Any, expiration: float = 100) -> str:
        """The URL of a file with a SAS that allows reading it for *expiration* seconds.

        It is signed with the account key, or for the identity, which needs the role Storage Blob Delegator, too.

        Raises:
            NotImplementedError: the credential is a SAS, or anonymous.
        """
        place = self.place(path)
        if not place.name:
            raise is_a_directory(place.path)
        with translating(place.path):
            try:
                return self.blob(place).sign(timedelta(seconds=expiration))
            except ValueError as error:
                raise NotImplementedError(str(error)) from error

    def missing(self, path: str, error: HttpResponseError) -> OSError:
        """The error for a file that cannot be read because of *error*: what is there can be a directory."""
        if isinstance(error, ResourceNotFoundError) and self._has_blobs(Place.of(path), error):
            return is_a_directory(path)
        return as_os_error(error, path)


def is_marker(headers: Mapping[str, str]) -> bool:
    """Whether a blob with the response *headers* only marks a directory."""
    is_folder = headers.get("x-ms-meta-hdi_isfolder", headers.get("x-ms-meta-Hdi_isfolder", ""))
    return is_folder.lower() == "true" or headers.get("x-ms-resource-type", "").lower() == "directory"


def _file(path: str, size: int, etag: str, modified: str) -> Entry:
    return {"name": path, "size": size, "type": "file", "etag": etag, "last_modified": _date(modified)}


def _directory(path: str) -> Entry:
    return {"name": path, "size": 0, "type": "directory"}


def _name_of(entry: Entry) -> str:
    return str(entry["name"])


def _halves(path: str) -> tuple[str, str]:
    container, _, name = path.partition("/")
    return container, name


@lru_cache(maxsize=4096)  # blobs of one upload were modified in the same few seconds
def _date(text: str) -> datetime | None:
    """A date of the service: ``Fri, 27 Nov 2026 10:17:15 GMT``."""
    try:
        return datetime(
            int(text[12:16]), _MONTHS.index(text[8:11]) + 1, int(text[5:7]), int(text[17:19]), int(text[20:22]),
            int(text[23:25]), tzinfo=timezone.utc,
        )  # fmt: skip
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
