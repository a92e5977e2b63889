"""Keep a fine-tune's skill, protect the rest of the model, and prove gain and cost.

The public names below are imported when first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
    from stethoscope.diagnosis.collect import collect_activations
    from stethoscope.diagnosis.diagnose import diagnose
    from stethoscope.editing.apply import applied
    from stethoscope.editing.geometry import measure_geometry
    from stethoscope.editing.plan import EditPlan
    from stethoscope.editing.writer import write_edit
    from stethoscope.errors import StethoscopeError
    from stethoscope.evaluation.comparison import compare
    from stethoscope.evaluation.outcomes import Outcomes
    from stethoscope.evaluation.run import evaluate
    from stethoscope.recipe import Recipe
    from stethoscope.report import render_report
    from stethoscope.results.comparison import Comparison
    from stethoscope.results.diagnosis import Diagnosis
    from stethoscope.results.geometry import Geometry
    from stethoscope.results.selection import Selection
    from stethoscope.run import run_recipe
    from stethoscope.saes.open import load_sae, open_saes
    from stethoscope.selection.policies import select

_MODULES = {
    "checkpoints.open": ["open_checkpoint", "open_task_vector"],
    "diagnosis.diagnose": ["diagnose"],
    "diagnosis.collect": ["collect_activations"],
    "editing.apply": ["applied"],
    "editing.geometry": ["measure_geometry"],
    "editing.plan": ["EditPlan"],
    "editing.writer": ["write_edit"],
    "errors": ["StethoscopeError"],
    "evaluation.comparison": ["compare"],
    "evaluation.outcomes": ["Outcomes"],
    "evaluation.run": ["evaluate"],
    "recipe": ["Recipe"],
    "report": ["render_report"],
    "results.comparison": ["Comparison"],
    "results.diagnosis": ["Diagnosis"],
    "results.geometry": ["Geometry"],
    "results.selection": ["Selection"],
    "run": ["run_recipe"],
    "saes.open": ["load_sae", "open_saes"],
    "selection.policies": ["select"],
}
_HOME = {name: f"stethoscope.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order in which a run uses them
    "Recipe", "run_recipe", "open_checkpoint", "open_task_vector", "open_saes", "load_sae", "collect_activations",
    "diagnose", "Diagnosis", "select", "Selection", "measure_geometry", "Geometry", "EditPlan", "applied", "write_edit",
    "evaluate", "Outcomes", "compare", "Comparison", "render_report", "StethoscopeError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `stethoscope` has no attribute `{name}`")
    return getattr(import_module(_HOME[name]), name)
