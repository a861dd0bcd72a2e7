"""Models from blobs: into transformers, and into an engine that serves them."""
