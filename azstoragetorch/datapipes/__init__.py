"""DataPipes over blobs: list, open, load, read, save, shard, split, unpack, resume.

They subclass torch's ``IterDataPipe``, and work with torch's pipes and DataLoader. Importing this module registers
their functional names:

.. code-block:: python

    from torch.utils.data import DataLoader
    from azstoragetorch.datapipes import AzureBlobFileLister

    container = "https://<account>.blob.core.windows.net/<container>"
    pipe = AzureBlobFileLister(f"{container}/train/", "*.jpg")
    pipe = pipe.shuffle().sharding_filter()
    pipe = pipe.read_files_by_azure().map(decode)
    loader = DataLoader(pipe, batch_size=32, num_workers=4)

=============================  =========================  =======================================================
pipe                           functional name            yields
=============================  =========================  =======================================================
`AzureBlobFileLister`          `list_files_by_azure`      URLs of blobs
`AzureBlobInfoLister`          `list_blobs_by_azure`      `BlobInfo` (url, size, etag)
`AzureBlobManifestLister`      `list_manifest_by_azure`   `ManifestBlob`, a `BlobInfo` that must not change
`AzureBlobFileOpener`          `open_files_by_azure`      (url, seekable stream)
`AzureBlobFileLoader`          `load_files_by_azure`      (url, stream of bytes in memory)
`AzureBlobFileReader`          `read_files_by_azure`      (url, bytes)
`AzureBlobSaver`               `save_by_azure`            URLs of blobs written
`BlobSharder`                  `shard_blobs`              the share of a worker and rank
`BlobRangeSplitter`            `split_blob_ranges`        `BlobRange`, for the readers above
`BlobTarExpander`              `expand_blob_tar`          (url/member, stream)
`BlobSampleGrouper`            `group_blob_samples`       samples as in WebDataset
`BlobTarShardWriter`           `write_blob_tar_shards`    URLs of tars written
`ResumableDataPipe`            `to_resumable`             a dataset that resumes exactly
=============================  =========================  =======================================================

Every pipe that accesses the service takes ``credential=`` and ``transfer=``, and does not inherit those of another
pipe. Sockets and threads exist only while a pipe is iterated, so a pipe can be pickled and forked at any time.
"""

from __future__ import annotations

from azstoragetorch._samples.items import BlobInfo, BlobRange, ManifestBlob
from azstoragetorch.datapipes._listing import (
    AzureBlobFileListerIterDataPipe,
    AzureBlobInfoListerIterDataPipe,
    AzureBlobManifestListerIterDataPipe,
)
from azstoragetorch.datapipes._reading import (
    AzureBlobFileLoaderIterDataPipe,
    AzureBlobFileOpenerIterDataPipe,
    AzureBlobFileReaderIterDataPipe,
    BlobRangeSplitterIterDataPipe,
)
from azstoragetorch.datapipes._resuming import ResumableDataPipe
from azstoragetorch.datapipes._sharding import BlobSharderIterDataPipe
from azstoragetorch.datapipes._tar import BlobSampleGrouperIterDataPipe, BlobTarExpanderIterDataPipe
from azstoragetorch.datapipes._writing import AzureBlobSaverIterDataPipe, BlobTarShardWriterIterDataPipe

AzureBlobFileLister = AzureBlobFileListerIterDataPipe
AzureBlobInfoLister = AzureBlobInfoListerIterDataPipe
AzureBlobFileOpener = AzureBlobFileOpenerIterDataPipe
AzureBlobFileLoader = AzureBlobFileLoaderIterDataPipe
AzureBlobFileReader = AzureBlobFileReaderIterDataPipe
AzureBlobManifestLister = AzureBlobManifestListerIterDataPipe
AzureBlobSaver = AzureBlobSaverIterDataPipe
BlobSharder = BlobSharderIterDataPipe
BlobRangeSplitter = BlobRangeSplitterIterDataPipe
BlobTarExpander = BlobTarExpanderIterDataPipe
BlobSampleGrouper = BlobSampleGrouperIterDataPipe
BlobTarShardWriter = BlobTarShardWriterIterDataPipe

__all__ = [
    "AzureBlobFileLister",
    "AzureBlobFileListerIterDataPipe",
    "AzureBlobFileLoader",
    "AzureBlobFileLoaderIterDataPipe",
    "AzureBlobFileOpener",
    "AzureBlobFileOpenerIterDataPipe",
    "AzureBlobFileReader",
    "AzureBlobFileReaderIterDataPipe",
    "AzureBlobInfoLister",
    "AzureBlobInfoListerIterDataPipe",
    "AzureBlobManifestLister",
    "AzureBlobManifestListerIterDataPipe",
    "AzureBlobSaver",
    "AzureBlobSaverIterDataPipe",
    "BlobInfo",
    "BlobRange",
    "BlobRangeSplitter",
    "BlobRangeSplitterIterDataPipe",
    "BlobSampleGrouper",
    "BlobSampleGrouperIterDataPipe",
    "BlobSharder",
    "BlobSharderIterDataPipe",
    "BlobTarExpander",
    "BlobTarExpanderIterDataPipe",
    "BlobTarShardWriter",
    "BlobTarShardWriterIterDataPipe",
    "ManifestBlob",
    "ResumableDataPipe",
]
