"""Energy kept by feature subspaces, summed over tensors, beside what random subspaces keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int
from torch import Tensor

from stethoscope.results.geometry import Curve, Draws, Kept

NEEDED = (0.5, 0.9, 0.99)
_POINTS = 128  # of a curve that are saved
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class TensorEnergy:
    """One tensor's energies; arrays are over draws."""

    layer: int
    kind: str
    energy: float
    kept: float
    chance: float
    features: np.ndarray
    bases: np.ndarray


def energy_curve(shares: Float64[Tensor, " rank"], came: Int[Tensor, " rank"], features: int, width: int) -> Curve:
    """What 1, 2, ... features keep.

    Args:
        shares: of energy along the columns of a nested basis.
        came: the feature that each column came with.
        features: how many there are.
        width: of the residual stream.
    """
    gains, ranks = np.zeros(features), np.zeros(features)
    gains[came.numpy()], ranks[came.numpy()] = shares.numpy(), 1.0
    kept, chance = gains.cumsum(), ranks.cumsum() / width
    points = np.unique(np.linspace(0, features - 1, min(features, _POINTS)).round().astype(int))
    # a share that is whole but for rounding has been reached
    short = {share: int((kept < share - 1e-6).sum()) for share in NEEDED}
    return Curve(
        features=tuple((points + 1).tolist()),
        share=tuple(kept[points].tolist()),
        chance=tuple(chance[points].tolist()),
        needed={f"{share:.0%}"[:-1]: n + 1 if n < features else None for share, n in short.items()},
    )


def sum_energies(energies: Sequence[TensorEnergy], rng: np.random.Generator) -> Kept:
    """What subspaces keep of several tensors together; the bootstrap draws layers, or tensors of a single layer."""
    units = sorted({one.layer for one in energies})
    groups = [[one for one in energies if one.layer == n] for n in units] if len(units) > 1 else [[e] for e in energies]
    kept = np.array([sum(one.kept for one in group) for group in groups])
    chance = np.array([sum(one.energy * one.chance for one in group) for group in groups])
    energy = sum(one.energy for one in energies)
    features = sum((one.features for one in energies), np.zeros(1)) / energy
    share = kept.sum() / energy
    interval = None
    if len(groups) > 1:
        drawn = rng.integers(len(groups), size=(_RESAMPLES, len(groups)))
        low, high = np.percentile(kept[drawn].sum(1) / chance[drawn].sum(1), (2.5, 97.5))
        interval = (float(low), float(high))
    return Kept(
        energy=energy,
        share=share,
        chance=chance.sum() / energy,
        random_features=_draws(features),
        random_bases=_draws(sum((one.bases for one in energies), np.zeros(1)) / energy),
        over_chance=kept.sum() / chance.sum(),
        interval=interval,
        p=float((1 + (features >= share).sum()) / (1 + len(features))),
    )


def _draws(shares: Float64[np.ndarray, " draws"]) -> Draws:
    low, high = np.percentile(shares, (2.5, 97.5))
    return Draws(mean=float(shares.mean()), low=float(low), high=float(high))
