"""Checkpoints of training jobs in blobs: a manager for any loop, and training with ``fully_shard``."""
