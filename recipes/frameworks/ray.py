"""Prepare the demo's images with Ray: PNG blobs become tar shards, on which a network is trained.

python -m recipes.frameworks.ray https://ACCOUNT.blob.core.windows.net/CONTAINER/digits

With RAY_ADDRESS, it uses that cluster instead of one on this machine.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import ray

from azstoragetorch import join_url, share_credentials
from azstoragetorch.datasets import Blob
from azstoragetorch.ray import read_blobs, write_shards
from recipes.access import credential_of_environment
from recipes.demo.images import read_labels, upload_digits
from recipes.pipelines.webdataset import make_dataset, train


def to_sample(labels: dict[str, int], blob: Blob) -> dict[str, Any]:
    """The image, and its label as JSON, under the number of the image."""
    name = PurePosixPath(blob.blob_name)
    with blob.reader() as reader:
        label = json.dumps({"label": labels[name.name]})
        return {"__key__": name.stem, "png": reader.read(), "json": label}


def prepare(url: str, credential: Any) -> list[str]:
    """Pack the images below *url* into shards of 200; returns their URLs."""
    labels = {PurePosixPath(name).name: label for name, label in read_labels(url, credential)}
    # An account key goes to the workers only since it is shared. With identities, pass credential=None instead.
    with share_credentials():
        images = read_blobs(join_url(url, "digits/"), transform=partial(to_sample, labels), credential=credential)
        return write_shards(images, join_url(url, "shards/"), max_count=200, overwrite=True, credential=credential)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack images into shards with Ray, and train on them.")
    parser.add_argument("url", help="a folder for the images and the shards; a SAS may be in it")
    url = parser.parse_args().url
    credential = credential_of_environment()
    upload_digits(url, credential)
    ray.init(include_dashboard=False)
    shards = prepare(url, credential)
    ray.shutdown()
    count = sum(1 for _ in make_dataset(join_url(url, "shards/"), credential))
    losses = train(join_url(url, "shards/"), credential, epochs=2)
    print(f"{count} images in {len(shards)} shards; the loss went {'down' if losses[-1] < losses[0] else 'up'}")


if __name__ == "__main__":
    main()
