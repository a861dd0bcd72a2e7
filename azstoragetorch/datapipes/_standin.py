"""Small replacements of torch's DataPipes, for a torch without them: the base class, sharding, seeding, and streams.

They support functional names, pickling, and one way to shard and to seed a graph. The DataLoader of such a torch
treats the last pipe as any `IterableDataset`. It does not call `apply_sharding`, so pipes that shard determine their
share from the worker and from torch.distributed's rank.
"""

from __future__ import annotations

import functools
import pickle
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils.data import IterableDataset

from azstoragetorch._samples.workers import Placement

T_co = TypeVar("T_co", covariant=True)
C = TypeVar("C", bound=type)

DataPipeGraph = dict[int, tuple[Any, Any]]


class IterDataPipe(IterableDataset[T_co]):
    """A stage of a pipeline: iterates over its source, and has the registered functions as methods."""

    iterations = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__iter__" in vars(cls):
            cls.__iter__ = _one_at_a_time(cls.__iter__)  # type: ignore[method-assign]

    functions: ClassVar[dict[str, Callable[..., Any]]] = {}
    getstate_hook: ClassVar[Callable[[dict[str, Any]], Any] | None] = None

    def __getattr__(self, name: str) -> Any:
        if name in IterDataPipe.functions:
            return functools.partial(IterDataPipe.functions[name], self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def register_function(cls, function_name: str, function: Callable[..., Any]) -> None:
        """Make *function* a method of all pipes."""
        IterDataPipe.functions[function_name] = function

    @classmethod
    def register_datapipe_as_function(cls, function_name: str, cls_to_register: Callable[..., Any]) -> None:
        """The same for the class of a pipe, whose name must be free."""
        if function_name in IterDataPipe.functions:
            raise ValueError(f"Unable to add DataPipe function name {function_name} as it is already taken")
        IterDataPipe.functions[function_name] = cls_to_register

    @classmethod
    def set_getstate_hook(cls, hook_fn: Callable[[dict[str, Any]], Any] | None) -> None:
        """Have *hook_fn* make what is pickled of a pipe."""
        if IterDataPipe.getstate_hook is not None and hook_fn is not None:
            raise RuntimeError("Attempt to override existing getstate_hook")
        IterDataPipe.getstate_hook = hook_fn

    def __getstate__(self) -> Any:
        hook = IterDataPipe.__dict__["getstate_hook"]
        return self.__dict__ if hook is None else hook(self.__dict__)

    def __repr__(self) -> str:
        return type(self).__qualname__

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *IterDataPipe.functions]


class _Iteration(Iterator[Any]):
    """An iterator over a pipe that ends with an error when the pipe is iterated again."""

    def __init__(self, pipe: IterDataPipe[Any], items: Iterator[Any]) -> None:
        self._pipe = pipe
        self._items = items
        self._number = pipe.iterations

    def __next__(self) -> Any:
        if self._number != self._pipe.iterations:
            raise RuntimeError(f"This iterator has been invalidated: another one was made from {self._pipe!r}")
        return next(self._items)


