"""Arms x tasks -> proof: outcomes on lm-evaluation-harness, and what they show.

What needs no model is here, imported when first used; `stethoscope.evaluation.run` evaluates and
`stethoscope.evaluation.text_loss` measures loss.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.evaluation.comparison import aa_floor, compare
    from stethoscope.evaluation.outcomes import Outcomes, PerDocument

_HOME = {"Outcomes": "outcomes", "PerDocument": "outcomes", "aa_floor": "comparison", "compare": "comparison"}

__all__ = ["Outcomes", "PerDocument", "aa_floor", "compare"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `stethoscope.evaluation` has no attribute `{name}`")
    return getattr(import_module(f"stethoscope.evaluation.{_HOME[name]}"), name)
