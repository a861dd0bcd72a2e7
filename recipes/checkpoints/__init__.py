"""Checkpoints of training jobs in blobs: a manager for any loop, training with ``fully_shard``, Lightning."""
