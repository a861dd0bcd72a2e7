"""The data-loading kit above the blob client: what datasets, pipes and nodes share, and no torch but in ``workers``.

``sources``, ``listing`` and ``catalog`` say which blobs there are, ``sharding`` and ``resume`` which of them come when,
``prefetch`` and ``fetching`` fetch them in order, ``cache`` keeps them on a local disk, ``items``, ``records`` and
``tar`` say what is read of them.
"""
