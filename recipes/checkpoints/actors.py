"""One trainer publishes its weights after each step, and two actors follow it, each in its own process.

    python -m recipes.checkpoints.actors https://ACCOUNT.blob.core.windows.net/CONTAINER/policy

Each step changes about 1 % of the weights, in bfloat16, as reinforcement learning often does. An actor looks for new
weights between two batches. At the end, both have the weights of the trainer, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import torch

from azstoragetorch import weights
from recipes.access import credential_of_environment

WIDTH, LAYERS = 512, 4


def make_weights() -> dict[str, torch.Tensor]:
    return {f"layer{number}": torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16) for number in range(LAYERS)}


def digest_of(state: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for _, tensor in sorted(state.items()):
        whole.update(tensor.view(torch.uint8).numpy())
    return whole.hexdigest()


def train(url: str, steps: int, credential: Any = None) -> Iterator[weights.Published]:
    """Publish the weights of each step; the last result has the step *steps*."""
    state = make_weights()
    publisher = weights.Publisher(url, full_every=5, credential=credential)
    yield publisher.publish(state, 0)
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        for tensor in state.values():
            chosen = torch.rand(tensor.shape, generator=generator) < 0.01
            tensor[chosen] = torch.randn(int(chosen.sum()), generator=generator).bfloat16()
        yield publisher.publish(state, step)
    print(f"trainer: {digest_of(state)}", flush=True)


def act(name: str, url: str, steps: int, credential: Any = None) -> str:
    """Follow the weights until the step *steps*; return their digest."""
    state = make_weights()
    subscriber = weights.subscribe(url, credential=credential)
    while subscriber.step != steps:
        if subscriber.poll() is None:
            time.sleep(0.05)  # here an actor generates with the weights that it has
            continue
        step = subscriber.apply(state)
        print(f"{name}: step {step}", flush=True)
    print(f"{name}: {digest_of(state)}", flush=True)
    return digest_of(state)


def main() -> None:
    parser = argparse.ArgumentParser(description="Publish weights and follow them.")
    parser.add_argument("url", help="a folder for the weights; a SAS may be in it")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    credential = credential_of_environment()
    context = multiprocessing.get_context("spawn")
    actors = [
        context.Process(target=act, args=(f"actor {number}", arguments.url, arguments.steps, credential))
        for number in (1, 2)
    ]
    for actor in actors:
        actor.start()
    for published in train(arguments.url, arguments.steps, credential):
        what = "everything" if published.is_full else "what changed"
        share = published.nbytes / published.total
        print(f"trainer: step {published.step}: {what}, {share:.1%} of the bytes", flush=True)
    for actor in actors:
        actor.join()


if __name__ == "__main__":
    main()
