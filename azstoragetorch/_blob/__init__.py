"""The core blob client: one room for each job, no torch in here.

``client`` is the front door. Below it ``download``, ``readahead``, ``upload``, ``commit`` and ``listing`` plan and run
transfers on the ``engine`` (threads and bytes in flight of this process); ``retry`` decides what is tried again. At the
edge ``service`` signs requests and translates errors, ``transport`` and ``connection`` speak HTTP, ``credentials``
proves who asks, and ``url`` parses addresses.
"""
