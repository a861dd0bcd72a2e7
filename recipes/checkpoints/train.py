"""Train with ``fully_shard``, save asynchronously, resume on any number of ranks.

    torchrun --nproc-per-node 2 -m recipes.checkpoints.train https://ACCOUNT.blob.core.windows.net/CONTAINER/run

Kill it at any time and start it again, with the same or a different number of ranks: it resumes after its last complete
checkpoint and reaches the same loss, because the data of a step depends only on the step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from recipes.access import credential_of_environment
from recipes.checkpoints.manager import CheckpointManager

FEATURES, BATCH = 32, 48  # of all ranks together: a job that resumes with more ranks has smaller parts


class TrainState:
    """Model and optimizer as one thing to save: torch gathers their sharded state and puts it back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def make_model() -> nn.Module:
    """The same on every rank, cut into shards."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, FEATURES)) for _ in range(3)]
    model = nn.Sequential(*layers).double()  # rounding that depends on the number of ranks stays out of sight
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch_of(step: int) -> torch.Tensor:
    """This rank's part of the batch of *step*."""
    whole = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def train(
    url: str, *, steps: int, every: int, credential: Any = None, report: Callable[[int, float], object] | None = None
) -> float:
    """Train up to *steps* and return the loss of the last one; *report* hears of each."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoints = CheckpointManager(
        url, {"train": TrainState(model, optimizer)}, every=every, keep=2, credential=credential
    )
    step, loss = checkpoints.load(), torch.tensor(float("nan"))
    while step < steps:
        step += 1
        batch = batch_of(step).to(next(model.parameters()).device)
        loss = nn.functional.mse_loss(model(batch), batch.flip(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        loss = mean
        checkpoints.save(step, last=step == steps)
        if report is not None:
            report(step, loss.item())
    checkpoints.close()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, save, resume.")
    parser.add_argument("url", help="a folder for the checkpoints; a SAS may be in it")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())

    def report(step: int, loss: float) -> None:
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.6f}", flush=True)

    credential = credential_of_environment()
    train(options.url, steps=options.steps, every=options.every, credential=credential, report=report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
