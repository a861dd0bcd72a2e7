"""``python -m recipes.benchmarks.sweep URL``: is what ``doctor`` suggests as good as the best of all settings?

Asks ``azstoragetorch doctor`` for its suggestion for the container URL, measures every combination of concurrency and
sizes, and then the best of these and the suggestion in turns. Ends with 1 if the suggestion reaches less than
90 % of the best. Credentials come from AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_KEY; without them the
container has to be open to everybody.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from azure.core.credentials import AzureSasCredential
from azure.storage.blob import ContainerClient
from tqdm import tqdm

from azstoragetorch import TransferConfig
from azstoragetorch.io import BlobIO
from recipes.benchmarks.__main__ import sas_for

MiB = 1 << 20
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (4 * MiB, 8 * MiB, 16 * MiB, 32 * MiB)
BEST = 3  # settings that meet the suggestion: the first of many is there by luck, too
ENOUGH = 0.9

Measure = Callable[[TransferConfig], float]


def suggested_for(url: str, sas: str | None, options: Iterable[str] = ()) -> TransferConfig:
    """What ``doctor`` suggests."""
    access = ["--sas-env", "DOCTOR_SAS"] if sas else ["--anonymous"]
    ended = subprocess.run(
        [sys.executable, "-m", "azstoragetorch.cli", "doctor", url, "--json", *access, *options],
        env=os.environ | ({"DOCTOR_SAS": sas} if sas else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return TransferConfig(**json.loads(ended.stdout)["suggested"])


def settings(field: str, concurrencies: Iterable[int], sizes: Iterable[int]) -> list[TransferConfig]:
    """All combinations, each with the memory that it can use."""
    return [
        TransferConfig(
            max_concurrency=count,
            read_ahead=max(128 * MiB, count * size),
            memory_limit=max(512 * MiB, 2 * count * size),
            **{field: size},  # type: ignore[arg-type]
        )
        for count in concurrencies
        for size in sizes
    ]


def take_turns(measure: Measure, configs: list[TransferConfig], rounds: int) -> list[float]:
    """Medians, in the order of *configs*."""
    rates: list[list[float]] = [[] for _ in configs]
    for _ in tqdm(range(rounds), desc="measuring", unit="round", disable=None):
        for found, config in zip(rates, configs, strict=True):
            found.append(measure(config))
    return [statistics.median(found) for found in rates]


def compare(measure: Measure, suggested: TransferConfig, configs: list[TransferConfig], rounds: int) -> dict[str, Any]:
    """The suggestion against the best of *configs*: rates in MiB/s, and the share that it reaches."""
    swept = take_turns(measure, configs, rounds)
    order = sorted(range(len(configs)), key=lambda index: swept[index], reverse=True)
    best = [configs[index] for index in order[:BEST]]
    mine, *theirs = take_turns(measure, [suggested, *best], 2 * rounds + 1)
    at = theirs.index(max(theirs))
    changed = {name: getattr(best[at], name) for name in ("max_concurrency", "part_size", "block_size")}
    return {
        "suggested": round(mine / MiB),
        "best": round(theirs[at] / MiB),
        "best_setting": changed,
        "slowest": round(min(swept) / MiB),
        "share": round(mine / theirs[at], 3),
    }


def check(
    url: str,
    sas: str | None,
    *,
    size: int = 512 * MiB,
    rounds: int = 3,
    concurrencies: Iterable[int] = CONCURRENCIES,
    sizes: Iterable[int] = SIZES,
    doctor: Iterable[str] = (),
) -> dict[str, Any]:
    """Suggestion and sweep of both directions, in a folder of the container *url* that is removed again."""
    suggested = suggested_for(url, sas, doctor)
    credential = AzureSasCredential(sas) if sas else None
    name = f"azstoragetorch-sweep-{uuid.uuid4().hex}"
    blob_url = f"{url.rstrip('/')}/{name}"
    buffer = memoryview(bytearray(os.urandom(MiB)) * (size // MiB))

    def upload(config: TransferConfig) -> float:
        begin = time.perf_counter()
        with BlobIO(blob_url, "wb", credential=credential or False, transfer=config) as blob:
            blob.write(buffer)
        return size / (time.perf_counter() - begin)

    def download(config: TransferConfig) -> float:
        begin = time.perf_counter()
        with BlobIO(blob_url, "rb", credential=credential or False, transfer=config) as blob:
            if blob.readinto(buffer) != size:
                raise OSError("something else has written to the blob")
        return size / (time.perf_counter() - begin)

    try:
        upload(TransferConfig())
        return {
            "suggestion": {name: getattr(suggested, name) for name in ("max_concurrency", "part_size", "block_size")},
            "settings": len(list(concurrencies)) * len(list(sizes)),
            "download": compare(download, suggested, settings("part_size", concurrencies, sizes), rounds),
            "upload": compare(upload, suggested, settings("block_size", concurrencies, sizes), rounds),
        }
    finally:
        with ContainerClient.from_container_url(url, credential=credential) as container:
            container.delete_blob(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a container")
    parser.add_argument("--size", type=int, default=512, help="MiB that a measurement moves")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each setting")
    options = parser.parse_args()
    account_url = options.url.rstrip("/").rpartition("/")[0]
    found = check(options.url, sas_for(account_url), size=options.size * MiB, rounds=options.rounds)
    print(json.dumps(found, indent=2))
    sys.exit(any(found[direction]["share"] < ENOUGH for direction in ("download", "upload")))


if __name__ == "__main__":
    main()
