"""The difference between two versions of a tensor, bit for bit. No I/O.

A difference is stored in the shortest of three forms: the changed elements, as values and the gaps between their
indices; the exclusive or of both versions, compressed; or the new version as it is.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from azstoragetorch._tensors.host import view_of
from azstoragetorch.exceptions import WeightsError

RAW, SPARSE, XOR = "raw", "sparse", "xor"
_FULL_GAP = 255  # a byte of this value adds to the gap and ends no element
_WORTH_MORE = 2  # times smaller than the tensor: no other form is tried
_LEVEL = 1  # of zlib: higher levels gain little on floating-point numbers
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True, slots=True)
class Change:
    """A difference: in which form, of how many elements, and its bytes."""

    form: str
    count: int
    data: memoryview


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous *tensor* as integers, in one dimension; the memory is shared."""
    return tensor.reshape(-1).view(_BITS[tensor.itemsize])


def difference(old: torch.Tensor, new: torch.Tensor) -> Change | None:
    """What turns *old* into *new*, contiguous tensors on the CPU of one type and shape; None if all bits are equal."""
    before, after = bits_of(old), bits_of(new)
    indices = torch.nonzero(before != after).reshape(-1)
    count = len(indices)
    if not count:
        return None
    forms = [Change(RAW, after.numel(), view_of(new))]
    if count * (after.itemsize + 1) < new.nbytes:
        values = after[indices].contiguous()
        forms.append(Change(SPARSE, count, memoryview(bytes(view_of(values)) + _gaps(indices))))
    if min(len(form.data) for form in forms) * _WORTH_MORE > new.nbytes:
        forms.append(Change(XOR, after.numel(), memoryview(_compressed(before ^ after))))
    return min(forms, key=lambda form: len(form.data))


def apply(tensor: torch.Tensor, change: Change) -> None:
    """Apply *change*, which comes from a network, to *tensor*, in place.

    Raises:
        WeightsError: *change* does not fit *tensor*; the tensor may have been changed.
    """
    bits = bits_of(tensor)
    if change.form == RAW and len(change.data) == tensor.nbytes:
        view_of(tensor)[:] = change.data
    elif change.form == XOR:
        bits ^= _decompressed(change.data, bits)
    elif change.form == SPARSE and 0 < change.count <= bits.numel():
        size = change.count * bits.itemsize
        indices = _indices(change.data[size:])
        if len(indices) != change.count or int(indices[-1]) >= bits.numel() or len(change.data) < size:
            raise WeightsError("a difference refers to elements that the tensor does not have")
        bits[indices] = torch.frombuffer(bytearray(change.data[:size]), dtype=bits.dtype)
    else:
        raise WeightsError("a difference does not fit its tensor")


def _gaps(indices: torch.Tensor) -> bytes:
    """Ascending *indices* as one byte for each gap between two, or more where a gap is long."""
    gaps = torch.diff(indices, prepend=torch.tensor([-1], device="cpu"))
    ends = torch.cumsum(gaps // _FULL_GAP + 1, 0) - 1
    found = torch.full((int(ends[-1]) + 1,), _FULL_GAP, dtype=torch.uint8, device="cpu")
    found[ends] = (gaps % _FULL_GAP).to(torch.uint8)
    return bytes(view_of(found))


def _indices(gaps: memoryview) -> torch.Tensor:
    if not len(gaps):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    found = torch.frombuffer(bytearray(gaps), dtype=torch.uint8)
    indices = torch.cumsum(found, 0, dtype=torch.int64)[found != _FULL_GAP] - 1
    if len(indices) and (int(indices[0]) < 0 or bool((torch.diff(indices) <= 0).any())):
        raise WeightsError("a difference has indices that do not ascend")
    return indices


def _compressed(bits: torch.Tensor) -> bytes:
    """*bits*, compressed with equal bytes of all elements next to each other: high bytes rarely change."""
    planes = bits.view(torch.uint8).reshape(-1, bits.itemsize).t().contiguous()
    return zlib.compress(view_of(planes), _LEVEL)


def _decompressed(data: memoryview, like: torch.Tensor) -> torch.Tensor:
    size = like.numel() * like.itemsize
    try:
        decompressor = zlib.decompressobj()
        planes = bytearray(decompressor.decompress(data, size + 1))
    except zlib.error as error:
        raise WeightsError(f"a difference cannot be decompressed: {error}") from None
    if len(planes) != size or not decompressor.eof:
        raise WeightsError("a difference does not have the length of its tensor")
    found = torch.frombuffer(planes, dtype=torch.uint8).reshape(like.itemsize, -1).t().contiguous()
    return found.reshape(-1).view(like.dtype)
