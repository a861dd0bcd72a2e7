"""Nodes for ``torchdata.nodes`` over blobs: list, shard, read, shuffle; each resumes exactly, at any point.

They can be combined with the nodes of torchdata:

.. code-block:: python

    from torchdata.nodes import Loader, ParallelMapper
    from azstoragetorch.nodes import (
        BlobLister, BlobReader, BlobSharder, ShuffleBuffer
    )

    container = "https://<account>.blob.core.windows.net/<container>"
    node = BlobSharder(BlobLister(f"{container}/train/", "*.jpg"))
    node = BlobReader(ShuffleBuffer(node, 10_000, seed=0))
    node = ParallelMapper(node, decode, num_workers=4)
    loader = Loader(node)  # with state_dict() and load_state_dict()

A state is a small new dict that can be stored as JSON. Items in flight are not part of it, and are fetched again. If a
node is reset while another thread is inside `next`, as Prefetcher does, that thread is interrupted: it sees the end of
the old iteration, and gets no item of the new one.
"""

from __future__ import annotations

import copy
import random
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, TypeVar

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import BlobURL, parse_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._samples.fetching import Fetched, fetch_ahead
from azstoragetorch._samples.items import BlobInfo, BlobRange, Item, ManifestBlob, plain_url
from azstoragetorch._samples.manifest import IfChanged, ManifestSource, check_if_changed
from azstoragetorch._samples.names import InvalidNames
from azstoragetorch._samples.prefetch import OrderedPrefetch
from azstoragetorch._samples.sources import Listing
from azstoragetorch._samples.steps import Run, State, Steps
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

__all__ = [
    "BlobInfo",
    "BlobLister",
    "BlobManifestLister",
    "BlobRange",
    "BlobReader",
    "BlobSharder",
    "ManifestBlob",
    "ShuffleBuffer",
]

T = TypeVar("T")
R = TypeVar("R", bound=Run)


class _Node(Steps[T, R], BaseNode, Generic[T, R]):  # type: ignore[misc]  # torchdata is not typed
    """A node whose items and state survive interrupts, handlers and resets from another thread.

    torchdata calls `next` of `Steps`, with no other line in between where an interrupt could lose what it returns.
    """

    def __init__(self, source: Any = None) -> None:
        Steps.__init__(self)
        BaseNode.__init__(self)
        self.source = source

    def reset(self, initial_state: State | None = None) -> None:
        """Begin again, or continue where *initial_state* was taken."""
        _interrupt(self)
        BaseNode.reset(self, initial_state)
        self.begin(initial_state)

    def get_state(self) -> State:
        """What `reset` continues from: small, JSON-able, a fresh copy."""
        return self.state()


@dataclass
class _Run:
    """An iteration that holds nothing: the next states come from its node's source."""

    state: State

    def interrupt(self) -> None:
        """Nothing of it blocks; its source is interrupted by itself."""

    def close(self) -> None:
        """Nothing to give back."""


def _interrupt(node: Any) -> None:
    """Give up the iteration of *node* and of all nodes that it draws from, torchdata's own in between or not."""
    while node is not None:
        if isinstance(node, _Node):
            node.give_up()
        node = getattr(node, "source", None)


@dataclass
class _Blobs(_Run):
    blobs: Iterator[BlobInfo]

    def note(self, blob: BlobInfo) -> None:  # noqa: ARG002
        """Count *blob*."""
        self.state = {**self.state, "position": self.state["position"] + 1}


B = TypeVar("B", bound=_Blobs)


class _BlobNode(_Node[BlobInfo, B], Generic[B]):
    """A node whose items are blobs of a listing."""

    def _step(self, run: B) -> BlobInfo:
        try:
            blob = next(run.blobs)
        except StopIteration:
            raise
        except Exception:
            self.restart(run)  # a generator that has raised would end here
            raise
        run.note(blob)
        return blob


class _Listed(_Blobs):
    def note(self, blob: BlobInfo) -> None:
        """Count *blob*, and add it to the checksum of all before."""
        position, trace = self.state["position"], self.state["trace"]
        self.state = {"position": position + 1, "trace": zlib.crc32(blob.url.encode(), trace)}


