"""Records: the inert values that a pickle of metadata is read into, and the names that it may contain."""

from __future__ import annotations

from typing import Any

import torch

from azstoragetorch.exceptions import CheckpointError

LARGEST = (1 << 63) - 1  # no count, offset or length in a checkpoint is larger
DIMENSIONS = 64  # no tensor has more


class Name:
    """What a pickle would import. It stands for itself alone."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class Table(list[Any]):
    """A dict of the pickle: keys and values in turn."""

    __slots__ = ()


class Array(list[Any]):
    """A list of the pickle."""

    __slots__ = ()


class Call(tuple[Any, Any]):
    """A call that is not made: what would be called, and with which arguments."""

    __slots__ = ()


_DCP = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # until torch 2.2
METADATA = Name(_DCP, "Metadata")
TENSOR = Name(_DCP, "TensorStorageMetadata")
BYTES = Name(_DCP, "BytesStorageMetadata")
CHUNK = Name(_DCP, "ChunkStorageMetadata")
PROPERTIES = Name(_DCP, "TensorProperties")
INDEX = Name(_DCP, "MetadataIndex")
STORAGE_META = Name(_DCP, "StorageMeta")
MEMORY_FORMAT = Name(_DCP, "_MEM_FORMAT_ENCODING")
INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = Name("torch", "Size")
LAYOUT = Name("torch.serialization", "_get_layout")
ORDERED = Name("collections", "OrderedDict")
MEMBER = Name("builtins", "getattr")  # how Python 3.11.0 to 3.11.3 pickles an enum

_ALL = (
    METADATA,
    TENSOR,
    BYTES,
    CHUNK,
    PROPERTIES,
    INDEX,
    STORAGE_META,
    MEMORY_FORMAT,
    INFO,
    SIZE,
    LAYOUT,
    ORDERED,
    MEMBER,
)
_NAMES: dict[tuple[str, str], Any] = {(name.module, name.name): name for name in _ALL}
_NAMES[_OLD, "TensorProperties"] = PROPERTIES
_NAMES[_OLD, "MEM_FORMAT_ENCODING"] = MEMORY_FORMAT
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
_NAMES |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, _CONSTANTS)}
_NAMES |= {
    (module, name): Name(module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
}


def named(module: Any, name: Any) -> Any:
    """What stands for *name* of *module*; raises if no metadata refers to it."""
    if type(module) is not str or type(name) is not str:
        raise CheckpointError("the metadata refers to a name that is not a string; it was not loaded")
    found = _NAMES.get((module, name))
    if found is None:
        raise CheckpointError(
            f"the metadata refers to {module:.100}.{name:.100}, which no checkpoint needs; it was not loaded, since "
            "loading it could run foreign code"
        )
    return found


def made_size(arguments: Any) -> Any:
    """The `torch.Size` that a call with *arguments* makes, or the call if that makes none."""
    if type(arguments) is tuple and len(arguments) == 1:
        lengths = arguments[0]
        if type(lengths) is tuple and len(lengths) <= DIMENSIONS:
            for length in lengths:
                if type(length) is not int or not 0 <= length <= LARGEST:
                    break
            else:
                return torch.Size(lengths)
    return Call((SIZE, arguments))
