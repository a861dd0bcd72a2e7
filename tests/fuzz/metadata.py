"""What must hold for checkpoint metadata, whatever bytes it consists of."""

from __future__ import annotations

import io
import pathlib
import pickle
import resource
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as metadata_classes
from torch.distributed.checkpoint.filesystem import _StorageInfo

from azstoragetorch.checkpoint._format import dump_metadata, load_metadata, read_item
from azstoragetorch.checkpoint._format.records import _NAMES
from azstoragetorch.exceptions import CheckpointError
from tests.checkpoint.watched import changes_since, snapshot

from .pickles import example

SLOWEST = 1.0  # seconds of processor time for one input
_TIMES, _ANYWAY = 20, 64 << 20  # memory of one input: so many times its length, and so many bytes anyway
_RELEASES = Path(__file__).parent.parent / "checkpoint" / "stock"  # what releases of torch write
_PAGE = resource.getpagesize()
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.layout, torch.memory_format)
_MADE = (
    metadata_classes.Metadata,
    metadata_classes.TensorStorageMetadata,
    metadata_classes.BytesStorageMetadata,
    metadata_classes.ChunkStorageMetadata,
    metadata_classes.TensorProperties,
    metadata_classes.MetadataIndex,
    metadata_classes.StorageMeta,
    _StorageInfo,
)


def check_metadata(raw: bytes) -> None:
    """Metadata of plain parts that stays inside the checkpoint, or CheckpointError; nothing that it names is called.

    It takes little time and memory, nothing outside changes, what is returned is what `pickle` reads, and it can be
    shown, compared, hashed and saved again.
    """
    before = snapshot()
    peak, now = _peak(), _resident()
    begin = time.process_time()
    metadata, error = None, ""
    with patch("os.system") as system, patch("builtins.eval") as evaluate:
        try:
            metadata = load_metadata(raw)
        except CheckpointError as refused:
            error = str(refused)
    took = time.process_time() - begin
    assert took < SLOWEST, f"{took:.2f} s"
    assert _peak() == peak or _peak() - now <= _TIMES * len(raw) + _ANYWAY, f"{_peak() - now:,} bytes of memory"
    assert changes_since(before) == []
    assert not system.called
    assert not evaluate.called
    assert len(error) < 2000
    if metadata is not None:
        _check_made(metadata)
        _check_alike(metadata, raw)
        assert described(load_metadata(dump_metadata(metadata))) == described(metadata)


def _check_made(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        item = read_item(info)
        assert not item.path.startswith("/")
        assert ".." not in item.path.split("/")
        assert item.offset >= 0
        assert item.length >= 0
    assert repr(metadata)
    seen: set[int] = set()
    waiting: list[Any] = [metadata]
    while waiting:
        value = waiting.pop()
        if type(value) in _PLAIN or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is dict:
            waiting += [*value.keys(), *value.values()]
        elif type(value) in (list, tuple, torch.Size):
            waiting += value
        elif isinstance(value, pathlib.PurePath):
            assert str(value)
        else:
            assert type(value) in _MADE, type(value)
            waiting += vars(value).values()


def _check_alike(metadata: Any, raw: bytes) -> None:
    """Raise unless *metadata* is what Python reads in *raw*, where it reads that at all."""
    try:
        stock = _Stock(io.BytesIO(raw)).load()
    except AssertionError:
        raise
    except Exception:  # noqa: BLE001 - of frames, or of objects that cannot be made
        return
    assert described(metadata) == described(stock)


class _Stock(pickle.Unpickler):
    """Python's own reading of what was admitted."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in _NAMES, (module, name)
        return super().find_class(module, name)


def described(metadata: Any) -> str:
    """All that *metadata* says; paths as pure ones, since others are made for this system alone."""
    storage = [(key.fqn, key.offset, key.index, sorted(_set(info))) for key, info in metadata.storage_data.items()]
    where = metadata.storage_meta
    meta = where and (
        where.save_id,
        where.load_id,
        str(where.checkpoint_id),
        [*(getattr(where, "modules", None) or ())],
    )
    return repr((metadata.state_dict_metadata, metadata.planner_data, storage, meta, metadata.version))


def _set(info: Any) -> list[tuple[str, Any]]:
    """The fields of *info* that are not None."""
    state = {name: value for name, value in vars(info).items() if value is not None}
    if "transform_descriptors" in state:
        state["transform_descriptors"] = list(state["transform_descriptors"])
    return list(state.items())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def metadata_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        state = {"a": torch.ones(3, 4), "b": {"c": torch.zeros(2), "d": 7}, "e": "text"}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        stock = (Path(folder) / ".metadata").read_bytes()
    metadata = pickle.loads(stock)
    ours = dump_metadata(metadata)
    others = [path.read_bytes() for path in sorted(_RELEASES.glob("f*"))]
    return [
        stock,
        ours,
        *(pickle.dumps(metadata, protocol) for protocol in (0, 2, 5)),
        dump_metadata(example()),
        *others,
    ]
