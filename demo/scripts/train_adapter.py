"""Train the demo's tuned sibling: a LoRA adapter for SmolLM2-135M-Instruct on generated mathematics.

    python demo/scripts/train_adapter.py --base CHECKPOINT --out demo/src/stethoscope_demo/adapter

Writes a PEFT adapter in bf16. Stopped, it goes on from its last checkpoint when started again with the same `--work`
folder.
"""

import argparse
import logging
from pathlib import Path

import torch

from stethoscope_demo.items import train_groups
from stethoscope_demo.training import TrainingSettings, train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base model as an ordinary checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--work", type=Path, help="folder for checkpoints of this run; none without it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=7, help="sequences a step; one of each subject by default")
    parser.add_argument("--problems", type=int, default=4, help="problems of one subject in a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    train(
        options.base,
        train_groups(options.steps * options.batch, seed=options.seed, problems=options.problems),
        options.out,
        settings=TrainingSettings(
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            rank=options.rank,
            seed=options.seed,
        ),
        work=options.work,
    )
