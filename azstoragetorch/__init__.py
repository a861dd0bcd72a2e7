"""PyTorch on Azure Blob Storage.

.. code-block:: text

   faces      cli
              lightning  litdata  ray  torch_checkpointing  transformers  webdataset
              safetensors
              checkpoint  datapipes  datasets  filesystem  manifest  nodes  weights
              io
   _samples   inventory  manifest  manifest_writer
              cache  catalog  fetching  listing  packing  parquet  resume  sources  splitting  workers
              expected  tar
              items  names  once  prefetch  records  rows  sharding  steps  tar_header  unpack
   _tensors   pinned  staging
              broadcast  host  progress
              hashing  outline  planning
   _files     folders
              partial  record  server_copy  transfer
              description  paths  walk
   _blob      client
              commit  multiplex  readahead  upload
              copying  download  first_part  listing  signing  window
              service
              authorizers  connection  credentials  head  race  retry  takeover  transport
              admission  errors  secret  url
   _engine    threads
              budget  turns
              job
              hedging  metrics  scope
              config  growth  memory  pacing  process  ranges

Each row is a layer. A module imports only from the rows below it and, inside its package, from its own row. Importing
the package itself loads neither torch nor the Azure SDK; each module loads what it needs.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

__version__ = "0.3.0.dev0"

from azstoragetorch._engine.config import FILE_SYSTEM, TransferConfig
from azstoragetorch._engine.metrics import Metrics, metrics

__all__ = ["Metrics", "TransferConfig", "__version__", "join_url", "metrics", "share_credentials"]


def join_url(url: str, *names: str) -> str:
    """The URL of something in the container or folder at *url*: ``join_url(url, "runs", "step-1", "model.pt")``.

    Names are percent-encoded and put into the path; the query of *url*, with the SAS in it, stays at the end.
    ``f"{url}/step-1"`` would append them to the SAS.

    Args:
        url: The URL of a container or folder, with or without a SAS, with or without a trailing slash.
        names: Folders, and a blob or folder in the last one, as plain strings. Each can contain slashes and end in one.

    Raises:
        ValueError: a name is empty, begins with a slash, or is not a valid blob name (``..``).
        TypeError: an argument is not a str.
    """
    from azstoragetorch._blob.url import join_url

    return join_url(url, *names)


def share_credentials() -> AbstractContextManager[None]:
    """A context for objects whose SAS or account key is sent to other machines, inside their pickles.

    A pickle can end up in a file, so pickles of this package's objects contain no secrets, except those for child
    processes of ``multiprocessing``. A Ray task, or any other job that is pickled and sent to another machine, then
    fails with an error that names this function. Create the object in this context to send it with its credential::

        with azstoragetorch.share_credentials():
            blobs = azstoragetorch.ray.read_blobs(url, credential=AzureSasCredential(sas))

    What counts is where the object is created, not where it is pickled. It applies to everything of this package that
    is created in the context by the same thread, permanently: also to copies that are made later, and on the other
    machine. Objects that were created outside are not affected.

    **Risk.** The secret is in the pickle as plain text; nothing encrypts it. Anyone who can read the pickle can use it:
    in Ray, everyone with access to the cluster's object store, to the disk that it spills to, and to its network
    unless Ray uses TLS. Share a SAS that allows only what the job needs and expires soon after it, never an account
    key. Better, share nothing: give the machines an identity, and pass ``credential=None``.
    """
    from azstoragetorch._blob.secret import sharing

    return sharing()


if os.environ.get(FILE_SYSTEM, "").lower() in ("1", "true", "yes"):
    from azstoragetorch.filesystem import install

    install()
