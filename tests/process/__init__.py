"""Behavior across processes: forked and spawned children, pickles, signals, interpreter exit."""
