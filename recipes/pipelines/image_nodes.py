"""The pipeline of ``images`` with ``torchdata.nodes``: threads instead of worker processes, and exact resume.

``python -m recipes.pipelines.image_nodes URL``
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import torch
from torch.utils.data import default_collate
from torchdata.nodes import BaseNode, Batcher, Loader, Mapper, ParallelMapper, Prefetcher

from azstoragetorch.nodes import BlobInfo, BlobLister, BlobReader, BlobSharder, ShuffleBuffer
from recipes.access import credential_of_environment, split_sas
from recipes.pipelines import images


class SizeFilter(BaseNode):
    """Passes on the blobs of *least* to *most* bytes."""

    def __init__(self, source: BaseNode, least: int, most: int) -> None:
        super().__init__()
        self.source = source
        self.least = least
        self.most = most

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])

    def next(self) -> BlobInfo:
        while True:
            blob = next(self.source)
            if images.is_between(blob, self.least, self.most):
                return blob

    def get_state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict()}


def decode(read: tuple[str, bytes]) -> tuple[str, torch.Tensor]:
    url, data = read
    return images.decode((url, io.BytesIO(data)))


def make_loader(
    folder_url: str, credential: Any, *, least: int = 100, most: int = 20 << 20, batch_size: int = 64, threads: int = 4
) -> Loader:
    """``state_dict()`` and ``load_state_dict()`` of the loader resume at the exact batch."""
    folder_url, credential = split_sas(folder_url, credential)
    blobs = SizeFilter(BlobLister(folder_url, ["*.jpg", "*.png"], credential=credential), least, most)
    blobs = ShuffleBuffer(BlobSharder(blobs), buffer_size=100_000, seed=0)
    decoded = ParallelMapper(BlobReader(blobs, credential=credential), decode, num_workers=threads)
    batches = Mapper(Batcher(decoded, batch_size, drop_last=False), default_collate)
    return Loader(Prefetcher(batches, prefetch_factor=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the batches of the images in a folder.")
    parser.add_argument("folder_url", help="a SAS may be in it")
    images.show(make_loader(parser.parse_args().folder_url, credential_of_environment()))


if __name__ == "__main__":
    main()
