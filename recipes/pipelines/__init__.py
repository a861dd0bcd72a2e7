"""Input pipelines to copy: each module is one, small enough to read at a glance.

``webdataset`` trains from tar shards, ``jsonlines`` reads big files by range, ``images`` picks small images and
batches them, ``image_nodes`` does the same with ``torchdata.nodes``.
"""