class BlobLister(_BlobNode[_Listed]):
    """Yields a :class:`BlobInfo` ``(url, size, etag)`` for each blob below its roots, lexicographically by root.

    Roots, masks and errors are those of :class:`azstoragetorch.datapipes.AzureBlobFileLister`. Each reset lists again.

    Resuming lists again up to the position, and raises ``ValueError`` if blobs were added or removed before it. The
    state holds a position and a checksum.

    Args:
        source: One root or several: URLs of containers, folders, or blobs, or prefixes of names.
        masks: `fnmatch` patterns, one of which must match.
        recursive: False lists one level only.
        invalid_names: ``"skip"`` or ``"raise"``, as for :class:`azstoragetorch.datapipes.AzureBlobFileLister`.
        include_folder_markers: Same as for :class:`azstoragetorch.datapipes.AzureBlobFileLister`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.
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
        self._clients = ClientFactory(credential, transfer, self._roots[0] if isinstance(source, str) else None)

    def _begin(self, state: State | None) -> _Listed:
        run = _Listed({"position": 0, "trace": 0}, self._listed())
        if state is not None:
            for _ in range(state["position"]):
                blob = next(run.blobs, None)
                if blob is None:
                    break
                run.note(blob)
            if run.state != {"position": state["position"], "trace": state["trace"]}:
                raise ValueError(
                    f"{', '.join(map(str, self._roots))}: the state does not fit what is listed now: blobs were "
                    "added or removed; resume on the data that the state was taken on, or begin a new epoch"
                )
        return run

    def _listed(self) -> Iterator[BlobInfo]:
        return (blob for root in self._roots for blob in self._listing.blobs(self._clients, root))


class BlobManifestLister(_BlobNode[_Blobs]):
    """Yields the blobs that a manifest lists, in the order of its rows, without listing the container.

    Each is a :class:`ManifestBlob`: readers raise ``BlobChangedError`` if the blob was overwritten after the manifest
    was made. Resuming continues at the row, wherever it is, and raises ``ValueError`` if the state is of another
    manifest. Needs pyarrow.

    Args:
        manifest_url: The folder of the manifest; see :func:`azstoragetorch.manifest.make_manifest`.
        container_url: The container that the manifest must list; required if it is in another account.
        if_changed: ``"raise"``, or ``"read"`` to yield :class:`BlobInfo`, whose blobs are read as they are now.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.
    """

    def __init__(
        self,
        manifest_url: str,
        *,
        container_url: str | None = None,
        if_changed: IfChanged = "raise",
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        super().__init__()
        self.if_changed = check_if_changed(if_changed)
        self._source = ManifestSource(
            manifest_url, container_url=container_url, credential=credential, transfer=transfer
        )

    def _begin(self, state: State | None) -> _Blobs:
        manifest = self._source.open()
        digest, position = manifest.description.digest, 0 if state is None else state["position"]
        if state is not None and state["digest"] != digest:
            raise ValueError(f"{manifest.folder}: the state is of another manifest, or it was made again with changes")
        return _Blobs({"position": position, "digest": digest}, manifest.blobs(position, self.if_changed))


@dataclass
class _Sharded(_Run):
    position: int  # items of the source that have passed, also since the state


class BlobSharder(_Node[T, _Sharded]):
    """Yields every n-th item of *source*: this rank's share.

    Args:
        source: The node to draw from; it must yield the same items on every rank.
        rank: This rank; by default, that of torch.distributed.
        world_size: Number of ranks; by default, that of torch.distributed.

    Raises:
        ValueError: *rank* is not a rank of *world_size*, or only one of the two is given.
    """

    def __init__(self, source: Any, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__(source)
        self._placement = Placement("rank_and_worker", rank, world_size)

    def _begin(self, state: State | None) -> _Sharded:
        place = self._placement.here()
        if state is not None and (state["rank"], state["world_size"]) != (place.shard, place.shards):
            raise ValueError(
                f"the state is that of rank {state['rank']} of {state['world_size']}, and this is rank "
                f"{place.shard} of {place.shards}"
            )
        self.source.reset(None if state is None else state["source"])
        position = 0 if state is None else state["position"]
        source = _state_of(self.source)
        return _Sharded(
            {"source": source, "position": position, "rank": place.shard, "world_size": place.shards}, position
        )

    def _step(self, run: _Sharded) -> T:
        rank, world_size = run.state["rank"], run.state["world_size"]
        while True:
            item: T = next(self.source)
            run.position += 1
            if (run.position - 1) % world_size == rank:
                run.state = {**run.state, "source": _state_of(self.source), "position": run.position}
                return item


def _state_of(source: Any) -> State:
    """A copy of the state of *source*, which may be a node that changes the state it returned before."""
    return copy.deepcopy(source.state_dict())


def _noted(source: Any, states: deque[State]) -> Iterator[Item]:
    """The items of *source*, whose state after each is added to *states*."""
    for item in source:
        states.append(_state_of(source))
        yield item


@dataclass
class _Reads(_Run):
    states: deque[State]  # of the source, after each item that is in flight
    ahead: OrderedPrefetch[Item, Fetched]

    def interrupt(self) -> None:
        self.ahead.interrupt()

    def close(self) -> None:
        self.ahead.close()

    def __del__(self) -> None:
        self.ahead.abandon()


class BlobReader(_Node[tuple[str, bytes], _Reads]):
    """Yields ``(url, data)`` with all bytes of each blob that *source* names, in order, with many in flight at once.

    Data in flight is bounded by bytes; a single larger blob is always admitted. It is not part of the state: resuming
    fetches it again. If a read fails, `next` raises the error, and the state stays before that blob.

    Args:
        source: Yields URLs, :class:`BlobInfo` or :class:`BlobRange`.
        concurrency: Concurrent requests; by default ``transfer.max_connections``.
        memory_limit: Maximum bytes in flight; by default ``transfer.memory_limit``.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Same as for :class:`~azstoragetorch.io.BlobIO`.

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
        config = ClientFactory(credential, transfer).config
        limits = {"max_connections": concurrency, "memory_limit": memory_limit}
        given = {name: value for name, value in limits.items() if value is not None}
        self._clients = ClientFactory(credential, replace(config, **given))  # type: ignore[arg-type]

    def _begin(self, state: State | None) -> _Reads:
        self.source.reset(None if state is None else state["source"])
        before = {"source": _state_of(self.source)}
        states: deque[State] = deque()
        ahead = fetch_ahead(self._clients, _noted(self.source, states), depth=self._clients.config.max_connections)
        return _Reads(before, states, ahead)

    def _step(self, run: _Reads) -> tuple[str, bytes]:
        work = next(run.ahead)
        state = run.states.popleft()
        fetched = work.result()
        sample = plain_url(fetched.client.url), fetched.whole()
        run.state = {"source": state}
        return sample


