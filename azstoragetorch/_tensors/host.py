"""Between tensors, wherever they are, and the host memory that blobs are sent from and received into.

A contiguous tensor on the CPU is used in place. Everything else - other devices, other layouts in memory, other types -
is copied through buffers of limited size: pinned ones and a separate stream for an accelerator, so that copying
overlaps with the network; ordinary ones, by the same code, for the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from azstoragetorch._tensors.planning import Box, boxes

_EMPTY = memoryview(b"")


def view_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, writable; the view keeps the memory alive."""
    if not tensor.nbytes:
        return _EMPTY
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor
    return memoryview(memory).cast("B")


def is_in_place(tensor: torch.Tensor) -> bool:
    """Whether the elements of *tensor* lie in host memory as they are, one after the other."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def select(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The view of *box* in *tensor*."""
    for dim, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, offset, length)
    return tensor


def bytes_alike(tensor: torch.Tensor) -> torch.Tensor:
    """*tensor*, as bytes if its elements are narrow floats, of which torch cannot copy all types."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 and tensor.dtype.is_floating_point else tensor


class Copier:
    """Copies between a device and the host, while the device does other work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        if device.type not in ("cpu", "meta"):
            self._module: Any = getattr(torch, device.type)
            self._stream = self._module.Stream(device=device)
            # What is queued for these tensors by now comes first.
            self._stream.wait_stream(self._module.current_stream(device))

    @property
    def is_pinned(self) -> bool:
        """Whether its buffers are such that the device reads and writes them itself."""
        return self._stream is not None

    def buffer(self, nbytes: int) -> torch.Tensor:
        """A new buffer of *nbytes* bytes with arbitrary contents; freed ones are reused by torch's allocators."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.is_pinned)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy; `wait` returns when it is done."""
        # A tensor that was made in inference mode can be written to in that mode alone, which is one of the thread.
        mode = torch.inference_mode() if target.is_inference() else torch.no_grad()
        with mode, self._beside():
            target.copy_(source, non_blocking=self.is_pinned)

    def mark(self) -> Any:
        """What `wait` takes to wait for the copies that have begun by now."""
        return self._stream.record_event() if self._stream is not None else None

    def wait(self, mark: Any = None) -> None:
        """Wait for all copies that began, or for those that began before *mark*."""
        if mark is not None:
            mark.synchronize()
        elif self._stream is not None:
            self._stream.synchronize()

    def _beside(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self._module.stream(self._stream)
        return context


class Copiers:
    """A copier for each device, made when it is needed. Used by one thread at a time."""

    def __init__(self) -> None:
        self._copiers: dict[torch.device, Copier] = {}

    def of(self, device: torch.device) -> Copier:
        """The copier to and from *device*."""
        if device not in self._copiers:
            self._copiers[device] = Copier(device)
        return self._copiers[device]


def host_bytes(tensor: torch.Tensor, copier: Copier, limit: int) -> Iterator[memoryview]:
    """The elements of *tensor* as bytes in host memory, in the order of their indices.

    In place where they lie so; else in copies of at most *limit* bytes, of which the next is made while one is
    used.
    """
    tensor = tensor.detach()
    if is_in_place(tensor):
        yield view_of(tensor)
        return
    previous: tuple[torch.Tensor, Any] | None = None
    for box in boxes(tuple(tensor.shape), tensor.itemsize, limit):
        part = select(tensor, box)
        buffer = copier.buffer(part.nbytes)
        copier.copy(buffer.view(tensor.dtype).view(part.shape), part)
        if previous is not None:
            copier.wait(previous[1])
            yield view_of(previous[0])
        previous = buffer, copier.mark()
    if previous is not None:
        copier.wait(previous[1])
        yield view_of(previous[0])
