"""Convert models: distributed checkpoints and what `torch.save` wrote, to and from folders of safetensors files.

Tensors are read when they are written, some at a time, so memory is bounded by `_AT_ONCE` or by the largest tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from azstoragetorch._blob.client import BlobVersion, ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import MiB, TransferConfig
from azstoragetorch._engine.scope import on_error
from azstoragetorch._tensors.host import bytes_alike, view_of
from azstoragetorch._tensors.outline import outline_of
from azstoragetorch._tensors.planning import Box, contiguous_strides
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter
from azstoragetorch.exceptions import SafetensorsError
from azstoragetorch.io import BlobIO
from azstoragetorch.safetensors._copying import bytes_of_model
from azstoragetorch.safetensors._dtypes import FROM_TORCH, header_shape
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._files import TensorFile
from azstoragetorch.safetensors._folder import folder_at, open_model
from azstoragetorch.safetensors._header import Header, build_header
from azstoragetorch.safetensors._model import Model, Read, reads_of
from azstoragetorch.safetensors._save import write_pieces
from azstoragetorch.safetensors._save_folder import (
    bytes_of_size,
    commit,
    index_of,
    look,
    names_of,
    split_by_size,
    write_all,
)

_AT_ONCE = 256 * MiB  # bytes of tensors that are read together


class Form(NamedTuple):
    """What a tensor will be: its type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


LoadSome = Callable[[list[str]], Mapping[str, torch.Tensor]]
"""Loads the tensors of some names."""


