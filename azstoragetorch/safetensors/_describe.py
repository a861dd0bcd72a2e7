"""What is in a model: its files and tensors, from the headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from azstoragetorch._blob.credentials import Credential
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch.safetensors._dtypes import BITS, header_shape
from azstoragetorch.safetensors._folder import open_model


@dataclass(frozen=True)
class FileSummary:
    """A safetensors file: its name, the number of its tensors, and its size in bytes."""

    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class TensorSummary:
    """A tensor: the name of its type and its shape as in the header, its bytes, and the file that it begins in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


@dataclass(frozen=True)
class ModelSummary:
    """The files and tensors of a model, and the metadata of its files."""

    url: str
    files: tuple[FileSummary, ...]
    tensors: tuple[TensorSummary, ...]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def describe_model(url: str, *, credential: Credential = None, transfer: TransferConfig | None = None) -> ModelSummary:
    """Describe a safetensors file or a folder of them. Reads headers only.

    Args:
        url: URL of a file, which ends in ``.safetensors``, of a folder, or of an index in it.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        SafetensorsError: same as for :func:`load_model_folder`.
    """
    model = open_model(url, credential, transfer)
    names = {file.url: file.client.url.blob.rpartition("/")[2] for file in model.files}
    tensors = []
    for name, stored in model.tensors.items():
        shape = header_shape(stored.kind, stored.shape)
        nbytes = math.prod(shape) * BITS[stored.kind] // 8
        tensors.append(TensorSummary(name, stored.kind, shape, nbytes, names[stored.url]))
    files = tuple(FileSummary(names[file.url], len(file.header.entries), file.version.size) for file in model.files)
    metadata: dict[str, str] = {}
    for file in model.files:
        metadata |= file.header.metadata or {}
    return ModelSummary(model.url, files, tuple(tensors), metadata)
