"""Tests that need a framework that `.venv` does not have; `make frameworks` runs them with all of them installed."""
