"""What the writer and the reader have in common: the folder that they were given, and how torch addresses it."""

from __future__ import annotations

from typing import Any

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.checkpoint._folder import Folder, is_url


class FolderStorage:
    """The part of a `StorageWriter` and of a `StorageReader` that says where the checkpoint is."""

    def __init__(self, url: str, credential: Credential, transfer: TransferConfig | None) -> None:
        super().__init__()
        self._folder = Folder(url, credential, transfer)

    @property
    def checkpoint_id(self) -> str:
        """The URL of the folder, without a SAS."""
        return self._folder.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.checkpoint_id!r})"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Whether *checkpoint_id* is a URL that this class understands."""
        return is_url(checkpoint_id)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a new save or load, of the folder *checkpoint_id* if that is not None.

        Raises:
            TypeError: *checkpoint_id* is not a str; a path object loses one of the slashes after the scheme.
            ValueError: it is not a URL, or it is one in another account.
        """
        if checkpoint_id is not None:
            self._folder = self._folder.at(checkpoint_id)
