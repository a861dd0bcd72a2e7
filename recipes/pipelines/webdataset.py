"""Train from WebDataset shards: pack samples into tars, read them with workers, resume mid-epoch.

``python -m recipes.pipelines.webdataset URL``
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data.datapipes.iter import IterableWrapper
from torchdata.stateful_dataloader import StatefulDataLoader

from azstoragetorch.datapipes import AzureBlobFileLister, ResumableDataPipe
from recipes.access import credential_of_environment, split_sas


def make_samples(count: int) -> Iterator[dict[str, Any]]:
    """Images of one brightness, with the brightness as label."""
    for number in range(count):
        label = number % 10
        image = io.BytesIO()
        Image.new("L", (8, 8), 25 * label).save(image, "PNG")
        yield {"__key__": f"{number:06d}", "png": image.getvalue(), "json": json.dumps({"label": label})}


def pack(samples: Iterable[dict[str, Any]], folder_url: str, credential: Any) -> list[str]:
    """Write *samples* into tars of at most 64 MiB; returns their URLs."""
    folder_url, credential = split_sas(folder_url, credential)
    pattern = f"{folder_url.rstrip('/')}/train-{{shard:06d}}.tar"
    source = IterableWrapper(samples, deepcopy=False)
    return list(source.write_blob_tar_shards(pattern, max_size=64 << 20, credential=credential))


def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    pixels = torch.frombuffer(bytearray(Image.open(io.BytesIO(sample["png"])).tobytes()), dtype=torch.uint8)
    return pixels / 255, json.loads(sample["json"])["label"]


def make_dataset(folder_url: str, credential: Any) -> ResumableDataPipe:
    """Shuffled by shard and, within a buffer, by sample. A shard is read by one worker, a few tars ahead."""
    folder_url, credential = split_sas(folder_url, credential)
    shards = AzureBlobFileLister(f"{folder_url.rstrip('/')}/", "*.tar", credential=credential).shuffle().shard_blobs()
    samples = shards.open_files_by_azure(prefetch=2, credential=credential).expand_blob_tar().group_blob_samples()
    return samples.shuffle(buffer_size=1000).map(decode).to_resumable(seed=0)


def train(folder_url: str, credential: Any, *, epochs: int = 2, workers: int = 2) -> list[float]:
    """Returns the loss of every step. ``loader.state_dict()`` belongs into each checkpoint."""
    dataset = make_dataset(folder_url, credential)
    loader = StatefulDataLoader(dataset, batch_size=32, num_workers=workers)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for pixels, labels in loader:
            loss = nn.functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack images into tar shards and train on them.")
    parser.add_argument("folder_url", help="a SAS may be in it")
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    credential = credential_of_environment()
    shards = pack(make_samples(options.samples), options.folder_url, credential)
    losses = train(options.folder_url, credential)
    print(f"{options.samples} images in {len(shards)} shards; loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last")


if __name__ == "__main__":
    main()
