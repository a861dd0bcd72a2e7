"""Train with the Trainer of transformers, copy each checkpoint to blobs, resume from the last one.

    python -m recipes.frameworks.transformers https://ACCOUNT.blob.core.windows.net/CONTAINER/run

Kill it at any time and run it again, on this machine or another one: it resumes from the last complete checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from azstoragetorch.transformers import BlobCheckpointCallback
from recipes.access import credential_of_environment


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with transformers, and resume.")
    parser.add_argument("url", help="a folder for the checkpoints; a SAS may be in it")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    shape = GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    examples = [{"input_ids": [n % 16, 1, 2, 3], "labels": [n % 16, 1, 2, 3]} for n in range(64)]
    saver = BlobCheckpointCallback(options.url, keep=2, credential=credential_of_environment())
    with tempfile.TemporaryDirectory() as folder:  # nothing has to stay on this machine
        args = TrainingArguments(
            output_dir=folder, max_steps=options.steps, save_steps=2, save_total_limit=1, report_to=[], use_cpu=True
        )
        trainer = Trainer(GPT2LMHeadModel(shape), args, train_dataset=examples, callbacks=[saver])
        last = saver.download_latest(args)
        print(f"resumes from {last}" if last else "starts at the beginning")
        result = trainer.train(resume_from_checkpoint=last)
    print(f"step {result.global_step}; in blobs: {', '.join(saver.checkpoints())}")


if __name__ == "__main__":
    main()
