"""Write shards with WebDataset into blobs, and train on them with two workers.

python -m recipes.frameworks.webdataset https://ACCOUNT.blob.core.windows.net/CONTAINER/shards
"""

from __future__ import annotations

import argparse

import torch
import webdataset as wds
from torch.utils.data import DataLoader

from azstoragetorch import join_url
from azstoragetorch.webdataset import register
from recipes.access import credential_of_environment


def main() -> None:
    parser = argparse.ArgumentParser(description="Write shards, and read them in workers.")
    parser.add_argument("url", help="a folder for the shards; a SAS may be in it")
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    register(credential=credential_of_environment())
    shards = options.samples // 100
    for number in range(shards):
        with wds.TarWriter(join_url(options.url, f"train-{number:03}.tar")) as writer:
            for sample in range(number * 100, (number + 1) * 100):
                writer.write({"__key__": f"{sample:06}", "pth": torch.full((8,), sample), "cls": sample % 10})
    urls = [join_url(options.url, f"train-{number:03}.tar") for number in range(shards)]
    dataset = wds.WebDataset(urls, shardshuffle=shards).shuffle(100).decode().to_tuple("pth", "cls").batched(20)
    count = sum(len(classes) for _, classes in DataLoader(dataset, batch_size=None, num_workers=2))
    print(f"{count} samples from {shards} shards")


if __name__ == "__main__":
    main()
