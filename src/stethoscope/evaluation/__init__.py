"""Arms x tasks -> proof: outcomes on lm-evaluation-harness, and what they show.

What needs no model is here, imported when first used; `stethoscope.evaluation.run` evaluates and
`stethoscope.evaluation.control` measures loss.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stethoscope.evaluation.comparison import aa_floor, compare
    from stethoscope.evaluation.outcomes import DocumentDivergences, DocumentLosses, Outcomes
    from stethoscope.results.comparison import Comparison

_HOME = {
    "Comparison": "results.comparison", "DocumentDivergences": "evaluation.outcomes",
    "DocumentLosses": "evaluation.outcomes", "Outcomes": "evaluation.outcomes",
    "aa_floor": "evaluation.comparison", "compare": "evaluation.comparison",
}  # fmt: skip

__all__ = ["Comparison", "DocumentDivergences", "DocumentLosses", "Outcomes", "aa_floor", "compare"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `stethoscope.evaluation` has no attribute `{name}`")
    return getattr(import_module(f"stethoscope.{_HOME[name]}"), name)
