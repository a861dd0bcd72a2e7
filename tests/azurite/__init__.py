"""The service the tests talk to, and the other door through which they check."""
