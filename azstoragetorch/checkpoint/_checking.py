"""Compare what was loaded with the digests of what was saved.

A tensor that is loaded whole, in its own type, is compared in the memory that it was loaded into, on any device: the
digest covers everything that happened in between. Of a tensor that is loaded in part or converted, the whole item is
fetched and compared before the part is taken from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from azstoragetorch._engine.config import MiB
from azstoragetorch._tensors.hashing import algorithm_of, digest_of
from azstoragetorch._tensors.host import Copiers, host_bytes
from azstoragetorch.checkpoint._folder import Folder
from azstoragetorch.checkpoint._format import Digests, place_of
from azstoragetorch.checkpoint._reads import Read
from azstoragetorch.exceptions import CheckpointError

_CHUNK = 16 * MiB  # bytes that are copied at once to the host for their digest


class Check:
    """Compares items of the checkpoint in *folder* with *digests*."""

    def __init__(self, folder: Folder, digests: Digests) -> None:
        self._folder = folder
        self._digests = digests

    def prepare(self, read: Read, target_of: Callable[[Read], torch.Tensor]) -> None:
        """Have the whole item fetched if only a part of it is read, or if it is converted to another type.

        Raises:
            CheckpointError: the item has no digest.
        """
        self._expected(read)
        payload = read.payload
        if payload is not None:
            is_whole = read.box.lengths == payload.shape and not any(read.box.offsets) and payload.is_contiguous
            if not is_whole or target_of(read).dtype != payload.dtype:
                read.payload = None

    def target(self, read: Read, target: torch.Tensor) -> None:
        """Compare *target*, which has received all of the item.

        Raises:
            CheckpointError: it is not what was saved.
        """
        payload = read.item.payload
        if payload is not None and target.dtype == payload.dtype:  # others have it from one that was compared
            self._compare(read, host_bytes(target, Copiers().of(target.device), _CHUNK))

    def item(self, read: Read, data: memoryview) -> None:
        """Compare *data*, all bytes of the item.

        Raises:
            CheckpointError: it is not what was saved.
        """
        _, start, stop = place_of(read.item)
        self._compare(read, [data[start - read.item.offset : stop - read.item.offset]])

    def _expected(self, read: Read) -> str:
        digest = self._digests.of(read.item)
        if digest is None:
            raise CheckpointError(f"{read.key!r} cannot be verified: there is no digest of it", key=read.key)
        return digest

    def _compare(self, read: Read, pieces: Iterable[memoryview]) -> None:
        expected = self._expected(read)
        found = digest_of(pieces, algorithm_of(expected))
        if found != expected:
            path, start, stop = place_of(read.item)
            raise CheckpointError(
                f"{read.key!r} is not what was saved: bytes {start} to {stop} of {self._folder.blob(path).url} have "
                f"the digest {found}, and the digest of the save is {expected}",
                key=read.key,
            )
