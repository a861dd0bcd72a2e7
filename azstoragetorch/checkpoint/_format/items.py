"""Entries of ``Metadata.storage_data``: where an item is, and what of that may be believed.

Ours adds facts to the stock entries, as attributes that other readers ignore: where in an item the bare bytes of its
tensor begin, of which type and shape they are, and the ETag of the blob.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from azstoragetorch.checkpoint._format.envelope import Payload
from azstoragetorch.checkpoint._format.names import is_metadata
from azstoragetorch.checkpoint._format.records import DIMENSIONS, LARGEST
from azstoragetorch.exceptions import CheckpointError

_TRANSFORMS = 16  # of one item, each applied to the result of the one before
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\\\\:\ud800-\udfff]")  # controls; other hosts and drives
_ETAG = re.compile(r'(?:W/)?"[!#-~]{0,254}"')  # what may stand in a header


class Item(NamedTuple):
    """Where one item is. ``payload`` is None if the item has to be decoded to know what it holds.

    ``digest`` is known where the item is written, and goes to the side blob, not into the metadata.
    """

    path: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()
    payload: Payload | None = None
    etag: str | None = None
    digest: str | None = None


def storage_info(item: Item) -> Any:
    """*item* as an entry of ``Metadata.storage_data``: the stock class, with what else is known as attributes."""
    info: Any = _StorageInfo(_once(item.path), item.offset, item.length)
    if item.transforms:
        info.transform_descriptors = list(item.transforms)
    if item.payload is not None:
        info.payload = _facts(item.payload)
    if item.etag is not None:
        info.etag = item.etag
    if item.digest is not None:
        info.digest = item.digest
    return info


def take_digest(info: Any) -> str | None:
    """Remove the digest from *info*, an entry that `storage_info` has made, and return it."""
    digest: str | None = vars(info).pop("digest", None)
    return digest


@functools.lru_cache(maxsize=4096)
def _once(path: str) -> str:
    """The same object for all paths that are equal, which a pickle then holds only once."""
    return path


@functools.lru_cache(maxsize=16384)
def _facts(payload: Payload) -> tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]:
    """*payload* as stock types; the same tuple for all that are equal, which a pickle then holds only once."""
    return (payload.offset, payload.dtype, payload.shape, payload.stride)


def read_item(info: Any) -> Item:
    """The item that an entry of ``Metadata.storage_data`` describes.

    Raises:
        CheckpointError: the entry is not one, or refers to something outside of the checkpoint.
    """
    if not isinstance(info, _StorageInfo):
        raise CheckpointError(f"the checkpoint is not in torch's file format: it has a {type(info).__name__}")
    path, offset, length = info.relative_path, info.offset, info.length
    facts, etag = getattr(info, "payload", None), getattr(info, "etag", None)
    transforms = getattr(info, "transform_descriptors", None) or ()
    check_place(path, offset, length)
    check_etag(etag)
    payload = None
    if facts is not None:
        check_facts(facts, length, path)
        payload = Payload(*facts)
    return Item(path, offset, length, check_transforms(transforms), payload, etag)


def check_place(path: Any, offset: Any, length: Any, fqn: str | None = None) -> None:
    """Raise unless these can be the blob, the offset and the length of an item, of the entry *fqn*."""
    if not (type(path) is str and _is_inside(path)):
        raise CheckpointError(f"the checkpoint refers to {shown(path)}, which is not inside it; it is not followed")
    if type(offset) is type(length) is int and offset >= 0 <= length and offset + length <= LARGEST:
        return
    what = "an item" if fqn is None else repr(fqn)[:200]
    raise CheckpointError(f"the checkpoint places {what} at {shown(offset)}, length {shown(length)}, of {path!r:.200}")


@functools.lru_cache(maxsize=4096)
def _is_inside(path: str) -> bool:
    """Whether *path* is a data blob of the checkpoint: a token must not follow a forged path, nor metadata be data."""
    return (
        0 < len(path) <= 1024
        and not _FORBIDDEN.search(path)
        and all(part not in ("", ".", "..") for part in path.split("/"))
        and not is_metadata(path.rpartition("/")[2])
    )


def check_etag(etag: Any) -> None:
    """Raise unless *etag* can be an ETag: it becomes the value of a header."""
    if etag is not None and not (type(etag) is str and _ETAG.fullmatch(etag)):
        raise CheckpointError(f"the checkpoint has {shown(etag)} in the place of the ETag of a blob")


def check_transforms(names: Any) -> tuple[str, ...]:
    """*names* of stream extensions of torch as a tuple; raises if they cannot be that."""
    is_list = isinstance(names, (list, tuple)) and len(names) <= _TRANSFORMS
    if not is_list or not all(type(name) is str and len(name) <= 256 for name in names):
        raise CheckpointError("the checkpoint names the extensions that an item was written with in a way it cannot")
    return tuple(names)


def check_facts(facts: Any, length: int, path: str) -> None:
    """Raise unless *facts* describe a dense tensor inside an item of *length* bytes of *path*."""
    if not _is_payload(facts, length):
        raise CheckpointError(
            f"the checkpoint describes an item of {path!r:.200} as {shown(facts)}, which it cannot be"
        )


def _is_payload(facts: Any, length: int) -> bool:
    if type(facts) is not tuple or len(facts) != 4:
        return False
    offset, dtype, shape, stride = facts
    if not (are_counts((offset,)) and isinstance(dtype, torch.dtype) and are_counts(shape) and are_counts(stride)):
        return False
    return len(shape) == len(stride) and int(offset) + math.prod(shape) * dtype.itemsize <= length


def are_counts(values: Any) -> bool:
    """Whether *values* are numbers that may be lengths or strides, one for each dimension of a tensor."""
    is_short = type(values) is tuple and len(values) <= DIMENSIONS
    return is_short and all(type(value) is int and 0 <= value <= LARGEST for value in values)


def shown(value: Any) -> str:
    """*value*, which may be anything of any size, in a few words."""
    return f"{value!r:.100}" if value is None or type(value) in (str, int, float, bool) else f"a {type(value).__name__}"
