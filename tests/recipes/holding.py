"""The distributed training job, whose ranks hold inside the first epoch until they are killed."""

from __future__ import annotations

import json
import os
import time

import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from recipes.datasets import distributed

STEP = 6
LONGEST = 600  # seconds; a job that nobody kills ends


def main() -> None:
    steps = 0

    def hold(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == STEP:
            if dist.get_rank() == 0:
                os.write(1, f"{json.dumps({'holding': STEP})}\n".encode())
            time.sleep(LONGEST)
            raise SystemExit("nobody killed the job")

    register_optimizer_step_post_hook(hold)
    distributed.main()


if __name__ == "__main__":
    main()
