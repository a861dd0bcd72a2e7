"""Publish weights: everything every so often, and differences in between, committed by one pointer.

Blobs have names that no other blob has, so writing one harms nothing. The pointer is replaced under the condition that
it is what this publisher has written last: if another publisher has written since, this one gets an error. A
publisher that was killed leaves blobs that nothing refers to; the next full one deletes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from azure.core.exceptions import AzureError

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.scope import on_error
from azstoragetorch._tensors.hashing import best_algorithm, digest_of
from azstoragetorch._tensors.host import view_of
from azstoragetorch.exceptions import AZStorageTorchError, WeightsError
from azstoragetorch.weights._delta import RAW, Change, difference
from azstoragetorch.weights._format import ALIGNMENT, POINTER, Link, Part, Pointer, dump_header, dump_pointer, new_name
from azstoragetorch.weights._place import Place

log = logging.getLogger("azstoragetorch")

_WORTH_IT = 2  # times smaller than everything, or else everything is published


@dataclass(frozen=True)
class Published:
    """What a call of `Publisher.publish` has published.

    Attributes:
        step: The step.
        is_full: Whether it is everything, rather than a delta.
        nbytes: Bytes of the blob.
        total: Bytes of all tensors.
    """

    step: int
    is_full: bool
    nbytes: int
    total: int


class Publisher:
    """Publishes weights to the folder *url*, for any number of `subscribe` calls elsewhere.

    The first call of `publish`, every *full_every*-th one, and every one after a failure publish all tensors. The
    others publish the elements that changed since the call before, if that takes less than half of the bytes. A
    publisher keeps a copy of all tensors in memory. Use one publisher for each folder; not thread-safe.

    Args:
        url: URL of the folder, in any of the forms that :doc:`the guide </guide/urls>` lists.
        full_every: Publish everything with every so many calls, at least 1. Subscribers that start or that miss a
            delta fetch the last full blob and all deltas after it.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`. It must allow reading, writing, listing, and
            deleting.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        ValueError: *url* is not a valid URL, or names a snapshot; *full_every* is less than 1.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        url: str,
        *,
        full_every: int = 20,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        if isinstance(full_every, bool) or not isinstance(full_every, int):
            raise TypeError(f"full_every must be an integer, not {type(full_every).__name__}")
        if full_every < 1:
            raise ValueError(f"full_every must be at least 1, not {full_every}")
        self._place = Place(url, credential, transfer)
        self._full_every = full_every
        self._tensors: dict[str, torch.Tensor] | None = None  # as published last, if that is certain
        self._pointer: Pointer | None = None
        self._etag: str | None = None

    def publish(self, state_dict: Mapping[str, torch.Tensor], step: int) -> Published:
        """Publish all tensors of *state_dict*. When this returns, subscribers see them.

        Args:
            state_dict: Dense tensors by name, on any device. Gather sharded ones first.
            step: A number that subscribers get, such as that of the training step.

        Raises:
            TypeError: a value is not a dense tensor, or *step* is not an integer.
            WeightsError: another publisher has published to the folder in the meantime; what it has published stays.
            FatalBlobIOWriteError: the blob could not be written; what was published before stays.
            AzureError: the service refused the request, or could not be reached.
        """
        _check(state_dict, step)
        known, self._tensors = self._tensors, None  # an error or interrupt leaves it unknown what was published
        if known is None:
            self._etag, self._pointer = self._place.pointer()
        chain = self._pointer.chain if self._pointer is not None else ()
        tensors: dict[str, torch.Tensor] = {}
        changes: list[tuple[Part, Change]] | None = None
        if known is not None and len(chain) < self._full_every and _forms(known) == _forms(state_dict):
            tensors, changes = self._differences(known, state_dict)
        if changes is None:
            tensors = {name: _host_copy(tensor) for name, tensor in state_dict.items()}
            changes = self._everything(tensors)
            base = None
        else:
            base = chain[-1].name
        link = self._write(base, changes, step, chain[-1].sequence + 1 if chain else 0)
        self._commit(link)
        self._tensors = tensors
        total = sum(tensor.nbytes for tensor in tensors.values())
        return Published(step, base is None, link.size, total)

    def _differences(
        self, known: dict[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[tuple[Part, Change]] | None]:
        """The new tensors and what changed; None in the place of the latter if everything is not much longer."""
        algorithm = best_algorithm()

        def compare(name: str) -> tuple[str, torch.Tensor, Change | None, str]:
            old, new = known[name], _host_copy(state_dict[name])
            change = difference(old, new)
            if change is None:
                return name, old, None, ""
            return name, new, change, digest_of([view_of(new)], algorithm)

        found = self._place.each(compare, known)
        tensors = {name: tensor for name, tensor, _, _ in found}
        changes = [
            (_part(name, tensor, change, digest), change)
            for name, tensor, change, digest in found
            if change is not None
        ]
        total = sum(tensor.nbytes for tensor in tensors.values())
        is_short = sum(len(change.data) for _, change in changes) * _WORTH_IT <= total
        return tensors, changes if is_short else None

    def _everything(self, tensors: dict[str, torch.Tensor]) -> list[tuple[Part, Change]]:
        algorithm = best_algorithm()

        def whole(name: str) -> tuple[Part, Change]:
            tensor = tensors[name]
            change = Change(RAW, tensor.numel(), view_of(tensor))
            return _part(name, tensor, change, digest_of([change.data], algorithm)), change

        return self._place.each(whole, tensors)

    def _write(self, base: str | None, changes: list[tuple[Part, Change]], step: int, sequence: int) -> Link:
        """Write a blob that the pointer does not name yet."""
        name = new_name("full" if base is None else "delta", sequence)
        pieces = list(_pieces(base, changes))
        size = sum(piece.nbytes for piece in pieces)
        digest = digest_of(pieces, best_algorithm())
        config = self._place.config
        writer = self._place.blob(name).writer()
        with on_error(writer.abort):
            if size <= config.block_size:
                writer.put(pieces)
            else:
                writer.write_pieces(pieces, block_size=config.block_size, concurrency=config.initial_concurrency)
                writer.commit()
        return Link(name, size, digest, step, sequence)

    def _commit(self, link: Link) -> None:
        """Make *link* the newest blob of the stream."""
        before = self._pointer
        if link.is_full:
            kept = tuple(other.name for other in before.chain) if before is not None else ()
            pointer = Pointer((link,), kept)
        else:
            assert before is not None
            pointer = Pointer((*before.chain, link), before.previous)
        is_ours, found = self._place.blob(POINTER).replace(dump_pointer(pointer), etag=self._etag)
        if not is_ours or found is None:
            raise WeightsError(
                f"{self._place.url}: another publisher has published here, so step {link.step} has no effect and what "
                "is there is unchanged; a folder has one publisher at a time"
            )
        self._pointer, self._etag = pointer, found.version.etag
        if link.is_full:
            self._discard(pointer)

    def _discard(self, pointer: Pointer) -> None:
        """Delete what no reader can need: all but the current chain and the one before."""
        kept = {pointer.last.name, *pointer.previous}
        try:
            for name in self._place.names():
                if name not in kept:
                    self._place.blob(name).delete()
        except (AzureError, AZStorageTorchError) as error:
            log.warning("%s: old weights were not deleted, the next full ones will be: %s", self._place.url, error)

    def __repr__(self) -> str:
        return f"Publisher({self._place.url!r})"


def _check(state_dict: Mapping[str, torch.Tensor], step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an integer, not {type(step).__name__}")
    for name, tensor in state_dict.items():
        is_dense = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not is_dense or tensor.is_quantized or tensor.device.type == "meta":
            raise TypeError(
                f"state_dict: {name!r} is a {type(tensor).__name__}, and only dense tensors are published; gather "
                "sharded ones first, for example with full_tensor()"
            )


def _forms(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in host memory, which the training does not change."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    with torch.no_grad():
        copy.copy_(tensor.detach())
    return copy


def _part(name: str, tensor: torch.Tensor, change: Change, digest: str) -> Part:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Part(name, dtype, tuple(tensor.shape), change.form, change.count, 0, len(change.data), digest)


def _pieces(base: str | None, changes: list[tuple[Part, Change]]) -> Iterator[memoryview]:
    """The content of a blob, with every tensor at a multiple of the alignment."""
    parts, data, at = [], [], 0
    for part, change in changes:
        parts.append(Part(**{**vars(part), "offset": at}))
        padding = -part.length % ALIGNMENT
        data += [change.data, memoryview(bytes(padding))]
        at += part.length + padding
    yield memoryview(dump_header(base, parts))
    yield from (piece for piece in data if piece.nbytes)
