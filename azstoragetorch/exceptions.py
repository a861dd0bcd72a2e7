"""The errors of azstoragetorch.

::

    Exception
    └── AZStorageTorchError
        ├── FatalBlobIOWriteError          a write failed; nothing will be committed
        ├── BlobChangedError               a blob was overwritten while it was being read
        ├── ClientRequestIdMismatchError   an answer belongs to another request
        └── CheckpointError                a distributed checkpoint cannot be saved, read or managed
            ├── CheckpointConflictError    another save was committed while this one was in progress
            ├── CheckpointExistsError      there is one, and it was not to be overwritten
            └── CheckpointNotFoundError    no checkpoint, or an incomplete one

What the service refuses is raised as the matching ``azure.core.exceptions`` type
(``ResourceNotFoundError``, ``ClientAuthenticationError``, ``ServiceResponseError``, ...), since that is what
users of Azure catch. Every one of these errors survives pickling, so that DataLoader workers and distributed
jobs report it as it was raised.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AZStorageTorchError",
    "BlobChangedError",
    "CheckpointConflictError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "ClientRequestIdMismatchError",
    "FatalBlobIOWriteError",
]


class AZStorageTorchError(Exception):
    """Base class of the errors that azstoragetorch itself defines."""


class FatalBlobIOWriteError(AZStorageTorchError):
    """A write failed for good: this writer commits nothing and takes no more data.

    The blob is what it was before the writer was opened; only where the service fell silent after the commit had been
    sent the message says that this is not known. The cause is chained (``__cause__``) and named in the message. Open
    a new :class:`~azstoragetorch.io.BlobIO` and write everything again to retry.
    """


class BlobChangedError(AZStorageTorchError):
    """The blob was overwritten, or deleted and created again, while it was being read.

    A read pins the version (ETag) that it saw first, so bytes of two versions are never mixed. Open the blob
    again to read the new version.
    """


class ClientRequestIdMismatchError(AZStorageTorchError):
    """The service echoed the id of another request, so the answer cannot be trusted.

    It is retried on a new connection first; seeing it means that a proxy mixes up answers.
    """


class CheckpointError(AZStorageTorchError):
    """A distributed checkpoint cannot be saved, read or managed.

    ``checkpoint`` is its URL, ``rank`` the rank that found out and ``key`` the entry of the state dict that was being
    saved or loaded; what does not apply is None. ``touched`` names the entries of the state dict that a failed load
    may have written to; all others are as they were.
    """

    def __init__(
        self,
        message: str,
        *,
        checkpoint: str | None = None,
        key: str | None = None,
        rank: int | None = None,
        touched: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
        self.key = key
        self.rank = rank
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, self.__dict__


class CheckpointConflictError(CheckpointError):
    """The checkpoint is not the one that was there when the operation began; it stays as it is now.

    A save raises it if another save was committed, or the checkpoint was deleted, while it was in progress: this save
    has no effect, and what is there now loads. ``save_id`` is that of the operation, ``other_save_id`` that of the
    checkpoint that is there; None if that is not known. Saves that run at the same time need separate folders.
    """

    def __init__(
        self,
        message: str,
        *,
        checkpoint: str | None = None,
        rank: int | None = None,
        save_id: str | None = None,
        other_save_id: str | None = None,
    ) -> None:
        super().__init__(message, checkpoint=checkpoint, rank=rank)
        self.save_id = save_id
        self.other_save_id = other_save_id


class CheckpointExistsError(CheckpointError):
    """There is a checkpoint, and it was not to be overwritten. It is unchanged."""


class CheckpointNotFoundError(CheckpointError):
    """There is no checkpoint, or only what an interrupted save left behind."""
