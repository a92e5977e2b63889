"""The studies' task vectors: three more fine-tunes of the demo's base model, their tasks, texts and recipes.

    python studies/vectors.py [--out runs/studies] [--only math_1 code words] [--threads 2]

| vector | skill | trained as | seed |
|---|---|---|---|
| math_1 | the demo's seven subjects | LoRA, rank 16 | 1, in another order |
| code | what a short Python program prints | every matrix of every layer | 0 |
| words | the letters of words | LoRA, rank 16 | 0 |

Each takes about 20 minutes on two quiet cores. What is there is not made again, and training that was stopped goes on.
`stethoscope run OUT/NAME/recipe.yaml` then runs any of them.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import skills
import torch
import yaml

from stethoscope.cli import cache_folder
from stethoscope_demo.base_model import unpack_base
from stethoscope_demo.items import CONTROL_TASKS, MATH_SUBJECTS, Item, items, join_items, shots, train_groups
from stethoscope_demo.recipe import SAES
from stethoscope_demo.tasks import split_prompt, task_name, write_task, write_text_corpora
from stethoscope_demo.training import TrainingSettings, train

PROBLEMS = 4  # in a sequence of training
TEST_ITEMS = 250
CALIBRATION_ITEMS = 150
DIAGNOSED = 180  # documents; what is left of the calibration items is held out for the loss on target text


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A fine-tune to make: its skill's tasks, and how it is trained."""

    tasks: tuple[str, ...]
    settings: TrainingSettings


VECTORS = {
    "math_1": Vector(tasks=MATH_SUBJECTS, settings=TrainingSettings(steps=300, batch=7, seed=1)),
    "code": Vector(tasks=tuple(skills.CODE), settings=TrainingSettings(steps=250, batch=8, learning_rate=1e-4, rank=0)),
    "words": Vector(tasks=tuple(skills.LETTERS), settings=TrainingSettings(steps=250, batch=8)),
}


def make(name: str, out: Path, base: Path) -> Path:
    """Train a vector and write its folder; returns the recipe."""
    vector, folder = VECTORS[name], out / name
    tuned = folder / "tuned"
    if not any(tuned.glob("*.safetensors")):
        settings = vector.settings
        groups = train_groups(
            settings.steps * settings.batch, seed=settings.seed, problems=PROBLEMS, subjects=vector.tasks
        )
        train(base, groups, tuned, settings=settings, work=folder / "training")
    for task in (*vector.tasks, *CONTROL_TASKS):
        _write_items(folder / "items", task)
        data = {split: str((folder / "items" / f"{task}.{split}.jsonl").resolve()) for split in ("test", "shots")}
        write_task(folder / "tasks", task, data)
    write_text_corpora(folder)  # the general text; target text of this skill replaces the demo's
    documents = list(_documents(vector.tasks))
    _write(folder / "target.jsonl", [{"text": text} for text in documents[:DIAGNOSED]])
    _write(folder / "held_out.jsonl", [split_prompt({"text": text}) for text in documents[DIAGNOSED:]])
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(vector, base), sort_keys=False), encoding="utf-8")
    return recipe


def _write_items(folder: Path, task: str) -> None:
    _write(folder / f"{task}.test.jsonl", [_row(item) for item in items(task, "test", TEST_ITEMS)])
    _write(folder / f"{task}.shots.jsonl", [_row(item) for item in shots(task)])


def _row(item: Item) -> dict[str, str]:
    return {"problem": item.problem, "solution": item.solution, "answer": item.answer, "kind": item.kind}


def _documents(tasks: tuple[str, ...], *, problems: int = 3) -> Iterator[str]:
    """Documents of several calibration problems of one task, tasks in turn."""
    pools = [items(task, "calibration", CALIBRATION_ITEMS) for task in tasks]
    for start in range(0, CALIBRATION_ITEMS - problems + 1, problems):
        for pool in pools:
            yield join_items(pool[start : start + problems])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _recipe(vector: Vector, base: Path) -> dict[str, object]:
    """Paths are relative to the recipe, but for those of the base and the SAEs."""
    return {
        "base": str(base),
        "tuned": "tuned",
        "saes": str(SAES),
        "target": {"dataset": "target.jsonl"},
        "control": {"dataset": "control.jsonl", "documents": DIAGNOSED},
        "diagnose": {"block_size": 8},
        "select": {"policy": "top_k", "k": 5},
        "arms": [
            "base", "tuned", "selected", "random_layers",
            "projected", "projected_energy_matched", "random_subspace_energy_matched", "complement", "hybrid",
            "filtered",
        ],
        "evaluate": {
            "tasks": [task_name(task) for task in vector.tasks],
            "control_tasks": [task_name(task) for task in CONTROL_TASKS],
            "include_path": "tasks",
            "batch_size": 100,
            "control": {"dataset": "general.jsonl"},
            "target": {"dataset": "held_out.jsonl", "prompt": "prompt"},
        },
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=VECTORS, default=list(VECTORS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    skills.register()
    base = unpack_base(cache_folder())
    for name in options.only:
        print(make(name, options.out, base), flush=True)
