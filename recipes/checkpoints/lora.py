"""Fine-tune small adapters of a frozen model, and save every few steps: only the adapters are uploaded.

    python -m recipes.checkpoints.lora https://ACCOUNT.blob.core.windows.net/CONTAINER/lora

Kill it at any time and start it again: it resumes after its last complete checkpoint. Every checkpoint contains the
whole model, loads with torch's own reader after a download, and can be deleted by itself.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from azstoragetorch import join_url, metrics
from azstoragetorch.checkpoint import BlobStorageReader, BlobStorageWriter, keep_last, latest_checkpoint
from recipes.access import credential_of_environment, split_sas

WIDTH, LAYERS, RANK = 512, 8, 2


class Adapted(nn.Module):
    """A frozen linear layer, and an adapter of low rank that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, WIDTH) / WIDTH)
        self.up = nn.Parameter(torch.zeros(WIDTH, RANK))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.frozen(values) + values @ self.down.t() @ self.up.t())


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Adapted() for _ in range(LAYERS)))


def train(
    url: str,
    *,
    steps: int,
    every: int,
    credential: Any = None,
    base: str | None = "latest",
    report: Callable[[int, float, int], object] | None = None,
) -> nn.Module:
    """Train up to *steps*; *report* gets each step, its loss, and the bytes that its checkpoint has sent."""
    place, credential = split_sas(url, credential)
    model = make_model()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    latest = latest_checkpoint(place, credential=credential)
    step = 0
    if latest is not None:
        step = int(re.findall(r"\d+", latest)[-1])
        state = {"model": model.state_dict(), "optimizer": _initialized(optimizer).state_dict()}
        dcp.load(state, storage_reader=BlobStorageReader(latest, credential=credential, verify=True), no_dist=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while step < steps:
        step += 1
        batch = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(batch), batch.flip(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sent = 0
        if step % every == 0:
            before = metrics().bytes_sent
            writer = BlobStorageWriter(join_url(place, f"step-{step}"), credential=credential, base=base)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            dcp.save(state, storage_writer=writer, no_dist=True)
            sent = metrics().bytes_sent - before
            keep_last(place, 2, credential=credential)
        if report is not None:
            report(step, loss.item(), sent)
    return model


def _initialized(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """*optimizer* with the tensors of its state, which are loaded in place; its first step makes them."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune adapters, save, resume.")
    parser.add_argument("url", help="a folder for the checkpoints; a SAS may be in it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    arguments = parser.parse_args()

    def report(step: int, loss: float, sent: int) -> None:
        saved = f", saved with {sent / 1e6:.2f} MB sent" if sent else ""
        print(f"step {step}: loss {loss:.4f}{saved}", flush=True)

    train(
        arguments.url,
        steps=arguments.steps,
        every=arguments.every,
        credential=credential_of_environment(),
        report=report,
    )


if __name__ == "__main__":
    main()
