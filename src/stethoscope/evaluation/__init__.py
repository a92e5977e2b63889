"""Arms x tasks -> proof: outcomes on lm-evaluation-harness, and what they show.

What needs no model is here; `stethoscope.evaluation.run` evaluates and `stethoscope.evaluation.control` measures loss.
"""

from stethoscope.evaluation.comparison import Comparison, compare
from stethoscope.evaluation.outcomes import DocumentLosses, Outcomes

__all__ = ["Comparison", "DocumentLosses", "Outcomes", "compare"]
