"""What holds across processes: forked and spawned children, pickles, signals, the end of the interpreter."""
