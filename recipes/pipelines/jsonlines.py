"""Read large JSON Lines blobs with several workers, each its own ranges, every line exactly once.

``python -m recipes.pipelines.jsonlines URL``
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from torch.utils.data import DataLoader

from azstoragetorch.datapipes import AzureBlobInfoLister
from recipes.access import credential_of_environment, split_sas


def parse(lines: tuple[str, bytes]) -> list[Any]:
    _, data = lines
    return [json.loads(line) for line in data.splitlines()]


def make_loader(
    url: str, credential: Any, *, chunk_size: int = 32 << 20, batch_size: int = 256, workers: int = 2
) -> DataLoader[Any]:
    """Batches of records. A worker holds one range at a time, and some that are being fetched."""
    url, credential = split_sas(url, credential)
    blobs = AzureBlobInfoLister(url, "*.jsonl", credential=credential)
    ranges = blobs.split_blob_ranges(chunk_size, align=b"\n", credential=credential)
    records = ranges.shuffle().sharding_filter().read_files_by_azure(prefetch=2, credential=credential)
    records = records.map(parse).unbatch().shuffle(buffer_size=10_000)
    return DataLoader(records, batch_size=batch_size, num_workers=workers, collate_fn=list)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the records of all *.jsonl blobs in a folder.")
    parser.add_argument("url", help="a SAS may be in it")
    loader = make_loader(parser.parse_args().url, credential_of_environment())
    print(f"{sum(len(records) for records in loader):,} records")


if __name__ == "__main__":
    main()
