"""One iteration of one shard: its position in the epoch, and the remaining samples.

Only `Position` determines the progress of an iteration. Data fetched ahead makes it fast. If that data does not start
at the position, for example after an interrupt between two lines, it is discarded and fetched again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from azstoragetorch._blob.client import Head
from azstoragetorch._engine.process import Process, here
from azstoragetorch._samples.prefetch import OrderedPrefetch, Prefetched
from azstoragetorch._samples.resume import ResumeState, merge
from azstoragetorch._samples.sharding import Order
from azstoragetorch.datasets._blobs import Blob, apply, is_refused
from azstoragetorch.datasets._contents import Contents, Planned

T_co = TypeVar("T_co", covariant=True)

OnError: TypeAlias = Literal["raise", "skip", "warn"] | Callable[[str, Exception], object]


def check_on_error(on_error: Any) -> None:
    """Raise ValueError unless *on_error* is an `OnError`."""
    if not callable(on_error) and on_error not in ("raise", "skip", "warn"):
        raise ValueError(f"on_error must be 'raise', 'skip', 'warn' or a callable(url, exc), not {on_error!r}")


@dataclass(slots=True)
class Position:
    """How far one iteration of one shard is."""

    state: ResumeState  # of which only the position is missing
    shard: int
    order: Order
    stripe: range
    consumed: int  # samples of the stripe

    @property
    def is_at_end(self) -> bool:
        """Whether all samples are consumed."""
        return self.consumed >= len(self.stripe)

    def plan(self) -> Iterator[tuple[int, int]]:
        """What comes next: places in the stripe, each with an index into the catalog."""
        length = len(self.order)
        for place in range(self.consumed, len(self.stripe)):
            yield place, self.order[self.stripe[place] % length]

    def state_dict(self) -> dict[str, Any]:
        """The state of this shard."""
        return self.state.of_shard(self.shard, self.consumed)


def refuse_late_state() -> Iterator[Any]:
    """Raise when drawn from: a worker that lives on, and raises earlier, dies without a message."""
    raise ValueError(
        "state: it was loaded when the workers of this loader had begun (persistent_workers=True) and does not reach "
        "them: load it before the loader is used, or make a new loader"
    )
    yield  # type: ignore[unreachable] # makes it a generator


class Samples(Iterator[T_co], Generic[T_co]):
    """The samples from *position* on, which moves as they are yielded; *on_end* is called with the epoch at its end."""

    def __init__(
        self,
        contents: Contents,
        transform: Callable[[Blob], T_co] | None,
        on_error: OnError,
        position: Position,
        on_end: Callable[[int], None],
    ) -> None:
        self._contents = contents
        self._transform = transform
        self._on_error = on_error
        self._position = position
        self._on_end = on_end
        self._running: Process | None = None  # in which a step is in progress
        self._ahead: OrderedPrefetch[Planned, Head] | None = self._fetch_ahead()

    def _fetch_ahead(self) -> OrderedPrefetch[Planned, Head]:
        return self._contents.fetch_ahead(
            self._position.plan(),
            is_eager=self._transform is None,
            is_shuffled=self._position.state.seed is not None,
        )

    def __next__(self) -> T_co:
        process = here()
        if self._running is process:
            raise ValueError("the iterator is already running: a transform or a signal handler asks it for a sample")
        if self._running is not None:
            self._drop_ahead()  # forked: a thread of the parent was in the middle of a step
        place = self._position.consumed
        try:
            try:
                self._running = process
                return self._next()
            finally:
                self._running = None
        except Exception:
            raise
        except BaseException:
            # An interrupt says nothing about the blob, which comes again whenever the iteration is continued.
            self._running = None  # it may have come in the line above
            self._position.consumed = place
            self._drop_ahead()
            raise

    def _next(self) -> T_co:
        position = self._position
        while True:
            place = position.consumed
            work = self._draw()
            blob = work.item.blob
            try:
                sample = apply(self._transform, blob, work.result)
            except Exception as error:
                # An error counts as consumed: a caller that asks again gets the next blob.
                position.consumed = place + 1
                if self._on_error == "raise" or is_refused(error):
                    raise
                self._skip(blob.url, error)
            else:
                position.consumed = place + 1
                return sample

    def _draw(self) -> Prefetched[Planned, Head]:
        """The blob at the position."""
        while True:
            if self._ahead is None:
                self._ahead = self._fetch_ahead()
            work = next(self._ahead, None)
            if work is None and self._position.is_at_end:
                self._on_end(self._position.state.epoch)
                raise StopIteration
            if work is not None and work.item.place == self._position.consumed:
                return work
            self._drop_ahead()

    def _drop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def _skip(self, url: str, error: Exception) -> None:
        if callable(self._on_error):
            self._on_error(url, error)
        elif self._on_error == "warn":
            warnings.warn(f"skipped {url}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=4)

    def __del__(self) -> None:
        ahead = getattr(self, "_ahead", None)
        if ahead is not None:
            ahead.abandon()


def merge_states(states: object) -> dict[str, Any]:
    """Merge the states of all ranks and workers into one, from which any number of them can resume.

    The samples that the shards have not consumed are divided among the shards that load the state; no sample is lost or
    repeated. If the number of shards is unchanged, each continues exactly where it was.

    Args:
        states: States of `IterableBlobDataset` or of loaders that hold one, in any nesting of lists and dicts; such as
            the list that ``torch.distributed.all_gather_object`` fills with ``loader.state_dict()``.

    Raises:
        ValueError: *states* has no state, they do not belong together, or the state of a loader is some steps old
            (``snapshot_every_n_steps``).
    """
    return merge(states).to_dict()
