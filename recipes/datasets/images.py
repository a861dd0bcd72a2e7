"""Photographs in a container, one folder for each class, as batches of tensors; decoded by Pillow in the workers.

``python -m recipes.datasets.images URL photos/ cat dog --cache ./cache``
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from azstoragetorch.datasets import Blob, IterableBlobDataset
from recipes.access import credential_of_environment, split_sas

SIDE = 64  # pixels


class Decode:
    """Pixels, 3 x SIDE x SIDE, from 0 to 1, and the number of the class."""

    def __init__(self, classes: list[str]) -> None:
        self.numbers = {name: number for number, name in enumerate(classes)}

    def __call__(self, blob: Blob) -> tuple[torch.Tensor, int]:
        folder = blob.blob_name.split("/")[-2]
        with blob.reader() as reader, Image.open(reader) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels = np.asarray(ImageOps.fit(upright, (SIDE, SIDE)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255, self.numbers[folder]


def make_loader(
    container_url: str,
    prefix: str,
    classes: list[str],
    credential: Any,
    *,
    batch_size: int = 64,
    workers: int = 2,
    cache_dir: Path | None = None,
) -> DataLoader[Any]:
    """Call ``loader.dataset.set_epoch(n)`` before each epoch. Images that cannot be decoded are left out and named."""
    images = IterableBlobDataset.from_container_url(
        container_url,
        prefix=prefix,
        credential=credential,
        transform=Decode(classes),
        shuffle=True,
        on_error="warn",
        cache_dir=cache_dir,  # epochs after the first come from the local disk
        cache_bytes=200 << 30,
    )
    return DataLoader(images, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Read photographs twice, the second time from the cache.")
    parser.add_argument("container_url", help="a SAS may be in it")
    parser.add_argument("prefix", help="the folder of the classes, such as photos/")
    parser.add_argument("classes", nargs="+", help="the folders below it")
    parser.add_argument("--cache", type=Path, help="a folder on a local disk")
    options = parser.parse_args()
    url, credential = split_sas(options.container_url, credential_of_environment())
    loader = make_loader(url, options.prefix, options.classes, credential, cache_dir=options.cache)
    for epoch in range(2):
        loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        start = time.perf_counter()
        count = sum(len(classes) for _, classes in loader)
        print(f"epoch {epoch}: {count} images in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
