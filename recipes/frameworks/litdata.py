"""Make a dataset with litdata, copy it to blobs, and stream it with two workers.

python -m recipes.frameworks.litdata https://ACCOUNT.blob.core.windows.net/CONTAINER/train
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from azure.core.credentials import AzureSasCredential
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.cache import Cache, Dir

from azstoragetorch import join_url
from azstoragetorch.io import BlobIO
from azstoragetorch.litdata import register
from recipes.access import credential_of_environment


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a dataset, and stream it from blobs.")
    parser.add_argument("url", help="a folder for the dataset: https://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER")
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    place, _, sas = options.url.partition("?")
    credential = AzureSasCredential(sas) if sas else credential_of_environment()
    register()
    with tempfile.TemporaryDirectory() as folder:
        made, used = Path(folder, "made"), Path(folder, "used")
        cache = Cache(str(made), chunk_bytes="64KB")
        for number in range(options.samples):
            cache[number] = torch.full((64,), number)
        cache.done()
        cache.merge()
        for path in made.iterdir():
            with BlobIO(join_url(place, path.name), "wb", credential=credential) as blob:
                blob.write(path.read_bytes())
        used.mkdir()
        dataset = StreamingDataset(
            Dir(path=str(used), url=place), storage_options={"credential": credential}, shuffle=True
        )
        loader = StreamingDataLoader(dataset, batch_size=20, num_workers=2)
        print(f"{sum(len(batch) for batch in loader)} samples")


if __name__ == "__main__":
    main()
