"""Handwritten digits as PNG blobs, with a table of their labels beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from azstoragetorch.io import BlobIO

LABELS = "labels.csv"


def upload_digits(container_url: str, credential: Any, count: int | None = None) -> int:
    """Store the first *count* digits (all 1,797 by default) and the table; returns the images' bytes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = {f"digits/{number:04d}.png": int(label) for number, label in enumerate(digits.target[:count])}

    def upload(name: str, pixels: np.ndarray) -> int:
        with BlobIO(f"{container_url}/{name}", "wb", credential=credential) as blob:
            Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(blob, "PNG")
            return blob.tell()

    with ThreadPoolExecutor(8) as pool:
        sizes = pool.map(upload, labels, digits.images)
        stored = sum(tqdm(sizes, "uploading", len(labels), unit="image", mininterval=0.5))

    with io.TextIOWrapper(BlobIO(f"{container_url}/{LABELS}", "wb", credential=credential), newline="") as table:
        csv.writer(table).writerows(labels.items())
    return stored


def read_labels(container_url: str, credential: Any) -> list[tuple[str, int]]:
    """Name and label of every image."""
    with io.TextIOWrapper(BlobIO(f"{container_url}/{LABELS}", "rb", credential=credential), newline="") as table:
        return [(name, int(label)) for name, label in csv.reader(table)]


class DigitImages(Dataset[tuple[torch.Tensor, int, int]]):
    """Pixels (1 x 8 x 8, from 0 to 1), label, and size in bytes of each image, read when it is asked for."""

    def __init__(self, container_url: str, credential: Any, labels: Iterable[tuple[str, int]]) -> None:
        self.container_url = container_url
        self.credential = credential
        self.labels = list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        name, label = self.labels[index]
        with BlobIO(f"{self.container_url}/{name}", "rb", credential=self.credential) as blob:
            pixels = np.asarray(Image.open(blob), dtype=np.float32) / 255
            return torch.from_numpy(pixels)[None], label, blob.size
