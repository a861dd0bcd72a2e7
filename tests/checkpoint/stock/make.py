"""Make metadata as another release of torch lays it out: ``python make.py VERSION METADATA_PY FILESYSTEM_PY``.

The two files are ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` of that release. Their classes take
the place of the installed ones, so what is pickled has the names, fields and states of that release. Needed once for
each release; the results are kept here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # what the files import

_DCP = "torch.distributed.checkpoint"


def module_from(name: str, path: str) -> Any:
    """The module *name*, from the file *path*."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def storage_info_from(path: str) -> Any:
    """The class _StorageInfo of the file *path*, whose other contents need the rest of its release."""
    text = Path(path).read_text()
    begin = text.rindex("@dataclass", 0, text.index("class _StorageInfo"))
    code = text[begin : text.index("@dataclass", begin + 1)]
    filesystem = sys.modules[f"{_DCP}.filesystem"]
    exec(f"from __future__ import annotations\n{code}", vars(filesystem))
    return filesystem._StorageInfo


def main() -> None:
    version, metadata_path, filesystem_path = sys.argv[1:]
    dcp: Any = module_from(f"{_DCP}.metadata", metadata_path)
    info: Any = storage_info_from(filesystem_path)
    whole = torch.ones(4, 6, dtype=torch.bfloat16)
    tensors = {
        "sharded": dcp.TensorStorageMetadata(
            dcp.TensorProperties.create_from_tensor(torch.ones(4, 6)),
            torch.Size([4, 6]),
            [dcp.ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 6])) for at in (0, 2)],
        ),
        "nested.whole": dcp.TensorStorageMetadata(
            dcp.TensorProperties.create_from_tensor(whole.t()),
            torch.Size([6, 4]),
            [dcp.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([6, 4]))],
        ),
        "scalar": dcp.TensorStorageMetadata(
            dcp.TensorProperties(torch.int64, memory_format=torch.preserve_format),
            torch.Size([]),
            [dcp.ChunkStorageMetadata(torch.Size([]), torch.Size([]))],
        ),
    }
    storage = {
        dcp.MetadataIndex("sharded", [0, 0], 0): info("__0_0.distcp", 0, 1300),
        dcp.MetadataIndex("sharded", [2, 0], 1): info("__1_0.distcp", 0, 1300),
        dcp.MetadataIndex("nested.whole", [0, 0], 0): info("__0_0.distcp", 1300, 1260),
        dcp.MetadataIndex("scalar", []): info("__0_1.distcp", 0, 1200),
        dcp.MetadataIndex("nested.bytes"): info("__0_1.distcp", 1200, 60),
    }
    if any(field.name == "transform_descriptors" for field in dataclasses.fields(info)):
        storage[dcp.MetadataIndex("scalar", [])] = info("__0_1.distcp", 0, 1200, ["stream.zstd/1"])
    planned = {"sharded": ("sharded",), "nested.whole": ("nested", "whole"), "scalar": ("scalar",)}
    made = dcp.Metadata(
        tensors | {"nested.bytes": dcp.BytesStorageMetadata()}, planned | {"nested.bytes": ("nested", 0)}
    )
    made.storage_data = storage
    made.storage_meta = dcp.StorageMeta(checkpoint_id="/run/1", save_id="save", load_id=None)
    if any(field.name == "version" for field in dataclasses.fields(made)):
        made.version = "1.0.0"
    # FileSystemWriter puts the path object there; FsspecWriter, a string.
    Path(__file__).with_name(f"fsspec-{version}").write_bytes(pickle.dumps(made))
    made.storage_meta = dataclasses.replace(made.storage_meta, checkpoint_id=Path("/run/1"))
    Path(__file__).with_name(f"files-{version}").write_bytes(pickle.dumps(made))


if __name__ == "__main__":
    main()
