"""Translate errors into those that fsspec and its users expect: `OSError` and its subclasses, with URL and reason."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, TypeVar, cast

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)

from azstoragetorch.exceptions import AZStorageTorchError, BlobChangedError

M = TypeVar("M", bound=Callable[..., Any])

EXPECTED = (AzureError, AZStorageTorchError)
"""The errors that are translated."""

_NUMBERS: list[tuple[type[Exception], int]] = [
    (ResourceNotFoundError, errno.ENOENT),
    (ResourceExistsError, errno.EEXIST),
    (ClientAuthenticationError, errno.EACCES),
    (BlobChangedError, errno.ESTALE),
    (ServiceRequestError, errno.ECONNABORTED),
    (ServiceResponseError, errno.ECONNABORTED),
]
_NUMBERS_OF_CODES = {
    "InvalidResourceName": errno.ENOENT,  # no container can have this name
    "DirectoryIsNotEmpty": errno.ENOTEMPTY,
    "PathAlreadyExists": errno.EEXIST,
    "ResourceTypeMismatch": errno.EISDIR,
    "InvalidInput": errno.EINVAL,
}


def as_os_error(error: Exception, path: str) -> OSError:
    """The `OSError` for *error*, one of `EXPECTED`, that an operation on *path* raised. Raise it from *error*."""
    return OSError(_number(error), str(error), path)  # Python makes the subclass for the number


def _number(error: BaseException | None) -> int:
    seen = 0
    while error is not None and seen < 8:  # a failed write names its cause
        if isinstance(error, HttpResponseError):
            code = str(getattr(error, "error_code", "") or "")
            if code in _NUMBERS_OF_CODES:
                return _NUMBERS_OF_CODES[code]
        number = next((number for kind, number in _NUMBERS if isinstance(error, kind)), None)
        if number is not None:
            return number
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error, seen = error.__cause__, seen + 1
    return errno.EIO


class translating:  # noqa: N801 - used like a function
    """Translate the errors in a ``with`` block about *path*."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, EXPECTED):
            raise as_os_error(error, self._path) from error


def translated(method: M) -> M:
    """A method of a file with translated errors."""

    @wraps(method)
    def call(self: Any, /, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except EXPECTED as error:
            raise as_os_error(error, self.path) from error

    return cast("M", call)


def not_found(path: str) -> FileNotFoundError:
    """The error for a file or directory that does not exist."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def already_exists(path: str) -> FileExistsError:
    """The error for a file or directory that must not exist."""
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def is_a_directory(path: str) -> IsADirectoryError:
    """The error for a directory where a file is needed."""
    return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def not_empty(path: str) -> OSError:
    """The error for a directory that is not empty."""
    return OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