def _one_at_a_time(make: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    @functools.wraps(make)
    def begin(pipe: IterDataPipe[Any]) -> Iterator[Any]:
        pipe.iterations += 1
        return _Iteration(pipe, iter(make(pipe)))

    return begin


class functional_datapipe:  # noqa: N801 - torch's name
    """Register the decorated pipe as a method of all pipes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, cls: C) -> C:
        IterDataPipe.register_datapipe_as_function(self.name, cls)
        return cls


class StreamWrapper:
    """A file object with a name, closed with the last reference to it."""

    def __init__(self, file_obj: Any, parent_stream: object = None, name: str | None = None) -> None:
        self.file_obj = file_obj
        self.parent_stream = parent_stream
        self.name = name
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["file_obj"], name)

    def close(self) -> None:
        """Close the file object."""
        if not self.closed:
            self.closed = True
            self.file_obj.close()

    def __del__(self) -> None:
        if not self.__dict__.get("closed", True):
            self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.file_obj)

    def __next__(self) -> Any:
        return next(self.file_obj)

    def __repr__(self) -> str:
        return f"StreamWrapper<{self.name},{self.file_obj!r}>"

    def __getstate__(self) -> Any:
        return {"file_obj": self.file_obj, "parent_stream": None, "name": self.name, "closed": self.closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class SHARDING_PRIORITIES(IntEnum):  # noqa: N801 - torch's name
    """Groups of shards; larger numbers divide first."""

    DEFAULT = 1
    DISTRIBUTED = 2
    MULTIPROCESSING = 3


def check_function(fn: Callable[..., Any]) -> None:
    """Refuse what cannot be called, and warn of a function that workers cannot be sent."""
    if not callable(fn):
        raise TypeError(f"A callable function is expected, but {type(fn)} is provided.")
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(fn, types.FunctionType) and "<" in fn.__qualname__:
        kind = "Lambda" if fn.__name__ == "<lambda>" else "Local"
        warnings.warn(
            f"{kind} function is not supported by pickle, please use regular python function or functools.partial "
            "instead.",
            stacklevel=3,
        )


def traverse_dps(pipe: Any) -> DataPipeGraph:
    """The pipes that *pipe* draws from: ``{id: (pipe, graph of its sources)}``."""
    sources: DataPipeGraph = {}
    for value in vars(pipe).values():
        for source in _pipes_in(value):
            sources |= traverse_dps(source)
    return {id(pipe): (pipe, sources)}


def _pipes_in(value: object) -> Iterator[Any]:
    if isinstance(value, IterDataPipe):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from _pipes_in(each)
    elif isinstance(value, dict):
        yield from _pipes_in(list(value.values()))


def get_all_graph_pipes(graph: DataPipeGraph) -> list[Any]:
    """Each pipe of *graph* once."""
    found: dict[int, Any] = {}
    for number, (pipe, sources) in graph.items():
        found[number] = pipe
        found |= {id(each): each for each in get_all_graph_pipes(sources)}
    return list(found.values())


def apply_sharding(
    datapipe: Any,
    num_of_instances: int,
    instance_id: int,
    sharding_group: SHARDING_PRIORITIES = SHARDING_PRIORITIES.DEFAULT,
) -> Any:
    """Make the pipes of a graph that shard be shard *instance_id* of *num_of_instances*."""
    for pipe in get_all_graph_pipes(traverse_dps(datapipe)):
        if _shards(pipe):
            _check_alone(pipe)
            pipe.apply_sharding(num_of_instances, instance_id, sharding_group)
    return datapipe


def _shards(pipe: Any) -> bool:
    return hasattr(type(pipe), "apply_sharding")


def _check_alone(pipe: Any) -> None:
    ((_, sources),) = traverse_dps(pipe).values()
    if any(_shards(source) for source in get_all_graph_pipes(sources)):
        raise RuntimeError(
            f"Sharding twice on one branch: {pipe!r} draws from a pipe that shards, too; keep one of them"
        )


def apply_random_seed(datapipe: Any, rng: torch.Generator) -> Any:
    """Give each pipe of a graph that has a seed the next one of *rng*."""
    for pipe in get_all_graph_pipes(traverse_dps(datapipe)):
        if hasattr(type(pipe), "set_seed"):
            pipe.set_seed(int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=rng).item()))
    return datapipe


def own_share(pipe: Any, placement: Placement) -> tuple[int, int]:
    """Shards in all, and the one of this process, for a *pipe* that `apply_sharding` was not called on."""
    _check_alone(pipe)
    place = placement.here()
    return place.shards, place.shard


class IterableWrapper(IterDataPipe[Any]):
    """Yields what is in *iterable*; a copy of it, if it can be copied."""

    def __init__(self, iterable: Iterable[Any], deepcopy: bool = True) -> None:
        self.iterable = iterable
        self.deepcopy = deepcopy

    def __iter__(self) -> Iterator[Any]:
        iterable = self.iterable
        if self.deepcopy:
            try:
                iterable = pickle.loads(pickle.dumps(iterable))  # noqa: S301 - what was pickled a moment ago
            except (TypeError, AttributeError, pickle.PicklingError):
                warnings.warn("The input iterable cannot be copied: it is shared", stacklevel=2)
        yield from iterable

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]
