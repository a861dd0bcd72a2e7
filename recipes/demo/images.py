"""Handwritten digits as PNG blobs, and a table of their labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from azstoragetorch import join_url
from azstoragetorch.datasets import Blob, IterableBlobDataset
from azstoragetorch.io import BlobIO

LABELS = "labels.csv"

Digit = tuple[torch.Tensor, int, int, int]


def upload_digits(container_url: str, credential: Any, count: int | None = None) -> int:
    """Store the first *count* digits (all 1,797 by default) and the table; returns the images' bytes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = {f"digits/{number:04d}.png": int(label) for number, label in enumerate(digits.target[:count])}

    def upload(name: str, pixels: np.ndarray) -> int:
        with BlobIO(join_url(container_url, name), "wb", credential=credential) as blob:
            Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(blob, "PNG")
            return blob.tell()

    with ThreadPoolExecutor(8) as pool:
        sizes = pool.map(upload, labels, digits.images)
        stored = sum(tqdm(sizes, "uploading", len(labels), unit="image", mininterval=0.5))

    with io.TextIOWrapper(BlobIO(join_url(container_url, LABELS), "wb", credential=credential), newline="") as table:
        csv.writer(table).writerows(labels.items())
    return stored


def read_labels(container_url: str, credential: Any) -> list[tuple[str, int]]:
    """Name and label of every image."""
    with io.TextIOWrapper(BlobIO(join_url(container_url, LABELS), "rb", credential=credential), newline="") as table:
        return [(name, int(label)) for name, label in csv.reader(table)]


class ReadDigit:
    """Turns a blob into pixels (1 x 8 x 8, from 0 to 1), label, size in bytes, and the number of the image."""

    def __init__(self, labels: Iterable[tuple[str, int]]) -> None:
        self.labels = dict(labels)

    def __call__(self, blob: Blob) -> Digit:
        with blob.reader() as reader:
            pixels = np.asarray(Image.open(reader), dtype=np.float32) / 255
            number = int(PurePosixPath(blob.blob_name).stem)
            return torch.from_numpy(pixels)[None], self.labels[blob.blob_name], reader.size, number


def digit_images(
    container_url: str, credential: Any, labels: Sequence[tuple[str, int]], *, shuffle: bool = False
) -> IterableBlobDataset[Digit]:
    """The images in *labels*; the next ones are fetched while one is decoded."""
    urls = [join_url(container_url, name) for name, _ in labels]
    return IterableBlobDataset.from_blob_urls(urls, credential=credential, transform=ReadDigit(labels), shuffle=shuffle)
