"""List images, keep those of a sensible size, open, decode, batch.

``python -m recipes.pipelines.images URL``
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from azstoragetorch.datapipes import AzureBlobInfoLister, BlobInfo
from recipes.access import credential_of_environment, split_sas


def is_between(blob: BlobInfo, least: int, most: int) -> bool:
    return least <= blob.size <= most


def decode(opened: tuple[str, Any]) -> tuple[str, torch.Tensor]:
    """URL and pixels, 3 x 32 x 32, from 0 to 1."""
    url, stream = opened
    with closing(stream):
        image = Image.open(stream).convert("RGB").resize((32, 32))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return url, pixels.view(32, 32, 3).permute(2, 0, 1) / 255


def make_loader(
    folder_url: str, credential: Any, *, least: int = 100, most: int = 20 << 20, batch_size: int = 64, workers: int = 2
) -> DataLoader[Any]:
    folder_url, credential = split_sas(folder_url, credential)
    blobs = AzureBlobInfoLister(folder_url, ["*.jpg", "*.png"], credential=credential)
    blobs = blobs.filter(functools.partial(is_between, least=least, most=most))
    images = blobs.shuffle().sharding_filter().open_files_by_azure(credential=credential).map(decode)
    return DataLoader(images, batch_size=batch_size, num_workers=workers)


def show(loader: Iterable[Any]) -> None:
    for urls, pixels in loader:
        print(f"{tuple(pixels.shape)} from {urls[0]} to {urls[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the batches of the images in a folder.")
    parser.add_argument("folder_url", help="a SAS may be in it")
    show(make_loader(parser.parse_args().folder_url, credential_of_environment()))


if __name__ == "__main__":
    main()