@dataclass
class _Shuffled(_Run, Generic[T]):
    drawn: list[T]
    buffer: list[T] | None = None  # `drawn` when it is full, shuffled


class ShuffleBuffer(_Node[T, _Shuffled[T]]):
    """Yields the items of *source* in an order that depends on (seed, epoch).

    It draws *buffer_size* items, yields them in random order, and draws the next ones. If the buffer holds all items,
    that is a complete shuffle. The state is small whatever the size of the buffer: the state of the source before the
    buffer was filled, and a position. Put it before the reader, so that it shuffles names; resuming then draws at most
    one buffer of names again.

    Each reset after items were drawn begins the next epoch.

    Args:
        source: The node to draw from.
        buffer_size: Items in the buffer.
        seed: Seed of all orders.

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

    def _begin(self, state: State | None) -> _Shuffled[T]:
        if state is None:
            self._epoch, self._has_drawn = self._epoch + self._has_drawn, False
        else:
            if (state["seed"], state["buffer_size"]) != (self.seed, self.buffer_size):
                raise ValueError(
                    f"the state is of seed={state['seed']} and buffer_size={state['buffer_size']}, and this has "
                    f"seed={self.seed} and buffer_size={self.buffer_size}"
                )
            self._epoch, self._has_drawn = state["epoch"], False
        self.source.reset(None if state is None else state["source"])
        return _Shuffled(
            {
                "source": _state_of(self.source),
                "epoch": self._epoch,
                "fill": 0 if state is None else state["fill"],
                "yielded": 0 if state is None else state["yielded"],
                "seed": self.seed,
                "buffer_size": self.buffer_size,
            },
            [],
        )

    def _step(self, run: _Shuffled[T]) -> T:
        self._has_drawn = True
        state = run.state
        buffer = run.buffer if run.buffer is not None else self._draw(run, state)
        if buffer and state["yielded"] >= len(buffer):
            run.state = state = {
                **state,
                "source": _state_of(self.source),
                "fill": state["fill"] + 1,
                "yielded": 0,
            }
            run.buffer, run.drawn = None, []
            buffer = self._draw(run, state)
        if not buffer:
            raise StopIteration
        item = buffer[state["yielded"]]
        run.state = {**state, "yielded": state["yielded"] + 1}
        return item

    def _draw(self, run: _Shuffled[T], state: State) -> list[T]:
        """The next items of the source, shuffled. After a failure of the source it continues where it was."""
        for item in islice(self.source, self.buffer_size - len(run.drawn)):
            run.drawn.append(item)
        buffer = list(run.drawn)
        random.Random(f"{self.seed} {state['epoch']} {state['fill']}").shuffle(buffer)
        run.buffer = buffer
        return buffer
