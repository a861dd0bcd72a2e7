"""Safetensors files in blobs."""
