"""What chance alone would make of a score: a permutation null over blocks and a block bootstrap.

Any finite sample makes a specificity score positive even between two halves of one corpus. So a layer is judged
by its excess over the scores of relabelled blocks.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from stethoscope.diagnosis.scores import Score
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.errors import StethoscopeError

# Fewer blocks have so few relabellings that no layer could ever be significant at 5 %.
FEWEST_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class ScoreUncertainty:
    """Every layer's score, its null, and its spread; ``layers`` gives the order of the last axis.

    Attributes:
        score: on the data as labelled.
        null: scores of relabelled blocks.
        resamples: scores of blocks drawn with replacement within each corpus.
    """

    layers: tuple[int, ...]
    score: Float64[ndarray, " layers"]
    null: Float64[ndarray, "permutations layers"]
    resamples: Float64[ndarray, "resamples layers"]

    @property
    def excess(self) -> Float64[ndarray, " layers"]:
        """Score less the null's mean."""
        return self.score - self.null.mean(0)

    @property
    def z(self) -> Float64[ndarray, " layers"]:
        """Excess in standard deviations of the null."""
        return self.excess / self._spread

    @property
    def p(self) -> Float64[ndarray, " layers"]:
        """One-sided permutation p per layer; never 0, as the labelling seen is one of those possible."""
        return (1 + (self.null >= self.score).sum(0)) / (1 + len(self.null))

    @property
    def p_familywise(self) -> Float64[ndarray, " layers"]:
        """p adjusted for the number of layers by the null's largest z over layers (Westfall and Young, max-T)."""
        largest = ((self.null - self.null.mean(0)) / self._spread).max(1)
        return (1 + (largest[:, None] >= self.z).sum(0)) / (1 + len(self.null))

    def interval(self, confidence: float = 0.95) -> Float64[ndarray, "2 layers"]:
        """Bootstrap interval of the excess.

        Resampling adds noise and so raises the score on average; the resamples' deviations from their own mean
        are used, not their values.
        """
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        low, high = np.quantile(self.resamples - self.resamples.mean(0), tails, axis=0)
        return np.stack([self.excess - high, self.excess - low])

    def top_share(self, k: int) -> Float64[ndarray, " layers"]:
        """Share of resamples in which a layer is among the k of largest excess (ties toward the lower layer)."""
        order = np.argsort(-(self.resamples - self.null.mean(0)), axis=1, kind="stable")[:, :k]
        return np.array([(order == i).any(1).mean() for i in range(len(self.layers))])

    @property
    def _spread(self) -> Float64[ndarray, " layers"]:
        # a null without spread would make z infinite, which no result on disk may hold
        return np.maximum(self.null.std(0, ddof=1), 1e-12)


def assess(
    target: FeatureStatistics,
    control: FeatureStatistics,
    score: Score,
    *,
    permutations: int = 200,
    resamples: int = 200,
    rng: np.random.Generator,
) -> ScoreUncertainty:
    """Score every layer, with the null of exchangeable blocks and a bootstrap over blocks.

    The same relabelling is applied to every layer, which keeps the layers' dependence and makes the family-wise
    adjustment valid.

    Raises:
        StethoscopeError: a corpus has fewer than four blocks, or the two do not cover the same layers.
    """
    if list(target.layers) != list(control.layers):
        raise StethoscopeError("target and control statistics cover different layers")
    n_target, n_control = target.blocks, control.blocks
    if min(n_target, n_control) < FEWEST_BLOCKS:
        raise StethoscopeError(
            f"target has {n_target} and control {n_control} blocks of documents; at least {FEWEST_BLOCKS} each are"
            " needed to tell a difference from chance",
            hint="use more documents or a smaller `block_size`",
        )
    relabelled = np.zeros((permutations, n_target + n_control))
    for row in relabelled:
        row[rng.permutation(n_target + n_control)[:n_target]] = 1
    drawn_target = rng.multinomial(n_target, np.full(n_target, 1 / n_target), size=resamples).astype(np.float64)
    drawn_control = rng.multinomial(n_control, np.full(n_control, 1 / n_control), size=resamples).astype(np.float64)

    scores, null, spread = [], [], []
    for layer in target.layers:
        t, c = target.layers[layer].sums, control.layers[layer].sums
        pooled = np.concatenate([t, c])
        scores.append(score(t.sum(0), c.sum(0)))
        null.append(score(relabelled @ pooled, (1 - relabelled) @ pooled))
        spread.append(score(drawn_target @ t, drawn_control @ c))
    return ScoreUncertainty(
        layers=tuple(target.layers),
        score=np.array(scores),
        null=np.stack(null, axis=1),
        resamples=np.stack(spread, axis=1),
    )