def checkpoint_to_safetensors(
    url: str,
    folder_url: str,
    *,
    only_tensors: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> list[str]:
    """Write the distributed checkpoint in the folder *url* as a folder of safetensors files.

    Names are the flat keys of the checkpoint, such as ``"model.layer.weight"``. At most 256 MiB of tensors are in
    memory at a time, or the largest one.

    Args:
        url: URL of the checkpoint's folder.
        folder_url: URL of the folder to write.
        only_tensors: Leave out entries that are not tensors, which otherwise are an error.
        max_shard_size: Same as for :func:`save_folder`.
        overwrite: Same as for :func:`save_folder`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`; used for both URLs.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SafetensorsError: an entry cannot be stored in a safetensors file; and as for :func:`save_folder`.
    """
    reader = BlobStorageReader(url, credential=credential, transfer=transfer)
    metadata = reader.read_metadata()
    forms, others = {}, []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            others.append(name)
        else:
            forms[name] = Form(entry.properties.dtype, tuple(entry.size))
    _check_others(reader.checkpoint_id, others, only_tensors=only_tensors)
    save_id = getattr(metadata.storage_meta, "save_id", None)

    def load_some(names: list[str]) -> Mapping[str, torch.Tensor]:
        state: dict[str, Any] = {name: torch.empty(forms[name].shape, dtype=forms[name].dtype) for name in names}
        version = BlobStorageReader(url, credential=credential, transfer=transfer, version=save_id)
        with _one_process():
            load(state, storage_reader=version, planner=DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
        return state

    return _write_folder(folder_url, forms, load_some, max_shard_size, credential, transfer, overwrite=overwrite)


def safetensors_to_checkpoint(
    folder_url: str,
    url: str,
    *,
    overwrite: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> None:
    """Write a safetensors file, or a folder of them, as a distributed checkpoint in the folder *url*.

    Any number of ranks can load it. A few tensors are in memory at a time.

    Args:
        folder_url: URL of the folder, of an index in it, or of a file.
        url: URL of the checkpoint's folder.
        overwrite: Same as for :class:`~azstoragetorch.checkpoint.BlobStorageWriter`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`; used for both URLs.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        SafetensorsError: the model cannot be read.
        CheckpointException: the checkpoint cannot be written; this is torch's exception, which contains the reason.
    """
    model = open_model(folder_url, credential, transfer)
    state = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in model.tensors.items()
    }
    writer = BlobStorageWriter(url, credential=credential, transfer=transfer, overwrite=overwrite, blobs_per_rank=4)
    with _one_process():
        save(state, storage_writer=writer, planner=_LazyPlanner(model), no_dist=True)


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor when it is to be written."""

    def __init__(self, model: Model) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._model = model

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return _read(self._model, [write_item.index.fqn])[write_item.index.fqn]


def torch_save_to_safetensors(
    blob_url: str,
    folder_url: str,
    *,
    only_tensors: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = True,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> list[str]:
    """Write the state dict that `torch.save` wrote to the blob *blob_url* as a folder of safetensors files.

    Nested dicts are flattened, with names such as ``"model.layer.weight"``. Only the structure of the blob is
    unpickled, as `torch.load` does with ``weights_only=True``; the elements are read when they are written.

    Args:
        blob_url: URL of the blob.
        folder_url: URL of the folder to write.
        only_tensors: Leave out entries that are not tensors, which otherwise are an error.
        max_shard_size: Same as for :func:`save_folder`.
        overwrite: Same as for :func:`save_folder`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`; used for both URLs.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Returns:
        The names of the files.

    Raises:
        SafetensorsError: the blob is not a dict of dense tensors in the zip format of `torch.save`.
        AzureError: the blob cannot be read.
    """
    file, fakes = _open_torch_save(blob_url, credential, transfer)
    tensors: dict[str, torch.Tensor] = {}
    others: list[str] = []
    for name, value in _flattened(fakes):
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dtype in FROM_TORCH:
            tensors[name] = value
        else:
            others.append(name)
    _check_others(file.url, others, only_tensors=only_tensors)
    forms = {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def load_some(names: list[str]) -> Mapping[str, torch.Tensor]:
        found, reads = {}, []
        for name in names:
            fake = tensors[name]
            span = sum((size - 1) * step for size, step in zip(fake.shape, fake.stride(), strict=True)) + 1
            flat = torch.empty(span if fake.numel() else 0, dtype=fake.dtype)
            offset: Any = fake.untyped_storage()._checkpoint_offset if fake.numel() else 0  # noqa: SLF001
            base = offset + fake.storage_offset() * fake.itemsize
            shape = tuple(flat.shape)
            reads.append(Read(name, file, base, fake.dtype, shape, Box((0,), shape), flat))
            found[name] = flat.as_strided(fake.shape, fake.stride()) if fake.numel() else flat.reshape(fake.shape)
        fetch(reads, file.client.config)
        return found

    return _write_folder(folder_url, forms, load_some, max_shard_size, credential, transfer, overwrite=overwrite)


def _open_torch_save(url: str, credential: Credential, transfer: TransferConfig | None) -> tuple[TensorFile, Any]:
    """The blob, and what is in it with tensors that have no elements but know where these are."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    parsed = parse_blob_url(url)
    client = ClientFactory(credential, transfer, parsed).blob(parsed)
    with BlobIO(url, "rb", credential=credential, transfer=transfer) as blob:
        try:
            with FakeTensorMode():
                fakes = torch.load(blob, map_location="cpu", weights_only=True)
        except (RuntimeError, AttributeError, ValueError, TypeError, KeyError, EOFError) as error:
            raise _not_torch_save(client.url, error) from None
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            raise _not_torch_save(client.url, error) from None
        version = BlobVersion(blob.size, str(blob.etag))
    return TensorFile(client, version, Header(None, {}), b""), fakes


def _not_torch_save(url: Any, error: Exception) -> SafetensorsError:
    return SafetensorsError(
        f"{url} is not a file that torch.save wrote in its zip format, or it has more than weights_only=True admits: "
        f"{type(error).__name__}: {error!s:.300}",
        url=str(url),
    )


def _flattened(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts, by names that are joined with dots."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flattened(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def safetensors_to_torch_save(
    folder_url: str,
    blob_url: str,
    *,
    credential: Credential = None,
    transfer: TransferConfig | None = None,
) -> None:
    """Write a safetensors file, or a folder of them, as one blob that `torch.load` reads: a dict of tensors by name.

    Tensors are read when they are written, some MiB at a time.

    Args:
        folder_url: URL of the folder, of an index in it, or of a file.
        blob_url: URL of the blob to write or overwrite.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`; used for both URLs.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        SafetensorsError: the model cannot be read.
        FatalBlobIOWriteError: the blob cannot be written; it is unchanged.
    """
    model = open_model(folder_url, credential, transfer)
    parts, gaps = outline_of(
        lambda: {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in model.tensors.items()}
    )
    full = [name for name, stored in model.tensors.items() if stored.nbytes]
    if gaps != [model.tensors[name].nbytes for name in full]:
        raise SafetensorsError(
            f"{model.url}: torch {torch.__version__} lays out files in a way that is not known", url=model.url
        )

    def pieces() -> Iterator[memoryview]:
        names = iter(full)
        for part in parts:
            if part is None:
                yield from bytes_of_model(model, [next(names)])
            else:
                yield memoryview(part)

    parsed = parse_blob_url(blob_url)
    client = ClientFactory(credential, transfer, parsed).blob(parsed)
    writer = client.writer()
    with on_error(writer.abort):
        config = client.config
        writer.write_pieces(pieces(), block_size=config.block_size, concurrency=min(4, config.initial_concurrency))
        writer.commit()


def _read(model: Model, names: list[str]) -> dict[str, torch.Tensor]:
    tensors = {name: model.tensors[name].new(model.tensors[name].whole, None, torch.device("cpu")) for name in names}
    reads = [read for name in names for read in reads_of(model.tensors[name], model.tensors[name].whole, tensors[name])]
    fetch(reads, model.transfer)
    return tensors


def _write_folder(
    url: str,
    forms: Mapping[str, Form],
    load_some: LoadSome,
    max_shard_size: int | str,
    credential: Credential,
    transfer: TransferConfig | None,
    *,
    overwrite: bool,
) -> list[str]:
    """Write a folder with tensors of *forms*, which *load_some* loads."""
    limit = bytes_of_size(max_shard_size)
    folder = folder_at(url, credential, transfer)
    shapes = {}
    for name, form in forms.items():
        kind = _kind(folder.url, name, form)
        shapes[name] = kind, header_shape(kind, form.shape)
    groups = split_by_size({name: form.nbytes for name, form in forms.items()}, limit)
    layouts = [build_header({name: shapes[name] for name in group}, {"format": "pt"}) for group in groups]
    before = look(folder, overwrite=overwrite)
    names = names_of(len(groups), before)

    def write(numbered: tuple[int, str]) -> None:
        number, name = numbered
        layout = layouts[number]
        data = _data_of(layout.names, forms, load_some)
        write_pieces(folder.blob(name), layout, data, create_only=name not in before.files)

    write_all(folder, names, write)
    commit(folder, before, names, index_of(names, layouts, sum(form.nbytes for form in forms.values())))
    return names


def _kind(url: str, name: str, form: Form) -> str:
    kind = FROM_TORCH.get(form.dtype)
    if kind is None or name == "__metadata__":
        what = f"has the type {form.dtype}, which the format does not have" if kind is None else "has a reserved name"
        raise SafetensorsError(f"{url}: the tensor {name!r:.200} {what}", url=url, tensor=name)
    return kind


def _data_of(names: list[str], forms: Mapping[str, Form], load_some: LoadSome) -> Iterator[memoryview]:
    for batch in split_by_size({name: forms[name].nbytes for name in names}, _AT_ONCE):
        tensors = dict(load_some(batch))
        for name in batch:
            tensor = bytes_alike(tensors.pop(name))
            yield view_of(tensor if tensor.stride() == contiguous_strides(tensor.shape) else tensor.contiguous())


def _check_others(url: str, others: list[str], *, only_tensors: bool) -> None:
    if others and not only_tensors:
        more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
        raise SafetensorsError(
            f"{url}: {', '.join(f'{name!r:.100}' for name in others[:3])}{more} cannot be stored in safetensors files, "
            "which have dense tensors only; leave them out with only_tensors=True (--only-tensors)",
            url=url,
            tensor=others[0],
        )


class _one_process(warnings.catch_warnings):  # noqa: N801 - used like a function
    """Without torch's warning that the process group is missing: one process is the intent."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is")
