"""The distributed training job, which ends without taking the interpreter down.

A thread of torch's gloo keeps the last `all_gather_object` for a moment after it is complete. If the interpreter is
taken down just then, on a busy machine, that thread frees the tensors of the call too late, and torch aborts the
process although all is done.
"""

from __future__ import annotations

import os
import sys

from recipes.datasets import distributed

if __name__ == "__main__":
    distributed.main()
    sys.stdout.flush()
    os._exit(0)
