"""Copy between local files and blobs, atomically and resumably.

This package is between the blob client and the public packages. The command line uses it.
"""
