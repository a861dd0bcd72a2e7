"""Save tensors as a safetensors file: streamed from their memory, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from azstoragetorch._blob.client import BlobClient, ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import KiB, MiB, TransferConfig
from azstoragetorch._engine.scope import on_error
from azstoragetorch._tensors.host import Copiers, bytes_alike, host_bytes
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.safetensors._dtypes import FROM_TORCH, header_shape
from azstoragetorch.safetensors._header import LARGEST, LENGTH, Layout, build_header

_SMALL = 32 * KiB  # pieces below are copied together: a system call for each would cost more
_SINGLE = 24 * MiB  # a file up to this size is put with one request


def save_file(
    tensors: Mapping[str, torch.Tensor],
    url: str,
    metadata: Mapping[str, str] | None = None,
    *,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> None:
    """Save *tensors* as a safetensors file in a blob, as ``safetensors.torch.save_file`` does in a local file.

    The bytes of the blob are the same as those of the local file. They are sent from the memory of the tensors, which
    must not change until the call returns. The blob is replaced at the end, by one request: an error or an interrupt
    leaves it as it was. Tensors on other devices and tensors that are not contiguous are copied piece by piece. Tensors
    that share memory are saved separately.

    Args:
        tensors: Dense tensors by name.
        url: URL of the blob, which is overwritten if it exists.
        metadata: Strings by key, stored in the header.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        SafetensorsError: one of *tensors* cannot be stored in a safetensors file: its type, sparse, a DTensor.
        TypeError: *tensors* or *metadata* are not of the types above.
        FatalBlobIOWriteError: the write failed; the blob is unchanged.
    """
    parsed = parse_blob_url(url)
    client = ClientFactory(credential, transfer, parsed).blob(parsed)
    write_file(client, tensors, layout_of(tensors, metadata, str(client.url)))


def layout_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None, url: str) -> Layout:
    """Check *tensors* and lay out the file that has them. Raises the errors of `save_file`."""
    if not hasattr(tensors, "items"):
        raise TypeError(f"tensors must be a dict of tensors by name, not {type(tensors).__name__}")
    if metadata is not None and not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise TypeError("metadata must be a dict of strings by string")
    described = {name: (kind_of(name, tensor, url), tensor) for name, tensor in tensors.items()}
    shapes = {name: (kind, header_shape(kind, tuple(tensor.shape))) for name, (kind, tensor) in described.items()}
    try:
        layout = build_header(shapes, metadata)
    except UnicodeEncodeError:
        raise SafetensorsError(f"{url}: a name or the metadata cannot be encoded as UTF-8", url=url) from None
    if len(layout.head) > LARGEST + LENGTH:
        raise SafetensorsError(
            f"{url}: the header would have {len(layout.head):,} bytes, and the format allows {LARGEST:,}; save the "
            "tensors in several files",
            url=url,
        )
    return layout


def kind_of(name: Any, tensor: Any, url: str) -> str:
    """The name of the type of *tensor* in a file.

    Raises:
        SafetensorsError: the format cannot hold it.
        TypeError: *name* is not a string, or *tensor* not a tensor.
    """
    if not isinstance(name, str):
        raise TypeError(f"names of tensors must be strings, not {name!r:.100}")
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    what = None
    if name == "__metadata__":
        what = "has a name that the format reserves"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        what = f"is a {type(tensor).__name__}; save tensors of the whole, or use HuggingFaceBlobWriter with torch's DCP"
    elif tensor.layout != torch.strided or tensor.is_nested:
        what = f"is sparse or nested ({tensor.layout}); the format has dense tensors only"
    elif tensor.device.type == "meta":
        what = "is on the meta device, so it has no elements"
    elif tensor.dtype not in FROM_TORCH or tensor.is_quantized:
        what = f"has the type {tensor.dtype}, which the format does not have"
    elif FROM_TORCH[tensor.dtype] == "F4" and not tensor.ndim:
        what = "has the type F4 and no dimension"
    if what is not None:
        raise SafetensorsError(f"{url}: the tensor {name!r:.200} {what}", url=url, tensor=name)
    return FROM_TORCH[tensor.dtype]


def write_file(
    client: BlobClient, tensors: Mapping[str, torch.Tensor], layout: Layout, *, create_only: bool = False
) -> None:
    """Write the file of *layout*, which has *tensors*.

    Raises:
        FatalBlobIOWriteError: the write failed; the blob is unchanged.
        ResourceExistsError: it exists, and *create_only* is set.
    """
    write_pieces(client, layout, _bytes_of(tensors, layout.names, client.config.block_size), create_only=create_only)


def write_pieces(client: BlobClient, layout: Layout, data: Iterator[memoryview], *, create_only: bool = False) -> None:
    """Write the file of *layout*, whose data is *data*. Raises the errors of `write_file`."""
    config = client.config
    writer = client.writer(create_only=create_only)
    pieces = _joined(memoryview(layout.head), data)
    with on_error(writer.abort):
        if layout.size <= min(_SINGLE, 3 * config.block_size // 2):
            writer.put(list(pieces))
        else:
            concurrency = max(1, min(config.initial_concurrency, config.memory_limit // config.block_size))
            writer.write_pieces(pieces, block_size=config.block_size, concurrency=concurrency)
            writer.commit()


def _bytes_of(tensors: Mapping[str, torch.Tensor], names: list[str], limit: int) -> Iterator[memoryview]:
    copiers = Copiers()
    for name in names:
        tensor = bytes_alike(tensors[name].detach())
        yield from host_bytes(tensor, copiers.of(tensor.device), limit)


def _joined(head: memoryview, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """*head* and *pieces*, of which small ones come together in a copy."""
    small = bytearray(head)
    for piece in pieces:
        if piece.nbytes < _SMALL:
            small += piece
            if len(small) >= _SMALL:
                yield memoryview(small)
                small = bytearray()
            continue
        if small:
            yield memoryview(small)
            small = bytearray()
        yield piece
    if small:
        yield memoryview(small)
