"""Scores compared with chance: a permutation null over blocks and a block bootstrap.

Any finite sample makes a specificity score positive even between two halves of one corpus. So a layer is judged
by its excess over the scores of relabelled blocks.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.stats import rankdata

from stethoscope.diagnosis.scores import Blocks, Score
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import FEWEST_BLOCKS

LABELLED_ELEMENTS = 1 << 23  # labellings x features held at a time
# In standard deviations of the null: scores of one labelling differ in the last bits with those scored beside it.
EQUAL = 1e-9


@dataclass(frozen=True, kw_only=True)
class ScoreUncertainty:
    """Every layer's score, its null and its bootstrap; ``layers`` gives the order of the last axis.

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
        # a null without deviation would make z infinite, which no result on disk may hold
        return self.excess / np.maximum(self.null.std(0, ddof=1), 1e-12)

    @property
    def p(self) -> Float64[ndarray, " layers"]:
        """One-sided permutation p per layer; never 0, as the labelling seen is one of those possible."""
        return (1 + (self.null >= self.score - EQUAL * self.null.std(0)).sum(0)) / (1 + len(self.null))

    @property
    def p_familywise(self) -> Float64[ndarray, " layers"]:
        """p adjusted for the number of layers by the largest z over layers of each labelling (Westfall and Young)."""
        # The labelling seen is standardised with the others: judged by their spread alone it would stand out too often,
        # as the largest of many layers picks those whose spread happens to be small.
        rows = np.concatenate([self.score[None], self.null])
        z = (rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-12)
        return (1 + (z[1:].max(1)[:, None] >= z[0] - EQUAL).sum(0)) / len(rows)

    def interval(self, confidence: float = 0.95) -> Float64[ndarray, "2 layers"]:
        """Bootstrap interval of the excess.

        Resampling adds noise and so raises the score on average; the resamples' deviations from their own mean
        are used, not their values.
        """
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        low, high = np.quantile(self.resamples - self.resamples.mean(0), tails, axis=0)
        # where a score can rise no further, nearly all resamples lie on one side of their mean
        return np.stack([self.excess - np.maximum(high, 0), self.excess - np.minimum(low, 0)])

    @property
    def rank(self) -> Int64[ndarray, " layers"]:
        """Place by excess, from 1; ties go to the lower layer."""
        return np.asarray(rankdata(-self.excess, method="ordinal"))

    @property
    def stability(self) -> Float64[ndarray, " layers"]:
        """Share of resamples that place a layer as high as its rank, or higher."""
        ranks = rankdata(self.null.mean(0) - self.resamples, method="ordinal", axis=1)
        return np.asarray((ranks <= self.rank).mean(0))

    def increments(self) -> "ScoreUncertainty":
        """Each layer's score less that of the layer before it that has an SAE, judged in the same way.

        This is what a layer of a cumulative site adds; the first layer keeps its score.
        """
        kinds = {name: getattr(self, name) for name in ("score", "null", "resamples")}
        return replace(self, **{name: np.diff(kind, axis=-1, prepend=0.0) for name, kind in kinds.items()})


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
    n = n_target + n_control
    seen = np.repeat([1.0, 0.0], [n_target, n_control])
    relabelled = np.stack([seen[rng.permutation(n)] for _ in range(permutations)])
    drawn = np.zeros((2, resamples, n))
    for side, here in enumerate((slice(n_target), slice(n_target, n))):
        size = here.indices(n)[1] - here.indices(n)[0]
        drawn[side, :, here] = rng.multinomial(size, np.full(size, 1 / size), size=resamples)

    found: list[list[Float64[ndarray, " labellings"]]] = []
    for layer in target.layers:
        blocks = Blocks.of(target.layers[layer], control.layers[layer])
        pairs = ((seen[None], 1 - seen[None]), (relabelled, 1 - relabelled), (drawn[0], drawn[1]))
        found.append([_in_parts(score, blocks, t, c) for t, c in pairs])
    (found_score,), null, drawn_again = (np.stack(kind, axis=1) for kind in zip(*found, strict=True))
    return ScoreUncertainty(layers=tuple(target.layers), score=found_score, null=null, resamples=drawn_again)


def _in_parts(
    score: Score,
    blocks: Blocks,
    target: Float64[ndarray, "labellings blocks"],
    control: Float64[ndarray, "labellings blocks"],
) -> Float64[ndarray, " labellings"]:
    """The score of many labellings, a few at a time where features are many: memory must not grow with both."""
    step = max(1, LABELLED_ELEMENTS // blocks.sums.shape[1])
    parts = [score(blocks, target[i : i + step], control[i : i + step]) for i in range(0, len(target), step)]
    return np.concatenate(parts)
