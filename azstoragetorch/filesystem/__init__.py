"""Azure Blob Storage as a file system for fsspec: pandas, pyarrow, datasets, zarr, and torch take its URLs.

::

    import fsspec
    import pandas as pd

    pd.read_parquet("azt://container/table.parquet", storage_options={"account_name": "account"})

    import azstoragetorch.filesystem

    azstoragetorch.filesystem.install()  # az://, abfs://, and abfss:// lead here as well
    with fsspec.open("abfss://container@account.dfs.core.windows.net/model.pt") as file:
        model = torch.load(file)

Files are :class:`~azstoragetorch.io.BlobIO`, and transfers of many files and ranges are concurrent. Errors are
:class:`OSError` and its subclasses, chained from the error of the service.
"""

from __future__ import annotations

try:
    import fsspec as _fsspec  # noqa: F401
except ImportError as error:
    raise ImportError(f"azstoragetorch.filesystem needs fsspec ({error}): pip install 'fsspec>=2024.9'") from error

from azstoragetorch.filesystem._file import AzureBlobFile
from azstoragetorch.filesystem._system import AzureBlobFileSystem, install

__all__ = ["AzureBlobFile", "AzureBlobFileSystem", "install"]
