"""Programs that need another framework."""
