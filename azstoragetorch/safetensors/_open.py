"""`safe_open`: one file, whose tensors and parts of tensors are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch

from azstoragetorch._blob.client import ClientFactory
from azstoragetorch._blob.credentials import Credential
from azstoragetorch._blob.url import parse_blob_url
from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._tensors.planning import Box
from azstoragetorch.safetensors._fetch import fetch
from azstoragetorch.safetensors._files import open_file
from azstoragetorch.safetensors._model import Model, Stored, model_of_file, reads_of
from azstoragetorch.safetensors._slices import box_of_index


class TensorSlice:
    """A tensor of a file, of which an index reads a part; `safe_open.get_slice` returns it.

    ``part[2:4]`` reads only these rows. For ``part[:, 2:4]``, it does what takes the least time: parts of rows that lie
    close together are fetched with what is between them.
    """

    def __init__(self, opened: safe_open, stored: Stored) -> None:
        self._opened = opened
        self._stored = stored

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor, as the header has it."""
        return list(self._stored.chunks[0].file.header.entries[self._stored.name].shape)

    def get_dtype(self) -> str:
        """The name of the type in the header, such as ``"BF16"``."""
        return self._stored.kind

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The part that *index* selects: integers, slices with a positive step, ``...``, None, or lists of integers.

        Raises:
            IndexError: *index* is out of bounds, or has too many dimensions.
            BlobChangedError: the file was overwritten since it was opened.
        """
        box, rest = box_of_index(index, self._stored.shape)
        return self._opened._read({self._stored.name: (self._stored, box)})[self._stored.name][rest]  # noqa: SLF001 - of this module

    def __repr__(self) -> str:
        return f"TensorSlice({self._stored.name!r}, {self._stored.kind}, {self.get_shape()})"


class safe_open:  # noqa: N801 - the name in the package safetensors
    """Opens a safetensors file in a blob; tensors and parts of tensors are read when they are asked for.

    The counterpart of ``safetensors.safe_open``, and a context manager like it. Opening reads the header with one
    request and checks it. Everything that is read later is of the same version of the blob.

    Args:
        url: URL of the file, in any of the forms that :doc:`the guide </guide/urls>` lists.
        device: Where tensors are created, as for `torch.device`.
        credential: Same as for :class:`~azstoragetorch.io.BlobIO`.
        transfer: Transfer settings; see :class:`azstoragetorch.TransferConfig`.

    Raises:
        SafetensorsError: the blob is not a valid safetensors file.
        ResourceNotFoundError: the blob does not exist.
        ValueError: *url* is not the URL of a blob.
    """

    def __init__(
        self,
        url: str,
        device: str | int | torch.device = "cpu",
        *,
        credential: Credential = None,
        transfer: TransferConfig | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._model: Model | None = open_model_file(url, credential, transfer)

    @property
    def _opened(self) -> Model:
        if self._model is None:
            raise ValueError("the safetensors file is closed; open it again")
        return self._model

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of their bytes."""
        return list(self._opened.tensors)

    def offset_keys(self) -> list[str]:
        """Same as `keys`; the package safetensors has both."""
        return self.keys()

    def metadata(self) -> dict[str, str] | None:
        """The metadata of the file; None if it has none."""
        found = self._opened.files[0].header.metadata
        return dict(found) if found is not None else None

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read the tensor *name*.

        Raises:
            SafetensorsError: there is no such tensor, or torch does not have its type.
            BlobChangedError: the file was overwritten since it was opened.
        """
        return self.get_tensors([name])[name]

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Read the tensors *names*, or all, at once. Raises the same errors as `get_tensor`."""
        chosen = self._opened.select(names)
        return self._read({name: (stored, stored.whole) for name, stored in chosen.items()})

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor *name*, of which an index reads a part: ``get_slice("weight")[:1024]``.

        Raises:
            SafetensorsError: there is no such tensor.
        """
        return TensorSlice(self, self._opened.select([name])[name])

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self._model = None

    def _read(self, wanted: dict[str, tuple[Stored, Box]]) -> dict[str, torch.Tensor]:
        transfer = self._opened.transfer
        tensors = {name: stored.new(box, None, self._device) for name, (stored, box) in wanted.items()}
        reads = [read for name, (stored, box) in wanted.items() for read in reads_of(stored, box, tensors[name])]
        fetch(reads, transfer)
        return tensors

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._opened.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._opened.tensors

    def __repr__(self) -> str:
        return f"safe_open({self._model.url!r})" if self._model is not None else "safe_open(closed)"


def open_model_file(url: str, credential: Credential, transfer: TransferConfig | None) -> Model:
    """The tensors of the file at *url*."""
    parsed = parse_blob_url(url)
    return model_of_file(open_file(ClientFactory(credential, transfer, parsed).blob(parsed)))
