"""The inside of an item: what `torch.save` writes around the bare bytes of a tensor, and what that says of them."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from azstoragetorch._tensors.outline import outline_of
from azstoragetorch._tensors.planning import contiguous_strides

PROBE = 4096  # bytes at either end of an item that say what lies between


class Payload(NamedTuple):
    """The bare bytes of a dense tensor inside its item: where they begin, and what they are."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of a dense payload in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the order of their indices."""
        return self.stride == contiguous_strides(self.shape) or math.prod(self.shape) == 0


@dataclass(frozen=True, slots=True)
class Envelope:
    """What `torch.save` writes before and after the payload of a contiguous tensor."""

    head: bytes
    tail: bytes


def has_payload(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is saved as an envelope around its bare bytes; others are saved whole by `torch.save`."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type != "meta"
    )


@functools.lru_cache(maxsize=16384)
def envelope(dtype: torch.dtype, shape: torch.Size) -> Envelope:
    """The envelope of a contiguous tensor on the CPU; it depends on nothing but *dtype* and *shape*."""
    parts, gaps = outline_of(lambda: torch.empty(shape, dtype=dtype, device="cpu"))
    if len(gaps) > 1:
        raise io.UnsupportedOperation("torch.save no longer lays out a file as one payload between head and tail")
    split = parts.index(None) if gaps else len(parts)
    return Envelope(*(b"".join(filter(None, side)) for side in (parts[:split], parts[split:])))


def probe(head: bytes, tail: bytes, length: int) -> Payload | None:
    """The dense payload that the first and last bytes of an item of *length* bytes describe.

    None if the item has to be decoded as a whole: it is not a single dense tensor, or these bytes do not show that.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            source: Any = ItemFile(head, tail, length)
            tensor: Any = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        if tensor.is_conj() or tensor.is_neg() or tensor.storage_offset() != 0:
            return None
        offset: Any = tensor.untyped_storage()._checkpoint_offset  # noqa: SLF001
        payload = Payload(
            offset,
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
        )
    except Exception:  # noqa: BLE001 - decoding the whole item loads it, or fails with a reason
        return None
    fits = payload.nbytes and payload.is_contiguous and payload.offset + payload.nbytes <= length
    return payload if fits else None


class ItemFile(io.RawIOBase):
    """An item as a file, without a copy. Where only both ends of it are known, reading in between fails."""

    def __init__(self, head: bytes | memoryview, tail: bytes = b"", length: int | None = None) -> None:
        self._head, self._tail = head, tail
        self._length = len(head) if length is None else length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        start, stop = self._position, min(self._position + view.nbytes, self._length)
        if stop <= len(self._head):
            known: bytes | memoryview = self._head[start:stop]
        elif start >= self._length - len(self._tail):
            at = start - (self._length - len(self._tail))
            known = self._tail[at : at + stop - start]
        else:
            raise ValueError("these bytes are not known")
        view[: len(known)] = known
        self._position += len(known)
        return len(known)
