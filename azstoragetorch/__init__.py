"""PyTorch on Azure Blob Storage.

.. code-block:: text

            torch.save/load   DataLoader      DataPipes / nodes    torch.distributed.checkpoint
                  |               |                  |                        |
   public     io.BlobIO       datasets         datapipes, nodes         checkpoint
                  `---------------'---------.--------'------------------------'
   core                              _blob.client    one blob or container: size, read, write, list, delete
                        .------------.------'-----.-----------.
                    download      upload       listing     readahead
                        `------------'-----.------'-----------'
   edge      service, over transport: HTTP    credentials     sdk: azure-storage-blob    url
                                           |
   ground              engine: threads, byte budget, per process     retry

Imports point down this picture, and the command line (``cli``) looks down on all of it. Importing the package itself
loads neither torch nor the Azure SDK; each module loads what it needs.
"""

from __future__ import annotations

__version__ = "0.3.0.dev0"

from azstoragetorch._engine.config import TransferConfig
from azstoragetorch._engine.metrics import Metrics, metrics

__all__ = ["Metrics", "TransferConfig", "__version__", "metrics"]
