"""The errors of azstoragetorch.

* :class:`AZStorageTorchError`: the base class

  * :class:`FatalBlobIOWriteError`: a write failed, and nothing will be committed
  * :class:`BlobChangedError`: a blob was overwritten while it was being read
  * :class:`ClientRequestIdMismatchError`: a response belongs to another request
  * :class:`ManifestError`: a manifest is damaged, or lists another container
  * :class:`SafetensorsError`: a safetensors model cannot be read or written
  * :class:`WeightsError`: published weights cannot be published or followed
  * :class:`CheckpointError`: a checkpoint cannot be saved, loaded, or managed

    * :class:`CheckpointConflictError`: another save was committed during this one
    * :class:`CheckpointExistsError`: the folder has a checkpoint, and ``overwrite=False``
    * :class:`CheckpointNotFoundError`: there is no checkpoint, or an incomplete one

Errors of the service are raised as the matching ``azure.core.exceptions`` types (``ResourceNotFoundError``,
``ClientAuthenticationError``, ``ServiceResponseError``, ...), which users of Azure already catch. All of these errors
can be pickled, so DataLoader workers and distributed jobs report them as they were raised.
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
    "ManifestError",
    "SafetensorsError",
    "WeightsError",
]


class AZStorageTorchError(Exception):
    """Base class of the errors that azstoragetorch itself defines."""


class FatalBlobIOWriteError(AZStorageTorchError):
    """A write failed for good: this writer commits nothing and accepts no more data.

    The blob is unchanged. The one exception: if the service does not respond after the commit was sent, the message
    says that the outcome is not known. The cause is chained (``__cause__``) and named in the message. Open a new
    :class:`~azstoragetorch.io.BlobIO` and write everything again to retry.
    """


class BlobChangedError(AZStorageTorchError):
    """The blob was overwritten, or deleted and created again, while it was being read.

    A reader is pinned to the version (ETag) that it saw first, so bytes of two versions are never mixed. Open the blob
    again to read the new version.
    """


class ClientRequestIdMismatchError(AZStorageTorchError):
    """The response has the id of another request, so it cannot be trusted.

    The request is first retried on a new connection. If this error is raised, a proxy probably mixes up responses.
    """


class ManifestError(AZStorageTorchError):
    """A manifest is truncated or damaged, lists a name twice, or lists another container than it should.

    The message says which. Make the manifest again.
    """


class SafetensorsError(AZStorageTorchError):
    """A safetensors file, or a folder of them, cannot be read or written.

    ``url`` is the blob or folder, without a SAS, and ``tensor`` the name of the tensor. Attributes that do not apply
    are None.
    """

    def __init__(self, message: str, *, url: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, self.__dict__


class CheckpointError(AZStorageTorchError):
    """A distributed checkpoint cannot be saved, loaded, or managed.

    ``checkpoint`` is its URL, ``rank`` the rank on which the operation failed, and ``key`` the entry of the state dict
    that was being saved or loaded. Attributes that do not apply are None. ``touched`` is the set of entries of the
    state dict that a failed load may have modified; all other entries are unchanged.
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
    """The checkpoint was replaced or deleted while the operation was in progress. What is there now is unchanged.

    A save raises this error if another save was committed, or the checkpoint was deleted, while the save was in
    progress. The save then has no effect, and the other checkpoint can be loaded. ``save_id`` identifies this save, and
    ``other_save_id`` the checkpoint that is there now; each is None if it is not known. Saves that run at the same time
    need separate folders.
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
    """The folder has a checkpoint, and ``overwrite=False`` was passed. The checkpoint is unchanged."""


class CheckpointNotFoundError(CheckpointError):
    """The folder has no checkpoint, or only data that an interrupted save left behind."""


class WeightsError(AZStorageTorchError):
    """Weights cannot be published, because another publisher has published to the folder, or cannot be followed."""
