"""List, read, and write blobs with Ray Data, and keep checkpoints of Ray Train; needs Ray (the extra ``ray``).

::

    from azstoragetorch.ray import read_blobs, write_shards

    container = "https://<account>.blob.core.windows.net/<container>"
    samples = read_blobs(f"{container}/photos/", transform=to_sample)
    write_shards(samples, f"{container}/shards/")
"""

from __future__ import annotations

try:
    import ray.data  # noqa: F401 - the modules below need it
except ImportError as error:
    raise ImportError(f"azstoragetorch.ray needs Ray Data ({error}): pip install 'ray[data]'") from error

from azstoragetorch.ray._listing import list_blobs
from azstoragetorch.ray._reading import read_blobs
from azstoragetorch.ray._training import checkpoint_storage
from azstoragetorch.ray._writing import write_shards

__all__ = ["checkpoint_storage", "list_blobs", "read_blobs", "write_shards"]
