"""What is outside of the metadata that is read, and which no metadata may change."""

from __future__ import annotations

import enum
import pathlib
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as metadata_classes
from torch.distributed.checkpoint.filesystem import _StorageInfo

_CLASSES = [
    value
    for module in (metadata_classes, pathlib, enum)
    for value in vars(module).values()
    if isinstance(value, type) and value.__module__ != "typing"
]
_WATCHED: tuple[Any, ...] = (
    *_CLASSES,
    *metadata_classes._MEM_FORMAT_ENCODING,
    _StorageInfo,
    OrderedDict,
    pathlib,
    enum,
    torch,
    torch.Size,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch.device,
    torch.serialization,
)

_CACHES = {"__slotnames__", "__annotations__", "__annotations_cache__"}  # Python itself adds them when they are needed

Snapshot = list[dict[str, Any]]


def snapshot() -> Snapshot:
    """The attributes of every class that metadata may name, and of the modules that they come from."""
    return [dict(vars(value)) for value in _WATCHED]


def changes_since(before: Snapshot) -> list[str]:
    """The attributes that were set, added or removed since *before*."""
    found = []
    for value, was in zip(_WATCHED, before, strict=True):
        now = vars(value)
        names = {**was, **now} if now.keys() != was.keys() else was
        changed = [name for name in names if now.get(name, ...) is not was.get(name, ...)]
        found += [f"{getattr(value, '__name__', value)}.{name}" for name in changed if not _is_expected(name, was, now)]
    return found


def _is_expected(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the attribute is a cache of Python, or a module that was imported."""
    return name not in was and (name in _CACHES or isinstance(now[name], ModuleType))
