"""The data-loading kit above the blob client: what datasets, pipes and nodes share, and no torch but in ``workers``.

``sources`` and ``catalog`` say which blobs there are, ``sharding`` and ``resume`` which of them come when, ``prefetch``
fetches them in order, ``cache`` keeps them on a local disk, ``records`` and ``tar`` take them apart.
"""
