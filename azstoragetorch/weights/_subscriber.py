"""Follow a stream of weights: fetch what is new into a private copy, and hand it over at once.

What a subscriber has is always one published step, bit for bit. A delta is applied only to the very blob that it is a
difference to, and only after all of its bytes were compared with the digest in the pointer; each tensor is compared
with its own digest afterwards. Whatever fails leads to the last full blob, which needs no other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from azure.core.exceptions import AzureError

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.job import Job
from azstoragetorch._engine.memory import new_buffer
from azstoragetorch._engine.threads import engine_for
from azstoragetorch._tensors.hashing import algorithm_of, digest_of
from azstoragetorch._tensors.host import view_of
from azstoragetorch.exceptions import AZStorageTorchError, WeightsError
from azstoragetorch.weights._delta import RAW, Change, apply, bits_of
from azstoragetorch.weights._format import POINTER, Link, Part, load_header
from azstoragetorch.weights._place import Place

log = logging.getLogger("azstoragetorch")

_TRIES = 4  # while the publisher publishes in between


class _State:
    """The tensors of one blob of a stream and, since it was fetched in full, where they came from."""

    def __init__(self, link: Link, tensors: dict[str, torch.Tensor]) -> None:
        self.link = link
        self.tensors = tensors


class Subscriber:
    """Follows the weights in the folder *url*; made by `subscribe`. Not thread-safe.

    A subscriber keeps a copy of all tensors in host memory. `poll` brings the copy up to date while the model works
    with its own tensors, and `apply` copies what changed into them.
    """

    def __init__(self, url: str, *, credential: Credential = None, transfer: TransferConfig | None = None) -> None:
        self._place = Place(url, credential, transfer)
        self._state: _State | None = None
        self._stale: set[str] = set()  # names of tensors that changed since the last `apply`
        self._seen: str | None = None  # ETag of the pointer whose chain was followed to its end
        self._warned: str | None = None
        self._ahead: Job[int | None] | None = None

    @property
    def step(self) -> int | None:
        """The step of the fetched weights; None before the first ones."""
        return self._state.link.step if self._state is not None else None

    def prefetch(self) -> None:
        """Begin to fetch in the background what the next `poll` will return. Call nothing but `poll` before that."""
        if self._ahead is None:
            self._ahead = Job(self._poll)
            engine_for(self._place.config).submit(self._ahead.run)

    def poll(self) -> int | None:
        """Fetch what was published since the last call; return its step, or None if there is nothing new.

        Takes one request without a body if there is nothing new. If a delta is missing or damaged, the subscriber stays
        at the step before it, with a warning, until the next full weights are published.

        Raises:
            WeightsError: there are no weights yet that this could stay at, and those that were published are damaged;
                the message says what is missing.
            AzureError: the service refused the request, or could not be reached; call again.
        """
        ahead, self._ahead = self._ahead, None
        with torch.inference_mode(False):  # the copy is changed later, in any mode and on any thread
            return ahead.result() if ahead is not None else self._poll()

    def apply(self, state_dict: Mapping[str, torch.Tensor]) -> int | None:
        """Copy the tensors that changed since the last call into those of *state_dict*; return the step.

        The first call copies all. Pass the same tensors each time: only what changed since the last call is copied. No
        requests are made.

        Raises:
            WeightsError: nothing was fetched yet, or *state_dict* lacks a tensor or has one of another type or shape;
                nothing is changed.
        """
        state = self._state
        if state is None:
            raise WeightsError(f"{self._place.url}: no weights were fetched yet; poll first")
        for name in self._stale:
            target, source = state_dict.get(name), state.tensors[name]
            if target is None or target.dtype != source.dtype or target.shape != source.shape:
                found = "missing" if target is None else f"{target.dtype} of the shape {tuple(target.shape)}"
                raise WeightsError(
                    f"{self._place.url}: {name!r} is {source.dtype} of the shape {tuple(source.shape)}, and in the "
                    f"state dict it is {found}; nothing was changed"
                )
        for name in sorted(self._stale):
            target = state_dict[name]
            # A tensor that was made in inference mode can be written to in that mode alone.
            with torch.inference_mode() if target.is_inference() else torch.no_grad():
                target.detach().copy_(state.tensors[name])
        self._stale = set()
        return state.link.step

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors that were fetched, in host memory; empty before the first ones."""
        return {name: tensor.clone() for name, tensor in self._state.tensors.items()} if self._state is not None else {}

    # -- fetching -----------------------------------------------------------------------------------------------------

    def _poll(self) -> int | None:
        before = self._state.link.name if self._state is not None else None
        version = self._place.blob(POINTER).version()
        if version is None or version.etag == self._seen:
            return None
        failure: tuple[Link, Exception] | None = None
        etag: str | None = None
        for _ in range(_TRIES):
            previous = etag
            etag, pointer = self._place.pointer()
            if pointer is None or etag == previous:
                break  # blobs are missing, and not because the publisher has deleted them meanwhile
            failure = self._follow(pointer.chain)
            if failure is None:
                self._seen = etag
                break
        if failure is not None:
            self._failed(*failure)
        state = self._state
        return state.link.step if state is not None and state.link.name != before else None

    def _follow(self, chain: Sequence[Link]) -> tuple[Link, Exception] | None:
        """Get to the end of *chain*, or as far as possible; the blob that is missing or damaged, and the error."""
        names = [link.name for link in chain]
        state = self._state
        at = names.index(state.link.name) + 1 if state is not None and state.link.name in names else 0
        for number, link in enumerate(chain[at:], at):
            try:
                self._take(link)
            except (AZStorageTorchError, AzureError) as error:  # noqa: PERF203 - it ends the loop
                if self._state is None and number:  # the copy was damaged: get back to where it was
                    self._follow(chain[:number])
                return link, error
        return None

    def _failed(self, link: Link, error: Exception) -> None:
        if self._state is None:
            raise WeightsError(
                f"{self._place.url}: the weights of step {link.step} cannot be loaded: "
                f"{self._place.blob(link.name).url} is missing or damaged: {error}"
            ) from error
        if self._warned != link.name:
            self._warned = link.name
            log.warning(
                "%s: the weights stay at step %d until the next full ones: those of step %d cannot be loaded: %s: %s",
                self._place.url,
                self._state.link.step,
                link.step,
                link.name,
                error,
            )

    def _take(self, link: Link) -> None:
        """Bring the copy to *link*, all or nothing."""
        data = self._fetch(link)
        base, parts, rest = load_header(data)
        if link.is_full:
            try:
                tensors = {part.name: _tensor(part, rest) for part in parts}
            except (RuntimeError, ValueError, TypeError) as error:
                raise WeightsError(f"it does not consist of tensors: {error}") from error
            if base is not None or len(tensors) != len(parts):
                raise WeightsError("it is not full")
            self._check(parts, tensors)
            self._stale = self._stale & tensors.keys() | self._changed(tensors)
            self._state = _State(link, tensors)
            return
        state = self._state
        if state is None or base != state.link.name:
            raise WeightsError(f"it is a difference to {base}, and {state.link.name if state else 'nothing'} is here")
        self._state = None  # if this is interrupted, the copy is of no step
        try:
            self._place.each(lambda part: _apply(part, rest, state.tensors), parts)
            self._check(parts, state.tensors)
        except (WeightsError, RuntimeError, ValueError) as error:
            raise WeightsError(f"{error}; the full weights are fetched again") from error
        self._stale |= {part.name for part in parts}
        self._state = _State(link, state.tensors)

    def _changed(self, tensors: dict[str, torch.Tensor]) -> set[str]:
        """The names of those of *tensors* whose bits are not those of the copy before."""
        known = self._state.tensors if self._state is not None else {}
        return {
            name
            for name, tensor in tensors.items()
            if name not in known
            or (known[name].dtype, known[name].shape) != (tensor.dtype, tensor.shape)
            or not torch.equal(bits_of(known[name]), bits_of(tensor))
        }

    def _fetch(self, link: Link) -> memoryview:
        reader = self._place.blob(link.name).reader()
        try:
            size = reader.size()
            if size != link.size:
                raise WeightsError(f"it has {size} bytes, and {link.size} were published")
            data = new_buffer(size)
            reader.readinto(0, data)
        finally:
            reader.close()
        found = digest_of([data], algorithm_of(link.digest))
        if found != link.digest:
            raise WeightsError(f"its digest is {found}, and {link.digest} was published")
        return data

    def _check(self, parts: Sequence[Part], tensors: dict[str, torch.Tensor]) -> None:
        def compare(part: Part) -> None:
            found = digest_of([view_of(tensors[part.name])], algorithm_of(part.digest))
            if found != part.digest:
                raise WeightsError(f"{part.name!r} has the digest {found}, and {part.digest} was published")

        self._place.each(compare, parts)

    def __repr__(self) -> str:
        return f"Subscriber({self._place.url!r}, step={self.step})"


def _tensor(part: Part, data: memoryview) -> torch.Tensor:
    """A tensor of a full blob, in its memory."""
    if part.form != RAW or part.length != part.nbytes:
        raise WeightsError(f"{part.name!r} is not full")
    if not part.length:
        return torch.empty(part.shape, dtype=part.torch_dtype, device="cpu")
    found = torch.frombuffer(data, dtype=torch.uint8, count=part.length, offset=part.offset)
    return found.view(part.torch_dtype).reshape(part.shape)


def _apply(part: Part, data: memoryview, tensors: dict[str, torch.Tensor]) -> None:
    tensor = tensors.get(part.name)
    if tensor is None or tensor.dtype != part.torch_dtype or tuple(tensor.shape) != part.shape:
        raise WeightsError(f"it changes {part.name!r}, which is not in its base")
    apply(tensor, Change(part.form, part.count, data[part.offset : part.offset + part.length]))
