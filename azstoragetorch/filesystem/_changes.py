"""Changes of what there is: delete, copy, and move files, and create and delete containers."""

from __future__ import annotations

from typing import Any

from azure.core.exceptions import ResourceExistsError, ResourceModifiedError

from azstoragetorch._engine.scope import Scope
from azstoragetorch._files.server_copy import copy_on_server
from azstoragetorch.exceptions import BlobChangedError
from azstoragetorch.filesystem._errors import already_exists, is_a_directory, not_empty, not_found, translating
from azstoragetorch.filesystem._listings import is_marker
from azstoragetorch.filesystem._paths import Place
from azstoragetorch.filesystem._plans import plan_copy
from azstoragetorch.filesystem._writes import Writes


class Changes(Writes):
    """The operations that change files and containers."""

    def rm_file(self, path: Any) -> None:
        """Delete a file.

        Raises:
            FileNotFoundError: *path* is not a file.
            IsADirectoryError: there is a directory.
        """
        place = self.place(path)
        if not place.name:
            raise is_a_directory(place.path)
        with translating(place.path):
            is_deleted = self.blob(place).delete()
        if not is_deleted:
            raise is_a_directory(place.path) if self.isdir(place.path) else not_found(place.path)
        self.invalidate_cache(place.path)

    def _rm(self, path: Any) -> None:
        self.rm_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete files and, with *recursive*, directories with everything below them, concurrently.

        Deleting a container recursively also deletes the container.

        Args:
            path: A path, a pattern, or a list of these.
            recursive: Delete directories.
            maxdepth: Delete only files down to this level.

        Raises:
            FileNotFoundError: nothing is at *path*.
            IsADirectoryError: a path is a directory, and *recursive* is not set.
        """
        paths = self.expand_path(path)
        if not recursive:
            self._map(self.rm_file, paths)
            return
        for item in paths:
            self._remove_tree(self.place(item), maxdepth)

    def _remove_tree(self, place: Place, maxdepth: int | None) -> None:
        if not place.container:
            raise PermissionError(f"{self!r}: all containers of an account are not deleted at once: name them")
        found = self.find_below(place, maxdepth=maxdepth)
        is_there = bool(found.files or found.directories or found.markers)
        self._map(self._delete, [Place(*name.split("/", 1)) for name in found.files])
        self._delete_markers(found.markers)
        if maxdepth is None or not found.directories:  # else it is not empty
            with translating(place.path):
                itself = self.blob(place) if place.name else self.container(place)
                is_there = itself.delete() or is_there
        self.invalidate_cache(place.path)
        if not is_there:
            raise not_found(place.path)

    def _delete(self, place: Place) -> bool:
        with translating(place.path):
            return self.blob(place).delete()

    def _delete_markers(self, markers: list[Place]) -> None:
        """Delete the markers of directories, the deepest first: the service refuses those that are not empty."""
        depths = sorted({marker.name.count("/") for marker in markers}, reverse=True)
        for depth in depths:
            self._map(self._delete, [marker for marker in markers if marker.name.count("/") == depth])

    # -- copies -----------------------------------------------------------------------------------------------------

    def cp_file(self, path1: Any, path2: Any) -> None:
        """Copy a file within the account. The service copies: the bytes do not pass through this machine.

        Content headers, metadata, and a tier that was set are copied. If *path1* is a directory, nothing is copied.

        Raises:
            FileNotFoundError: there is nothing at *path1*.
        """
        self._copy(path1, path2)

    def _copy(self, path1: Any, path2: Any) -> tuple[Place, str] | None:
        """Copy a file; return its place and the version that was copied, or None for a directory."""
        source, target = self.place(path1), self.place(path2)
        if not source.name:
            return None
        if not target.name:
            raise is_a_directory(target.path)
        if source == target:
            return None
        client = self.blob(source)
        with translating(source.path):
            found = client.find_properties()
            if found is None or is_marker(found.headers):
                if found is None and not self.isdir(source.path):
                    raise not_found(source.path)
                return None
            copy_on_server(client, self.target(target.path), found, Scope())
        self.invalidate_cache(target.path)
        return source, found.version.etag

    def copy(
        self,
        path1: Any,
        path2: Any,
        recursive: bool = False,
        maxdepth: int | None = None,
        on_error: str | None = None,
    ) -> None:
        """Copy files and, with *recursive*, directories within the account, concurrently, by the rules of fsspec.

        Args:
            path1: A path, a pattern, or a list of these.
            path2: The new path, or a directory.
            recursive: Copy directories.
            maxdepth: The number of levels to copy.
            on_error: ``"ignore"``, the default with *recursive*, skips files that are deleted meanwhile; ``"raise"``.
        """
        self._copy_all(path1, path2, recursive, maxdepth, on_error or ("ignore" if recursive else "raise"))

    def _copy_all(
        self, path1: Any, path2: Any, recursive: bool, maxdepth: int | None, on_error: str
    ) -> list[tuple[Place, str]]:
        plan = plan_copy(self, path1, path2, recursive, maxdepth)

        def copy(pair: tuple[Any, Any], _scope: Scope) -> tuple[Place, str] | None:
            if plan.is_known_directory(pair[0]):
                return None
            try:
                return self._copy(*pair)
            except FileNotFoundError:
                if on_error == "raise":
                    raise
                return None

        copied = self.engine.map(copy, plan.pairs, self.transfer.max_connections)
        return [done for done in copied if done is not None]

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Move files and, with *recursive*, directories: copy them within the account, then delete the sources.

        A source that is overwritten during the move is not deleted. A move is not atomic.

        Raises:
            FileNotFoundError: there is nothing at *path1*.
            OSError: a source was overwritten, or could not be copied; sources that were not copied are still there.
        """
        if not isinstance(path1, list) and not isinstance(path2, list) and self.strip(path1) == self.strip(path2):
            return
        copied = self._copy_all(path1, path2, recursive, maxdepth, "raise")
        self._map(self._delete_version, copied)
        if recursive:
            for item in path1 if isinstance(path1, list) else [path1]:
                self._delete_all_markers(self.place(item))
        for place, _ in copied:
            self.invalidate_cache(place.path)

    def _delete_all_markers(self, place: Place) -> None:
        """Delete the markers of the directory *place*, from which all files were moved, and of those below it."""
        found = self.find_below(place)
        if not found.files:
            self._delete_markers(found.markers)
            with translating(place.path):
                properties = self.blob(place).find_properties() if place.name else None
                if properties is not None and is_marker(properties.headers):
                    self.blob(place).delete(etag=properties.version.etag)

    def mv_file(self, path1: Any, path2: Any) -> None:
        """Move a file; see `mv`."""
        self.mv(path1, path2)

    def _delete_version(self, copied: tuple[Place, str]) -> None:
        place, etag = copied
        client = self.blob(place)
        with translating(place.path):
            try:
                client.delete(etag=etag)
            except ResourceModifiedError as error:
                raise BlobChangedError(
                    f"{client.url} was overwritten while it was being moved: the old version was copied, and the new "
                    "one is still there"
                ) from error

    # -- directories ------------------------------------------------------------------------------------------------

    def mkdir(self, path: Any, create_parents: bool = True) -> None:
        """Create a container. Below a container, directories exist only as prefixes of names: nothing is created.

        Args:
            path: A container, or a directory in one.
            create_parents: Create the container of a directory.

        Raises:
            FileExistsError: the container exists, or something is at *path*.
            FileNotFoundError: the container of the directory does not exist, and *create_parents* is not set.
        """
        place = self.place(path)
        if not place.name:
            self._create_container(place, exist_ok=False)
        elif self.exists(place.path):
            raise already_exists(place.path)
        elif create_parents:
            self._create_container(place, exist_ok=True)
        else:
            self.info(place.container)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Like `mkdir` with parents; with *exist_ok*, it is not an error if the directory exists.

        Raises:
            FileExistsError: something is at *path*, and *exist_ok* is not set.
        """
        if not exist_ok:
            self.mkdir(path)
            return
        place = self.place(path)
        if not place.container:
            return
        with translating(place.path):
            # Most containers exist, and a credential for one container cannot create it.
            exists = self._has_blobs(Place(place.container))
        if not exists:
            self._create_container(place, exist_ok=True)

    def _create_container(self, place: Place, *, exist_ok: bool) -> None:
        if not place.container:
            raise already_exists("")
        with translating(place.container):
            try:
                self.container(place).create()
            except ResourceExistsError:
                if not exist_ok:
                    raise
        self.invalidate_cache("")

    def rmdir(self, path: Any) -> None:
        """Delete an empty directory: a container, or the marker of a directory. Without a marker, nothing is deleted.

        Raises:
            OSError: the directory is not empty (``errno.ENOTEMPTY``).
            FileNotFoundError: the container does not exist.
            NotADirectoryError: a file is at *path*.
        """
        place = self.place(path)
        if not place.container:
            raise PermissionError("the root cannot be deleted")
        found = self.find_below(place, maxdepth=1)
        if found.files or found.directories:
            raise not_empty(place.path)
        with translating(place.path):
            if not place.name:
                if not self.container(place).delete():
                    raise not_found(place.path)
            else:
                self._delete_marker_of(place, found.markers)
        self.invalidate_cache(place.path)

    def _delete_marker_of(self, place: Place, markers: list[Place]) -> None:
        properties = self.blob(place).find_properties()
        if properties is not None and not is_marker(properties.headers):
            raise NotADirectoryError(f"{self.blob(place).url} is a file")
        if properties is not None:
            self.blob(place).delete(etag=properties.version.etag)
        for marker in markers:
            self._delete(marker)

    def touch(self, path: Any, truncate: bool = True) -> None:
        """Create an empty file; if it exists, replace it with an empty one.

        Raises:
            NotImplementedError: the file exists, and *truncate* is not set: the service has no such operation.
        """
        if truncate:
            self.pipe_file(path, b"")
            return
        try:
            self.pipe_file(path, b"", mode="create")
        except FileExistsError as error:
            raise NotImplementedError(f"{self.strip(path)} exists: only touch(truncate=True) can change it") from error
