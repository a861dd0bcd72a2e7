"""Benchmarks against the libraries that a user would pick instead; ``python -m recipes.benchmarks --help``."""
