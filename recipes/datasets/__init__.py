"""Datasets to copy: each module is a small, complete job.

``train`` reads a container and resumes mid-epoch, ``distributed`` does so on any number of ranks under torchrun,
``images`` decodes photographs with Pillow and keeps them on a local disk.
"""
