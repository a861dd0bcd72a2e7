"""Data loading on top of the blob client, shared by datasets, pipes, and nodes. Only ``workers`` imports torch.

``sources``, ``listing``, and ``catalog`` determine which blobs exist. ``sharding`` and ``resume`` determine their
order. ``prefetch`` and ``fetching`` fetch them in order, and ``cache`` keeps them on a local disk. ``items``,
``records``, and ``tar`` define the parts of blobs that are read.
"""
