"""Real ranks: processes that form a gloo group and run a function together.

They are forked from a server that has imported torch, so that a rank costs milliseconds instead of seconds.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "torch.distributed.tensor", "torch.distributed.checkpoint", "azstoragetorch.checkpoint", __name__]
)


class Ranks:
    """*world* ranks that run *function(rank, \\*arguments)*. Results come in the order of ranks."""

    def __init__(
        self, world: int, function: Callable[..., Any], *arguments: Any, env: list[dict[str, str]] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        meeting = f"file://{Path(self._folder.name, 'store')}"
        self.processes = []
        self._ends: list[Connection] = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            variables = {"RANK": str(rank), "WORLD_SIZE": str(world), **(env[rank] if env else {})}
            process = context.Process(target=_run, args=(theirs, meeting, rank, world, variables, function, arguments))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._ends.append(ours)

    def results(self, timeout: float = 100.0) -> list[Any]:
        """What each rank returned, or the exception that it raised, or None for one that was killed."""
        found: list[Any] = [None] * len(self._ends)
        waiting = dict(zip(self._ends, range(len(self._ends)), strict=True))
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        while waiting:
            left = (deadline - datetime.datetime.now()).total_seconds()
            ready = wait(list(waiting), timeout=max(left, 0))
            if not ready:
                self.kill()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not end within {timeout} s")
            for end in ready:
                rank = waiting.pop(end)  # type: ignore[arg-type]
                try:
                    found[rank] = pickle.loads(end.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    found[rank] = None
        for process in self.processes:
            process.join(240)
        self._folder.cleanup()
        return found

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 100.0,
    env: list[dict[str, str]] | None = None,
) -> list[Any]:
    """Run *function(rank, \\*arguments)* on *world* ranks; raise the error of the first rank that failed."""
    results = Ranks(world, function, *arguments, env=env).results(timeout)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _run(
    end: Connection,
    meeting: str,
    rank: int,
    world: int,
    variables: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=90)
    )
    try:
        result: Any = function(rank, *arguments)
    except BaseException as error:  # noqa: BLE001 - passed on to the test
        result = error
        traceback.print_exc()
    end.send_bytes(pickle.dumps(result))
    end.close()
    if not isinstance(result, BaseException):
        dist.destroy_process_group()
