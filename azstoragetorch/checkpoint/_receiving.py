"""Receive ranges of data blobs into memory. Errors name the entries that are stored there."""

from __future__ import annotations

from azure.core.exceptions import AzureError, ResourceNotFoundError

from azstoragetorch._engine.scope import Scope
from azstoragetorch._tensors.pinned import PinnedBlob, TruncatedError
from azstoragetorch._tensors.planning import Request
from azstoragetorch.checkpoint._folder import Folder, picklable
from azstoragetorch.checkpoint._reads import named
from azstoragetorch.exceptions import BlobChangedError, CheckpointError


class DataBlobs:
    """The data blobs of the checkpoint in *folder*, for one load."""

    def __init__(self, folder: Folder, hint: str = "") -> None:
        self._hint = hint  # what else an overwritten blob may mean
        self._folder = folder
        self._transfer = folder.transfer
        self._blobs: dict[str, PinnedBlob] = {}

    def add(self, path: str, etag: str | None) -> None:
        """Take the blob at *path* for one of them, of the version *etag* if that is known."""
        if path not in self._blobs:
            self._blobs[path] = PinnedBlob(self._folder.blob(path))
        if etag is not None:
            self._blobs[path].etag = etag

    def receive(self, request: Request, targets: list[memoryview], keys: list[str], scope: Scope) -> None:
        """Receive the bytes of *request*, those of each of its pieces into the target of that piece.

        Raises:
            CheckpointError: it could not be done; the message names *keys*, which are those of the pieces.
        """
        blob = self._blobs[request.blob]
        # An MD5 is that of all bytes of an answer, and the service computes none for more than some MiB.
        part = self._transfer.effective_part_size if self._transfer.validate_content else None
        try:
            blob.receive_request(request, targets, scope, validated_part=part)
        except TruncatedError as error:
            raise CheckpointError(
                f"{blob.client.url}, which holds {named(keys)}, is truncated: it has {error.size} bytes, and the "
                f"checkpoint needs {request.stop}",
                key=keys[0],
            ) from None
        except (ResourceNotFoundError, BlobChangedError) as error:
            # A blob that is gone may fail the condition on its version before it is missed.
            is_gone = isinstance(error, ResourceNotFoundError) or blob.client.version() is None
            state = (
                "is missing"
                if is_gone
                else f"is not the one that was saved, or was overwritten while it was read{self._hint}"
            )
            raise CheckpointError(
                f"the data blob {request.blob} with {named(keys)} {state} ({error})", key=keys[0]
            ) from picklable(error)
        except AzureError as error:
            raise CheckpointError(
                f"{named(keys)} in {request.blob}: {type(error).__name__}: {error}", key=keys[0]
            ) from picklable(error)
