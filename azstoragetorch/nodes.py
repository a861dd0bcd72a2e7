"""Nodes for ``torchdata.nodes`` over blobs: list, shard, read, shuffle; each resumes exactly, at any point.

They compose with torchdata's own::

    from torchdata.nodes import Loader, ParallelMapper
    from azstoragetorch.nodes import BlobLister, BlobReader, BlobSharder, ShuffleBuffer

    node = BlobLister("https://<account>.blob.core.windows.net/<container>/train/", "*.jpg")
    node = ShuffleBuffer(BlobSharder(node), 10_000, seed=0)
    node = ParallelMapper(BlobReader(node), decode, num_workers=4)
    loader = Loader(node)  # with state_dict() and load_state_dict()

A state is small, JSON-able and a fresh copy; what is under way is no part of it, and is fetched again. A node that is
reset while another thread is inside `next`, as Prefetcher does, interrupts that thread; it gets the end of the
iteration that was given up, and no item of the new one.
"""

from __future__ import annotations

import copy
import random
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Generic, TypeVar

from azstoragetorch._blob.client import Access
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.engine import Cancelled
from azstoragetorch._samples.fetching import Fetched, fetch_ahead
from azstoragetorch._samples.items import BlobInfo, BlobRange, Item, plain_url
from azstoragetorch._samples.names import InvalidNames
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch._samples.sources import Listing
from azstoragetorch._samples.workers import Placement

_NEEDED = "0.11"

try:
    from torchdata import __version__ as _found
    from torchdata.nodes import BaseNode

    if tuple(map(int, _found.split(".")[:2])) < tuple(map(int, _NEEDED.split("."))):
        raise ImportError(f"found torchdata {_found}")
except ImportError as error:
    raise ImportError(
        f"azstoragetorch.nodes needs torchdata {_NEEDED} or newer ({error}): pip install 'torchdata>={_NEEDED}'"
    ) from error

__all__ = ["BlobInfo", "BlobLister", "BlobRange", "BlobReader", "BlobSharder", "ShuffleBuffer"]

T = TypeVar("T")
State = dict[str, Any]


class _Node(BaseNode, Generic[T]):  # type: ignore[misc]  # torchdata is not typed
    """A node that can be reset while another thread is inside `next`: that thread leaves first, with nothing."""

    def __init__(self, source: Any = None) -> None:
        super().__init__()
        self.source = source
        self._lock = threading.Lock()  # held by whoever is inside `next` or `reset`
        self._is_given_up = False

    def reset(self, initial_state: State | None = None) -> None:
        """Begin anew, or go on where *initial_state* was taken."""
        _interrupt(self)
        with self._lock:
            super().reset(initial_state)
            self._begin(initial_state)
            self._is_given_up = False

    def next(self) -> T:
        """The next item."""
        with self._lock:
            if self._is_given_up:
                raise StopIteration
            try:
                item = self._next()
            except Cancelled:
                if not self._is_given_up:
                    raise
                raise StopIteration from None
            if self._is_given_up:
                raise StopIteration
            return item

    def give_up(self) -> None:
        """End the present iteration for whoever is inside `next`. Called from any thread, without the lock."""
        self._is_given_up = True

    def _begin(self, state: State | None) -> None:
        raise NotImplementedError

    def _next(self) -> T:
        raise NotImplementedError


def _interrupt(node: Any) -> None:
    """Give up the iteration of *node* and of all nodes that it draws from, torchdata's own in between or not."""
    while node is not None:
        if isinstance(node, _Node):
            node.give_up()
        node = getattr(node, "source", None)


