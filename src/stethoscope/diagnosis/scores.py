"""Specificity scores: how differently a layer's features act on target and control text.

Each score is a pure function of two arrays of activation sums and broadcasts over leading axes, so that
permutations and resamples are scored in one call.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Score = Callable[[Float[ndarray, "*batch width"], Float[ndarray, "*batch width"]], Float[ndarray, "*batch"]]


def mass_difference(
    target: Float[ndarray, "*batch width"], control: Float[ndarray, "*batch width"]
) -> Float[ndarray, "*batch width"]:
    """Each feature's share of target activation mass less its share of control mass.

    Args:
        target: activation sums on target text, not negative; any unit.
        control: the same on control text.
    """
    return _shares(target) - _shares(control)


def mass_shift(
    target: Float[ndarray, "*batch width"], control: Float[ndarray, "*batch width"]
) -> Float[ndarray, "*batch"]:
    """Total variation between the layer's two distributions of activation mass over features.

    ``sum_i max(0, m_T,i - m_C,i)``: in [0, 1], without parameter or scale, hence comparable between layers of
    different L0. It is the positive part of ReasonScore (arXiv 2503.18878) without its entropy term.

    >>> float(mass_shift(np.array([3.0, 1.0, 0.0]), np.array([1.0, 1.0, 2.0])))
    0.5
    """
    difference: Float[ndarray, "*batch width"] = mass_difference(target, control)
    return np.asarray(np.maximum(difference, 0).sum(-1))


def _shares(sums: Float[ndarray, "*batch width"]) -> Float[ndarray, "*batch width"]:
    total = sums.sum(-1, keepdims=True)
    return np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)


SCORES: dict[str, Score] = {"mass_shift": mass_shift}
