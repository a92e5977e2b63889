"""Where the intervals of `inference` come from: the bootstrap over units, clustered errors, and Tango's score."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]


def sum_by_cluster(
    difference: Floats, clusters: NDArray[Any] | None, strata: NDArray[Any] | None
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Per cluster: the sum of differences, the number of items, and the stratum's number."""
    n = len(difference)
    group = np.zeros(n, np.int64) if strata is None else np.unique(strata, return_inverse=True)[1].astype(np.int64)
    if clusters is None:
        return difference, np.ones(n), group
    _, unit = np.unique(np.stack([group, np.unique(clusters, return_inverse=True)[1]]), axis=1, return_inverse=True)
    unit = unit.reshape(-1)
    first = np.unique(unit, return_index=True)[1]
    return np.bincount(unit, weights=difference).astype(np.float64), np.bincount(unit).astype(np.float64), group[first]


def clustered_error(sums: Floats, sizes: Floats, groups: NDArray[np.int64]) -> float | None:
    """Standard error of sum(sums) / sum(sizes) over units within groups; None where a group has a single unit."""
    variance = 0.0
    for group in np.unique(groups):
        chosen = groups == group
        count = int(chosen.sum())
        if count < 2:
            return None
        residual = sums[chosen] - sizes[chosen] * sums[chosen].sum() / sizes[chosen].sum()
        variance += float((residual**2).sum()) * count / (count - 1)
    return variance**0.5 / float(sizes.sum())


def ratio_bootstrap(
    sums: Floats,
    sizes: Floats,
    groups: NDArray[np.int64],
    confidence: float,
    resamples: int,
    rng: np.random.Generator | None,
) -> tuple[float | None, float | None, str | None]:
    """Percentile interval of sum(sums) / sum(sizes) when units are drawn with replacement within groups."""
    if len(sums) < 2:
        return None, None, "one unit cannot be resampled"
    if len(np.unique(sums / sizes)) == 1:
        return None, None, "every unit has the same difference, which a bootstrap cannot tell from certainty"
    rng = rng or np.random.default_rng(0)
    top, bottom = np.zeros(resamples), np.zeros(resamples)
    for group in np.unique(groups):
        # Equal units are interchangeable: draw how often each distinct one comes, not which.
        units, counts = np.unique(np.stack([sums, sizes], axis=1)[groups == group], axis=0, return_counts=True)
        count = int(counts.sum())
        step = max(1, 4_000_000 // len(units))
        for start in range(0, resamples, step):
            drawn = rng.multinomial(count, counts / count, size=min(step, resamples - start))
            top[start : start + step] += drawn @ units[:, 0]
            bottom[start : start + step] += drawn @ units[:, 1]
    tail = (1 - confidence) / 2
    low, high = np.quantile(top / bottom, [tail, 1 - tail])
    return float(low), float(high), None


def score_statistic(worse: int, better: int, n: int, difference: float) -> float:
    """Tango's score statistic against a true ``difference``; large where the observed one is above it."""
    b = -worse - better + (2 * n - better + worse) * difference
    c = -worse * difference * (1 - difference)
    share = (max(b * b - 8 * n * c, 0.0) ** 0.5 - b) / (4 * n)  # of items that only the first arm gets right
    variance = n * (2 * share + difference * (1 - difference))
    gap = better - worse - n * difference
    if variance <= 0:
        return 0.0 if gap == 0 else float(np.copysign(np.inf, gap))
    return float(gap / variance**0.5)


def score_interval(worse: int, better: int, n: int, confidence: float) -> tuple[float, float]:
    """All true differences that the score test does not reject (Tango 1998)."""
    z = float(stats.norm.isf((1 - confidence) / 2))
    estimate = (better - worse) / n
    edge = 1 - 1e-12

    def end(sign: int) -> float:
        def excess(difference: float) -> float:
            return float(np.clip(sign * score_statistic(worse, better, n, difference), -1e6, 1e6)) - z

        if sign * estimate <= -edge or excess(-sign * edge) < 0:
            return float(-sign)
        return float(optimize.brentq(excess, -sign * edge, estimate))

    return end(1), end(-1)
