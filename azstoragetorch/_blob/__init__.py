"""The core blob client: one room for each job, no torch in here.

``client`` is the front door. Below it ``download``, ``readahead``, ``upload`` and ``listing`` plan and run
transfers on the ``engine`` (threads and bytes in flight of this process); ``retry`` decides what is tried
again. At the edge ``transport`` speaks HTTP, ``credentials`` signs, ``sdk`` is the door to
azure-storage-blob, and ``url`` parses addresses.
"""
