"""Every recipe runs, and does what it says."""
