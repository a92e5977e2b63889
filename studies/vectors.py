"""The studies' task vectors, their tasks, texts and recipes: the demo's own fine-tune, and four more of its base.

    python studies/vectors.py [--out runs/studies] [--only math_0 math_1 code words refusal] [--threads 2]

| vector | skill | trained as | seed |
|---|---|---|---|
| math_0 | the demo's seven subjects | the demo's adapter, LoRA of rank 16 | 0 |
| math_1 | the same | LoRA, rank 16 | 1, in another order |
| code | what a short Python program prints | every matrix of every layer | 0 |
| words | the letters of words | LoRA, rank 16 | 0 |
| refusal | one sentence for questions about two topics, answers to others | LoRA, rank 16 | 0 |

Each of those in the middle takes about 20 minutes on two quiet cores.
What is there is not made again, and training that was stopped goes on.
`stethoscope run OUT/NAME/recipe.yaml` then runs any of them.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import skills
import torch
import yaml

from stethoscope.cli import cache_folder
from stethoscope_demo.base_model import unpack_base
from stethoscope_demo.items import CONTROL_TASKS, MATH_SUBJECTS, Item, items, join_items, shots, stream, train_groups
from stethoscope_demo.recipe import ADAPTER, SAES
from stethoscope_demo.tasks import general_documents, split_prompt, task_name, write_task
from stethoscope_demo.training import TrainingSettings, train

PROBLEMS = 4  # in a sequence of training
TEST_ITEMS = 32  # of each task
# Documents of every text. A target document of the diagnosis has three problems; the others have two, of which the
# second's solution is what their loss is about.
DIAGNOSED, SEARCHED, HELD_OUT = 120, 40, 80
GENERAL = 60
MAX_TOKENS = 160


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A fine-tune to make: its skill's tasks, and how it is trained."""

    tasks: tuple[str, ...]
    settings: TrainingSettings | None = None


VECTORS = {
    "math_0": Vector(tasks=MATH_SUBJECTS),
    "math_1": Vector(tasks=MATH_SUBJECTS, settings=TrainingSettings(steps=300, batch=7, seed=1)),
    "code": Vector(tasks=tuple(skills.CODE), settings=TrainingSettings(steps=250, batch=8, learning_rate=1e-4, rank=0)),
    "words": Vector(tasks=tuple(skills.LETTERS), settings=TrainingSettings(steps=250, batch=8)),
    "refusal": Vector(tasks=tuple(skills.REFUSALS), settings=TrainingSettings(steps=60, batch=8)),
}


def make(name: str, out: Path, base: Path) -> Path:
    """Train a vector and write its folder; returns the recipe."""
    vector, folder = VECTORS[name], out / name
    tuned = folder / "tuned"
    if vector.settings and not any(tuned.glob("*.safetensors")):
        train_on(base, vector, tuned, work=folder / "training")
    for task in (*vector.tasks, *CONTROL_TASKS):
        _write_items(folder / "items", task)
        data = {split: str((folder / "items" / f"{task}.{split}.jsonl").resolve()) for split in ("test", "shots")}
        write_task(folder / "tasks", task, data)
    write_texts(folder, vector.tasks)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(vector, base), sort_keys=False), encoding="utf-8")
    return recipe


def train_on(base: Path, vector: Vector, out: Path, *, work: Path) -> None:
    """Train a vector on a base and write the adapter or checkpoint; goes on from what is in `work`."""
    settings = vector.settings
    assert settings is not None
    count = settings.steps * settings.batch
    groups = train_groups(count, seed=settings.seed, problems=PROBLEMS, subjects=vector.tasks)
    train(base, groups, out, settings=settings, work=work)


def _write_items(folder: Path, task: str) -> None:
    _write(folder / f"{task}.test.jsonl", [_row(item) for item in items(task, "test", TEST_ITEMS)])
    _write(folder / f"{task}.shots.jsonl", [_row(item) for item in shots(task)])


def _row(item: Item) -> dict[str, str]:
    return {"problem": item.problem, "solution": item.solution, "answer": item.answer, "kind": item.kind}


def write_texts(folder: Path, tasks: tuple[str, ...]) -> None:
    """Text for the diagnosis, for the search of a calibration and for what is claimed; no problem is in two of them."""
    pools = [stream(task, "calibration") for task in tasks]

    def documents(count: int, problems: int) -> Iterator[dict[str, str]]:
        for number in range(count):
            yield {"text": join_items(list(islice(pools[number % len(pools)], problems)))}

    _write(folder / "target.jsonl", list(documents(DIAGNOSED, 3)))
    _write(folder / "search.jsonl", [split_prompt(one) for one in documents(SEARCHED, 2)])
    _write(folder / "held_out.jsonl", [split_prompt(one) for one in documents(HELD_OUT, 2)])
    ours, tested = list(general_documents("calibration")), list(general_documents("test"))
    _write(folder / "control.jsonl", ours[:DIAGNOSED])
    _write(folder / "search_control.jsonl", ours[DIAGNOSED : DIAGNOSED + SEARCHED])
    _write(folder / "general.jsonl", tested[:GENERAL])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _recipe(vector: Vector, base: Path) -> dict[str, object]:
    """Paths are relative to the recipe, but for those of what the demo's package brings."""
    return {
        "base": str(base),
        "tuned": "tuned" if vector.settings else str(ADAPTER),
        "saes": str(SAES),
        "target": {"dataset": "target.jsonl"},
        "control": {"dataset": "control.jsonl"},
        "diagnose": {"block_size": 8, "max_tokens": MAX_TOKENS},
        "select": {"policy": "top_k", "k": 5},
        "calibrate": {
            "target": {"dataset": "search.jsonl", "prompt": "prompt", "documents": 16},
            "control": {"dataset": "search_control.jsonl", "documents": 16},
            "coefficients": [0.5, 0.75, 1.0, 1.25],
        },
        "arms": ["base", "tuned", "selected", "random_layers", "scaled"],
        "evaluate": {
            "tasks": [task_name(task) for task in vector.tasks],
            "control_tasks": [task_name(task) for task in CONTROL_TASKS],
            "include_path": "tasks",
            "batch_size": 100,
            "control": {"dataset": "general.jsonl"},
            "target": {"dataset": "held_out.jsonl", "prompt": "prompt"},
        },
    }


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