class BlobLister(_Node[BlobInfo]):
    """Yields a :class:`BlobInfo` ``(url, size, etag)`` for each blob below its roots, lexicographically by root.

    Roots, masks and errors are those of :class:`azstoragetorch.datapipes.AzureBlobFileLister`. Each reset lists anew.

    Resuming lists up to the position again and compares what it passes: it raises ``ValueError`` if blobs were added
    or removed there. The state holds a position and a checksum.

    Args:
        source: One root or several: URLs of containers, folders, blobs or beginnings of names.
        masks: `fnmatch` patterns, one of which has to match.
        recursive: False lists one level only.
        invalid_names: ``"skip"`` or ``"raise"``, as for :class:`azstoragetorch.datapipes.AzureBlobFileLister`.
        include_folder_markers: As there.
        credential: As for :class:`~azstoragetorch.io.BlobIO`.
        transfer: As for :class:`~azstoragetorch.io.BlobIO`.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        masks: str | Sequence[str] = "",
        *,
        recursive: bool = True,
        invalid_names: InvalidNames = "skip",
        include_folder_markers: bool = False,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        roots = [source] if isinstance(source, str) else source
        self._roots: list[BlobURL] = [parse_url(root, argument="source") for root in roots]
        self._listing = Listing.of(masks, recursive, invalid_names, include_folder_markers)
        self._access = Access(credential, transfer, self._roots[0] if isinstance(source, str) else None)

    def get_state(self) -> State:
        """How many blobs were yielded, and which, by a checksum."""
        return {"position": self._position, "trace": self._trace}

    def _begin(self, state: State | None) -> None:
        self._position = self._trace = 0
        self._blobs = (blob for root in self._roots for blob in self._listing.blobs(self._access, root))
        if state is not None:
            for _ in range(state["position"]):
                blob = next(self._blobs, None)
                if blob is None:
                    break
                self._note(blob)
            if self.get_state() != {"position": state["position"], "trace": state["trace"]}:
                raise ValueError(
                    f"{', '.join(map(str, self._roots))}: the state does not fit what is listed now: blobs were "
                    "added or removed; resume on the data that the state was taken on, or begin a new epoch"
                )

    def _next(self) -> BlobInfo:
        blob = next(self._blobs)
        self._note(blob)
        return blob

    def _note(self, blob: BlobInfo) -> None:
        self._position += 1
        self._trace = zlib.crc32(blob.url.encode(), self._trace)


class BlobSharder(_Node[T]):
    """Yields every n-th item of *source*: the share of this rank.

    Args:
        source: The node to draw from, the same in every rank.
        rank: This rank; by default torch.distributed's.
        world_size: Number of ranks; by default torch.distributed's.

    Raises:
        ValueError: *rank* is no rank of *world_size*, or only one of the two is given.
    """

    def __init__(self, source: Any, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__(source)
        self._placement = Placement("rank_and_worker", rank, world_size)

    def get_state(self) -> State:
        """The state of the source, and how many of its items have passed."""
        return {
            "source": _state_of(self.source),
            "position": self._position,
            "rank": self._rank,
            "world_size": self._world_size,
        }

    def _begin(self, state: State | None) -> None:
        place = self._placement.here()
        self._rank, self._world_size = place.shard, place.shards
        self._position = 0
        if state is not None:
            if (state["rank"], state["world_size"]) != (self._rank, self._world_size):
                raise ValueError(
                    f"the state is that of rank {state['rank']} of {state['world_size']}, and this is rank "
                    f"{self._rank} of {self._world_size}"
                )
            self._position = state["position"]
        self.source.reset(None if state is None else state["source"])

    def _next(self) -> T:
        while True:
            item: T = next(self.source)
            self._position += 1
            if (self._position - 1) % self._world_size == self._rank:
                return item


def _state_of(source: Any) -> State:
    """A copy of the state of *source*, which may be a node that goes on changing what it gives out."""
    return copy.deepcopy(source.state_dict())


def _noted(source: Any, states: deque[State]) -> Iterator[Item]:
    """The items of *source*, whose state after each is added to *states*."""
    for item in source:
        states.append(_state_of(source))
        yield item


class BlobReader(_Node[tuple[str, bytes]]):
    """Yields ``(url, data)`` with all bytes of each blob that *source* names, in order, many on their way at once.

    What is on its way is bounded by bytes; a single blob that is larger is always admitted. It is no part of the state:
    resuming fetches it again. Where a read fails, so does `next`, and the state is still before that blob.

    Args:
        source: Yields URLs, :class:`BlobInfo` or :class:`BlobRange`.
        concurrency: Requests at once; by default ``transfer.max_connections``.
        memory_limit: Bytes on their way at most; by default ``transfer.memory_limit``.
        credential: As for :class:`~azstoragetorch.io.BlobIO`.
        transfer: As for :class:`~azstoragetorch.io.BlobIO`.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    def __init__(
        self,
        source: Any,
        concurrency: int | None = None,
        memory_limit: int | None = None,
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__(source)
        config = Access(credential, transfer).config
        limits = {"max_connections": concurrency, "memory_limit": memory_limit}
        given = {name: value for name, value in limits.items() if value is not None}
        self._access = Access(credential, replace(config, **given))  # type: ignore[arg-type]
        self._ahead: OrderedPrefetch[Item, Fetched] | None = None

    def get_state(self) -> State:
        """The state of the source as of the last blob that was yielded."""
        return {"source": copy.deepcopy(self._state)}

    def give_up(self) -> None:
        super().give_up()
        if self._ahead is not None:
            self._ahead.interrupt()

    def __del__(self) -> None:
        ahead = getattr(self, "_ahead", None)
        if ahead is not None:
            ahead.abandon()

    def _begin(self, state: State | None) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self.source.reset(None if state is None else state["source"])
        self._state: State = _state_of(self.source)
        self._states: deque[State] = deque()  # of the source, after each item that is on its way
        self._ahead = fetch_ahead(
            self._access, _noted(self.source, self._states), depth=self._access.config.max_connections
        )

    def _next(self) -> tuple[str, bytes]:
        assert self._ahead is not None
        work = next(self._ahead)
        state = self._states.popleft()
        fetched = work.result()
        sample = plain_url(fetched.client.url), fetched.whole()
        self._state = state
        return sample


class ShuffleBuffer(_Node[T]):
    """Yields the items of *source* in an order that depends on (seed, epoch).

    It draws *buffer_size* items, yields them shuffled, and draws the next. That is a complete shuffle if the buffer
    holds all, and its state is small whatever it holds: where the source was before the buffer was filled. Put it in
    front of the reader, so that it shuffles names; resuming then draws at most one buffer of them again.

    Each reset after items were drawn begins the next epoch.

    Args:
        source: The node to draw from.
        buffer_size: Items in the buffer.
        seed: Of all orders.

    Raises:
        ValueError: *buffer_size* is below 1.
    """

    def __init__(self, source: Any, buffer_size: int = 10_000, seed: int = 0) -> None:
        super().__init__(source)
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, not {buffer_size}")
        self.buffer_size = buffer_size
        self.seed = seed
        self._epoch = 0
        self._has_drawn = False

    def get_state(self) -> State:
        """Where the source was when the buffer was filled, and how many of the buffer were yielded."""
        return {
            "source": copy.deepcopy(self._filled_from),
            "epoch": self._epoch,
            "fill": self._fill,
            "yielded": self._yielded,
            "seed": self.seed,
            "buffer_size": self.buffer_size,
        }

    def _begin(self, state: State | None) -> None:
        self._buffer: list[T] | None = None
        self._drawing: list[T] = []
        self._fill = self._yielded = 0
        if state is None:
            self._epoch += self._has_drawn
        else:
            if (state["seed"], state["buffer_size"]) != (self.seed, self.buffer_size):
                raise ValueError(
                    f"the state is of seed={state['seed']} and buffer_size={state['buffer_size']}, and this has "
                    f"seed={self.seed} and buffer_size={self.buffer_size}"
                )
            self._epoch, self._fill, self._yielded = state["epoch"], state["fill"], state["yielded"]
        self._has_drawn = False
        self.source.reset(None if state is None else state["source"])
        self._filled_from: State = _state_of(self.source)

    def _next(self) -> T:
        self._has_drawn = True
        buffer = self._buffer if self._buffer is not None else self._drawn()
        if self._yielded >= len(buffer):
            if not buffer:
                raise StopIteration
            self._buffer = None
            self._filled_from = _state_of(self.source)
            self._fill, self._yielded = self._fill + 1, 0
            buffer = self._drawn()
            if not buffer:
                raise StopIteration
        item = buffer[self._yielded]
        self._yielded += 1
        return item

    def _drawn(self) -> list[T]:
        """The next items of the source, shuffled. After a failure of the source it goes on where it was."""
        for item in islice(self.source, self.buffer_size - len(self._drawing)):
            self._drawing.append(item)
        buffer, self._drawing = self._drawing, []
        random.Random(f"{self.seed} {self._epoch} {self._fill}").shuffle(buffer)
        self._buffer = buffer
        return buffer
