"""Arms x tasks -> proof: outcomes on lm-evaluation-harness, and what they show.

What needs no model is here; `stethoscope.evaluation.run` evaluates and `stethoscope.evaluation.control` measures loss.
"""

from stethoscope.evaluation.comparison import aa_floor, compare
from stethoscope.evaluation.contrast import Comparison
from stethoscope.evaluation.outcomes import DocumentDivergences, DocumentLosses, Outcomes

__all__ = ["Comparison", "DocumentDivergences", "DocumentLosses", "Outcomes", "aa_floor", "compare"]
