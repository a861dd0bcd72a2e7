"""Measure the time for the metadata of a large checkpoint: ``python -m tests.checkpoint.measure [ITEMS]``.

Half of the items are shards of tensors and half are objects, as in the state of an optimizer. The service is on
loopback, so the times are CPU times.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from azstoragetorch.checkpoint import BlobStorageReader
from azstoragetorch.checkpoint._format import (
    Item,
    Payload,
    dump_metadata,
    envelope,
    many_objects,
    read_item,
    storage_info,
)
from azstoragetorch.checkpoint._reads import plan, reads_of
from tests.faults import FaultService

SHAPE = torch.Size([16, 16])


def large_metadata(items: int) -> Metadata:
    """Metadata of *items* items in 64 blobs."""
    around = envelope(torch.float32, SHAPE)
    payload = Payload(len(around.head), torch.float32, tuple(SHAPE), (16, 1))
    length = len(around.head) + payload.nbytes + len(around.tail)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for number in range(items // 2):
        path, at = f"__{number % 64}_0.distcp", number // 64 * (length + 10)
        chunk = ChunkStorageMetadata(torch.Size([0, 0]), SHAPE)
        key = f"model.layers.{number}.weight"
        entries[key] = TensorStorageMetadata(TensorProperties(torch.float32), SHAPE, [chunk])
        storage[MetadataIndex(key, chunk.offsets)] = storage_info(Item(path, at, length, (), payload, '"1"'))
        key = f"optimizer.state.{number}.step"
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = storage_info(Item(path, at + length, 10))
    return Metadata(entries, {key: tuple(key.split(".")) for key in entries}, storage)


def main() -> None:
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    metadata = large_metadata(items)
    with FaultService() as service:
        service.create_container("c")
        content = dump_metadata(metadata)
        service.put("c", "run/.metadata", content)
        begin = time.perf_counter()
        reader = BlobStorageReader(f"{service.container_url('c')}/run", credential=False)
        found = reader.read_metadata()
        read = time.perf_counter()
        reader.set_up_storage_reader(found, True)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        state = {
            key: torch.zeros(entry.size) if isinstance(entry, TensorStorageMetadata) else 0
            for key, entry in found.state_dict_metadata.items()
        }
        made = time.perf_counter()
        planner.set_up_planner(state, found, True)
        local = planner.create_local_plan()
        by_torch = time.perf_counter()
        with many_objects():
            wanted = [(item, read_item(found.storage_data[item.storage_index])) for item in local.items]
            requests = plan(reads_of(wanted), 8 << 20)
        end = time.perf_counter()
    sys.stdout.write(
        f"{len(found.storage_data):,} items, {len(content):,} bytes of metadata, {len(requests)} requests\n"
        f"fetched and read in {read - begin:.2f} s\n"
        f"planned by torch in {by_torch - made:.2f} s and by us in {end - by_torch:.2f} s\n"
        f"all in all {end - begin - (made - read):.2f} s\n"
    )


if __name__ == "__main__":
    main()
