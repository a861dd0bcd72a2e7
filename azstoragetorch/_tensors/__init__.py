"""Tensors and the blobs that hold their elements: what checkpoints and models have in common.

``planning`` says which bytes to request, ``pinned`` receives them from one version of a blob, ``staging`` gets them
into tensors wherever these are, ``host`` copies between devices and the host, ``broadcast`` sends tensors to other
ranks, and ``progress`` reports how far a transfer is.
"""
