"""Fuzzing of parsers of external bytes: they return a right result or raise the named error."""
