"""Specificity scores: how differently a layer's features act on target and control text.

A score is a pure function of the saved sums of blocks of documents and of two weightings of these blocks: how much each
counts as target, and as control. Weightings may have leading axes, so that many labellings are scored in one call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from scipy.special import rel_entr

from stethoscope.diagnosis.statistics import LayerStatistics

PRESENT, RARE = 0.001, 0.01  # firing rates between which a feature is specific: on target at least, on control at most
QUIET, SEPARATING = 0.02, 32
PROBED = 16


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One layer's sums over blocks of both corpora, target's first."""

    sums: Float64[ndarray, "blocks width"]
    fired: Float64[ndarray, "blocks width"]
    tokens: Float64[ndarray, " blocks"]

    @classmethod
    def of(cls, *corpora: LayerStatistics) -> "Blocks":
        """The blocks of several corpora, one behind the other."""
        # as floats, which matrix products are fast for; counts stay exact far beyond any corpus
        names = ("sums", "fired", "tokens")
        return cls(**{n: np.concatenate([getattr(c, n) for c in corpora]).astype(np.float64) for n in names})

    def mass(self, weights: Float[ndarray, "*batch blocks"]) -> Float[ndarray, "*batch width"]:
        """Each feature's share of activation mass; m in the formulas. All 0 where nothing fires."""
        total: Float[ndarray, "*batch width"] = weights @ self.sums
        whole = total.sum(-1, keepdims=True)
        return np.divide(total, whole, out=np.zeros_like(total), where=whole > 0)

    def rate(self, weights: Float[ndarray, "*batch blocks"]) -> Float[ndarray, "*batch width"]:
        """Share of counted tokens on which each feature fires; p in the formulas."""
        return self._per_token(self.fired, weights)

    def mean(self, weights: Float[ndarray, "*batch blocks"]) -> Float[ndarray, "*batch width"]:
        """Mean activation per counted token; a in the formulas."""
        return self._per_token(self.sums, weights)

    def _per_token(
        self, values: Float64[ndarray, "blocks width"], weights: Float[ndarray, "*batch blocks"]
    ) -> Float[ndarray, "*batch width"]:
        return np.asarray((weights @ values) / np.maximum((weights @ self.tokens)[..., None], 1.0))


Weights = Float[ndarray, "*batch blocks"]
Score = Callable[[Blocks, Weights, Weights], Float[ndarray, "*batch"]]


def mass_shift(blocks: Blocks, target: Weights, control: Weights) -> Float[ndarray, "*batch"]:
    """Total variation between the layer's two distributions of activation mass over features.

    ``sum_i max(0, m_T,i - m_C,i)``: in [0, 1], without parameter or scale, hence comparable between layers of
    different L0. It is the positive part of ReasonScore (arXiv 2503.18878) without its entropy term.

    >>> blocks = Blocks(sums=np.array([[3.0, 1, 0], [1, 1, 2]]), fired=np.ones((2, 3)), tokens=np.ones(2))
    >>> float(mass_shift(blocks, np.array([1.0, 0]), np.array([0, 1.0])))
    0.5
    """
    return np.asarray(np.maximum(blocks.mass(target) - blocks.mass(control), 0).sum(-1))


def specific_mass(blocks: Blocks, target: Weights, control: Weights) -> Float[ndarray, "*batch"]:
    """Share of target mass on features that fire on at least 0.1 % of target and at most 1 % of control tokens.

    The features that SAEBench's unlearning metric and arXiv 2411.14257 call specific.
    """
    specific = (blocks.rate(target) >= PRESENT) & (blocks.rate(control) <= RARE)
    return np.asarray((blocks.mass(target) * specific).sum(-1))


def lift(blocks: Blocks, target: Weights, control: Weights) -> Float[ndarray, "*batch"]:
    """Mean log ratio of smoothed firing rates: ``sum_i p_T log((p_T + e) / (p_C + e)) / sum_i p_T``, e = 1 / (n + 2).

    n is the smaller corpus' number of tokens, so that a feature never seen there counts alike in both.
    """
    n = np.minimum(target @ blocks.tokens, control @ blocks.tokens)
    smooth = (1 / (n + 2))[..., None]
    p, q = blocks.rate(target), blocks.rate(control)
    # rel_entr(x, y) is x log(x / y): the smoothed share's own weight is taken off again
    gain = rel_entr(p + smooth, q + smooth) * (p / (p + smooth))
    return np.asarray(gain.sum(-1) / np.maximum(p.sum(-1), 1e-300))


def top_separation(blocks: Blocks, target: Weights, control: Weights) -> Float[ndarray, "*batch"]:
    """Mean of the 32 largest ``p_T - p_C`` among features that fire on less than 2 % of control tokens (2411.14257)."""
    p, q = blocks.rate(target), blocks.rate(control)
    separation = np.where(q < QUIET, p - q, 0.0)
    k = min(SEPARATING, separation.shape[-1])
    return np.asarray(np.partition(separation, -k, axis=-1)[..., -k:].mean(-1))


def probe_auroc(blocks: Blocks, target: Weights, control: Weights) -> Float[ndarray, "*batch"]:
    """Area under the ROC curve of telling held-out blocks apart by the features that differ most on the others.

    The 16 features of largest ``p_T - p_C`` on even blocks are summed (by rate) on odd blocks, and the other way round;
    the mean of both. Blocks of many documents are easily told apart: use small blocks for this score.
    """
    even = np.arange(len(blocks.tokens)) % 2 == 0
    rates = blocks.fired / np.maximum(blocks.tokens, 1)[:, None]
    batch = np.broadcast_shapes(target.shape[:-1], control.shape[:-1])
    areas = np.empty((2, *batch))
    for fold, chosen in enumerate((even, ~even)):
        difference = blocks.rate(target * chosen) - blocks.rate(control * chosen)
        k = min(PROBED, difference.shape[-1])
        features = np.argpartition(difference, -k, axis=-1)[..., -k:]
        for place in np.ndindex(batch):
            summed = rates[:, features[place]].sum(1)
            areas[(fold, *place)] = _auroc(summed, target[place] * ~chosen, control[place] * ~chosen)
    return np.asarray(areas.mean(0))


def positive_difference(blocks: Blocks, target: Weights, control: Weights) -> Float[ndarray, "*batch"]:
    """Sum over features of max(0, mean on target - mean on control), of `attribution`'s signed sums."""
    return np.asarray(np.maximum(blocks.mean(target) - blocks.mean(control), 0).sum(-1))


def _auroc(values: Float[ndarray, " blocks"], target: Weights, control: Weights) -> float:
    """Weighted area: the chance that a target block's value exceeds a control block's, ties counted half."""
    _, place = np.unique(values, return_inverse=True)
    t, c = np.bincount(place, weights=target), np.bincount(place, weights=control)
    pairs = t.sum() * c.sum()
    if pairs == 0:
        return 0.5  # a resample without held-out blocks of one kind says nothing
    below = np.cumsum(c) - c
    return float((t * (below + c / 2)).sum() / pairs)


SCORES: dict[str, Score] = {
    "mass_shift": mass_shift,
    "specific_mass": specific_mass,
    "lift": lift,
    "top_separation": top_separation,
    "probe_auroc": probe_auroc,
}
