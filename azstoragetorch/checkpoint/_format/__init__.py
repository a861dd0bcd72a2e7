"""What a checkpoint consists of: the names of its blobs, the items in data blobs, and the metadata.

A checkpoint is a folder: data blobs, in which items lie one after the other, each as `torch.save` writes it, and the
blob ``.metadata`` that says where each item is. A side blob may hold digests of the items. After a plain download,
torch's own ``FileSystemReader`` reads the folder.
"""

from __future__ import annotations

from azstoragetorch.checkpoint._format.digests import (
    Digests,
    Place,
    dump_digests,
    largest_digests,
    load_digests,
    place_of,
)
from azstoragetorch.checkpoint._format.envelope import PROBE, ItemFile, Payload, envelope, has_payload, probe
from azstoragetorch.checkpoint._format.items import Item, read_item, storage_info, take_digest
from azstoragetorch.checkpoint._format.metadata import (
    VERSION,
    ParsedMetadata,
    digests_of,
    dump_metadata,
    load_metadata,
    many_objects,
)
from azstoragetorch.checkpoint._format.names import (
    METADATA,
    data_name,
    digests_name,
    is_rank_metadata,
    metadata_name,
    metadata_of,
    new_save_id,
    rank_of,
    saved_at,
)

__all__ = [
    "METADATA",
    "PROBE",
    "VERSION",
    "Digests",
    "Item",
    "ItemFile",
    "ParsedMetadata",
    "Payload",
    "Place",
    "data_name",
    "digests_name",
    "digests_of",
    "dump_digests",
    "dump_metadata",
    "envelope",
    "has_payload",
    "is_rank_metadata",
    "largest_digests",
    "load_digests",
    "load_metadata",
    "many_objects",
    "metadata_name",
    "metadata_of",
    "new_save_id",
    "place_of",
    "probe",
    "rank_of",
    "read_item",
    "saved_at",
    "storage_info",
    "take_digest",
]
