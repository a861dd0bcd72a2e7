"""The last pipe of a graph that resumes exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from azstoragetorch._samples.workers import Placement, ShardBy, Shared
from azstoragetorch.datapipes._base import (
    Batcher,
    Collator,
    DataPipeGraph,
    IterDataPipe,
    Mapper,
    apply_random_seed,
    apply_sharding,
    get_all_graph_pipes,
    traverse_dps,
)
from azstoragetorch.datapipes._reading import BlobRangeSplitterIterDataPipe, Reading
from azstoragetorch.datapipes._writing import AzureBlobSaverIterDataPipe

_VERSION = 1
_FIELDS = {"version", "seed", "epoch", "shards", "shard", "position", "read"}
_DRAWS_AHEAD = (Reading, BlobRangeSplitterIterDataPipe, AzureBlobSaverIterDataPipe)


class ResumableDataPipe(IterableDataset[Any]):
    """A dataset over a graph of pipes that resumes exactly, mid-epoch.

    It shards the graph by worker and rank, and seeds it by (seed, epoch), so that `shuffle` has the same order in every
    worker, and again when an epoch is resumed. It is therefore not a pipe but an `IterableDataset`: pass it to a
    ``StatefulDataLoader``, or call `state_dict` and `load_state_dict` yourself.

    Resuming repeats the cheap steps (listing, shuffling, sharding) up to the position. If only `map`, `collate`, and
    `batch` follow the last reader (`open_files_by_azure`, `load_files_by_azure`, `read_files_by_azure`), so that each
    of its items becomes one sample, consumed items are not read again; otherwise, for example after a tar, they are
    read and dropped. The state of global random generators is not restored.

    Args:
        source_datapipe: The end of the graph. It should have `sharding_filter` or `shard_blobs` after the lister;
            otherwise, every worker reads everything and drops what is not its share, with a warning.
        seed: Seed of all pipes that have one.
        shard_by: ``"rank_and_worker"``; ``"worker"`` or ``"none"`` if the graph itself distinguishes ranks or workers.
        rank: Replaces the rank of torch.distributed.
        world_size: Replaces the world size of torch.distributed.
    """

    def __init__(
        self,
        source_datapipe: IterDataPipe[Any],
        seed: int = 0,
        *,
        shard_by: ShardBy = "rank_and_worker",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.source_datapipe = source_datapipe
        self.seed = seed
        self._placement = Placement(shard_by, rank, world_size)
        self._shared = Shared()
        self._pending: dict[str, Any] | None = None
        self._load = 0  # by which workers know the pending state; 0 if the worker itself has loaded it
        self._run: _Run | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the iterations that start after this call, here and in persistent workers."""
        self._shared.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """The position of the last iteration: a small new dict for JSON. Items in flight do not count."""
        if self._pending is not None:
            return dict(self._pending)
        run = self._run or _Run(self._shared.epoch, 0, [])
        place = self._placement.here()
        return {
            "version": _VERSION,
            "seed": self.seed,
            "epoch": run.epoch,
            "shards": place.shards,
            "shard": place.shard,
            "position": run.position,
            "read": [[pipe.handed_out, pipe.trace] for pipe in run.readings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue where *state* was taken, in its epoch.

        Raises:
            ValueError: *state* has another seed or number of shards, or is not a state of this class.
        """
        if not set(state) >= _FIELDS or state["version"] != _VERSION:
            raise ValueError("not a state of ResumableDataPipe, or of another version of it")
        if state["seed"] != self.seed:
            raise ValueError(f"the state was made with seed={state['seed']}, and this is seed={self.seed}")
        place = self._placement.here()
        if (state["shards"], state["shard"]) != (place.shards, place.shard):
            raise ValueError(
                f"the state is that of shard {state['shard']} of {state['shards']}, and this is shard {place.shard} of "
                f"{place.shards}: resume with the same number of workers and ranks"
            )
        self._pending = dict(state)
        self._load = self._shared.number_load()

    def __iter__(self) -> Iterator[Any]:
        # No generator: the state is used up now, and the next iteration begins at the beginning.
        state, self._pending = self._pending, None
        if state is not None and self._load and not self._shared.is_first_use(self._load):
            state = None
        epoch = self._shared.epoch if state is None else state["epoch"]
        graph = traverse_dps(self.source_datapipe)
        readings = list(dict.fromkeys(_outer_readers(graph)))
        if state is None and any(hasattr(pipe, "set_seed") for pipe in get_all_graph_pipes(graph)):
            self._warn_of_repetition()
        self._run = _Run(epoch, 0 if state is None else state["position"], readings)
        return self._samples(self._run, [] if state is None else [tuple(read) for read in state["read"]])

    def _warn_of_repetition(self) -> None:
        self._shared.warn_of_repeated_epoch("the graph has a pipe that shuffles")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def _samples(self, run: _Run, expected: list[tuple[int, int]]) -> Iterator[Any]:
        graph = traverse_dps(self.source_datapipe)
        place = self._placement.here()
        is_sharded = any(hasattr(pipe, "apply_sharding") for pipe in get_all_graph_pipes(graph))
        apply_sharding(self.source_datapipe, place.shards, place.shard)
        generator = torch.Generator()
        generator.manual_seed((self.seed * 0x9E3779B97F4A7C15 + run.epoch) & 0x7FFF_FFFF_FFFF_FFFF)
        apply_random_seed(self.source_datapipe, generator)
        stride = 1
        if not is_sharded and place.shards > 1:
            stride = place.shards
            warnings.warn(
                "the graph has no sharding_filter or shard_blobs: every worker reads everything and drops the rest",
                stacklevel=2,
            )
        start = run.position
        reader, factor = _last_reader(graph) if stride == 1 else (None, 1)
        if start and reader is not None:
            reader.skip(start * factor)
        samples = iter(self.source_datapipe)
        if stride > 1:
            samples = islice(samples, place.shard, None, stride)
        is_unchecked = start > 0
        if start and reader is None:
            passed = sum(1 for _ in islice(samples, start))
            _compare([(start, 0), *expected], [(passed, 0), *((pipe.handed_out, pipe.trace) for pipe in run.readings)])
            is_unchecked = False
        for sample in samples:
            if is_unchecked and reader is not None:
                _compare(expected, [reader.skipped])
                is_unchecked = False
            run.position += 1
            yield sample
        if is_unchecked and reader is not None:
            _compare(expected, [reader.skipped])
        self._shared.note_end(run.epoch)


@dataclass
class _Run:
    """One iteration: what `state_dict` reports about it."""

    epoch: int
    position: int
    readings: list[Reading]


def _outer_readers(graph: DataPipeGraph) -> Iterator[Reading]:
    """The readers that nothing draws from ahead of its turn: how far others are is a matter of chance."""
    for pipe, sources in graph.values():
        if isinstance(pipe, Reading):
            yield pipe
        if not isinstance(pipe, _DRAWS_AHEAD):
            yield from _outer_readers(sources)


def _last_reader(graph: DataPipeGraph) -> tuple[Reading | None, int]:
    """The reader each of whose items becomes one sample, or one of that many in a batch that is one; else None."""
    factor = 1
    while len(graph) == 1:
        ((pipe, graph),) = graph.values()
        if isinstance(pipe, Reading):
            return pipe, factor
        if type(pipe) is Batcher:
            factor *= pipe.batch_size
        elif type(pipe) not in (Mapper, Collator):
            break
    return None, 1


def _compare(expected: Sequence[tuple[int, int]], found: Sequence[tuple[int, int]]) -> None:
    if list(expected) != list(found):
        raise ValueError(
            "the state does not fit what the pipes yield now: blobs were added or removed, or the graph is another "
            "one; resume on the data that the state was taken on, or begin a new epoch"
        )


IterDataPipe.register_function("to_resumable", ResumableDataPipe)
