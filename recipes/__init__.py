"""Programs to copy from. Each one is run by a test."""
