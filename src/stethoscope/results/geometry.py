"""How much of the task vector lies in the SAE features' subspaces, beside chance."""

from statistics import fmean, median
from typing import Any, ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import NONE, Display, Rows, interval, percent, table_of


class Draws(Frozen):
    """Shares of energy that random subspaces keep: their mean, and the 2.5 and 97.5 percentiles."""

    mean: float
    low: float
    high: float


class Kept(Frozen):
    """What the features' span keeps of the energy of some tensors.

    Attributes:
        energy: squared Frobenius norm of the change.
        share: of it that is kept.
        chance: r/d, weighed by energy where ranks differ.
        random_features: of as many random features of the same SAE; for a full fine-tune from 16 times as many.
        random_bases: of random orthonormal bases of the same rank.
        over_chance: share over chance; ``interval`` is its 95 % bootstrap interval over layers, over tensors where
            there is one layer, None where there is one tensor.
        p: chance that as many random features keep as much, from the draws.
    """

    energy: float
    share: float
    chance: float
    random_features: Draws
    random_bases: Draws
    over_chance: float
    interval: tuple[float, float] | None
    p: float

    @property
    def verdict(self) -> str:
        """One sentence: do the features keep more than chance, and than other features would?"""
        drawn = self.random_features
        times, against = f"{self.over_chance:.2f} times", self._beside(self.random_bases)
        if self.interval:
            low, high = self.interval
            against = "more than" if low > 1 else "less than" if high < 1 else "no more than"
            times += f", 95 % interval {low:.2f} to {high:.2f}"
        return (
            f"The features' directions keep {self.share:.1%} of the task vector's energy, {against} the"
            f" {self.chance:.1%} of random directions ({times}), and {self._beside(drawn)} as many random features of"
            f" the same SAEs ({drawn.low:.1%} to {drawn.high:.1%})."
        )

    def _beside(self, drawn: Draws) -> str:
        return "more than" if self.share > drawn.high else "less than" if self.share < drawn.low else "no more than"


class Curve(Frozen):
    """Energy kept against number of features, most specific first; thinned, but ``needed`` is exact.

    Attributes:
        features, share, chance: the number, what it keeps, and rank over width.
        needed: "50", "90" and "99" (percent) -> fewest features that keep as much; None if all do not.
    """

    features: tuple[int, ...]
    share: tuple[float, ...]
    chance: tuple[float, ...]
    needed: dict[str, int | None]


class TensorGeometry(Frozen):
    """One tensor's change against its layer's feature subspace.

    Attributes:
        functional: corpus -> mean ``|tau' x|^2`` over mean ``|tau x|^2`` on the matrix' real inputs.
        functional_chance: the same for random bases.
        angles: principal angles in degrees between the subspace and the change's leading singular subspace on the
            residual stream's side, smallest first.
        overlap: mean squared cosine of these over the leading directions; r/d for a random subspace.
        effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli, 2007).
        stable_rank: squared Frobenius over squared spectral norm.
    """

    name: str
    kind: str
    writes: bool
    kept: Kept
    functional: dict[str, float]
    functional_chance: dict[str, float]
    angles: tuple[float, ...]
    overlap: float | None
    effective_rank: float | None
    stable_rank: float | None


class Written(Frozen):
    """Share of the energy of a layer's writers that lies in the span of the features' encoder directions, and r/d."""

    share: float
    chance: float


class LayerGeometry(Frozen):
    """One layer; ``unprojected`` is the share of its energy in norms and biases, which have no side in the stream."""

    layer: int
    features: int
    rank: int
    kept: Kept
    unprojected: float
    functional: dict[str, float]
    functional_chance: dict[str, float]
    curve: Curve
    written: Written | None
    tensors: tuple[TensorGeometry, ...]


class Geometry(Display, Artifact):
    """Every layer's task vector against its features.

    Attributes:
        tokens: number of tokens of each corpus.
        verdict: one sentence: do the features keep more than chance, and more than other features would?
    """

    FILE: ClassVar[str] = "geometry.json"

    draws: int
    leading: int
    tokens: dict[str, int]
    layers: tuple[LayerGeometry, ...]
    kinds: dict[str, Kept]
    total: Kept
    verdict: str

    def to_frame(self) -> Any:
        """A pandas frame: a row per layer, with shares of energy kept beside chance and, by corpus, functional ones."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "layer": layer.layer,
                    "features": layer.features,
                    "rank": layer.rank,
                    "energy": layer.kept.energy,
                    "kept": layer.kept.share,
                    "chance": layer.kept.chance,
                    "over_chance": layer.kept.over_chance,
                    "random_low": layer.kept.random_features.low,
                    "random_high": layer.kept.random_features.high,
                    "p": layer.kept.p,
                    "unprojected": layer.unprojected,
                    **{f"functional_{corpus}": share for corpus, share in layer.functional.items()},
                    **{f"functional_chance_{corpus}": share for corpus, share in layer.functional_chance.items()},
                }
                for layer in self.layers
            ]
        )

    def plot(self, selection: Any = None, *, width: int = 640) -> Any:
        """What each layer's features keep of its change, an Altair chart, beside random features and directions.

        Args:
            selection: a `Selection`, whose layers are marked.
            width: of the plotting area in pixels.
        """
        from stethoscope.charts.layers import energy_by_layer

        rows = [
            {
                "layer": layer.layer,
                "kept": 100 * layer.kept.share,
                "chance": 100 * layer.kept.chance,
                "low": 100 * layer.kept.random_features.low,
                "high": 100 * layer.kept.random_features.high,
                "selected": bool(selection) and layer.layer in selection.layers,
            }
            for layer in self.layers
        ]
        return energy_by_layer(rows, width=width)

    def table(self) -> Rows:
        """A row per layer, per kind of module and for all; shares in percent, ``functional`` by corpus."""
        rows = [_row(layer) for layer in self.layers]
        sums = {f"all {kind}": kept for kind, kept in self.kinds.items()} | {"all": self.total}
        return table_of([*rows, *(dict.fromkeys(rows[0], "") | {"layer": n} | _kept(kept) for n, kept in sums.items())])


def _row(layer: LayerGeometry) -> dict[str, str]:
    written = layer.written
    ranks = [t.effective_rank for t in layer.tensors if t.effective_rank is not None]
    overlaps = [t.overlap for t in layer.tensors if t.overlap is not None]
    return {
        "layer": str(layer.layer),
        "features": str(layer.features),
        "rank": str(layer.rank),
        **_kept(layer.kept),
        f"functional on {' / '.join(layer.functional)}": " / ".join(map(percent, layer.functional.values())) or NONE,
        "its chance": " / ".join(map(percent, layer.functional_chance.values())) or NONE,
        "features for 50, 90, 99 %": " / ".join(str(layer.curve.needed.get(n) or NONE) for n in ("50", "90", "99")),
        "writes where they read": f"{percent(written.share)} ({percent(written.chance)})" if written else NONE,
        "effective rank": f"{median(ranks):.1f}" if ranks else NONE,
        "in leading directions": percent(fmean(overlaps)) if overlaps else NONE,
    }


def _kept(kept: Kept) -> dict[str, str]:
    drawn, times = kept.random_features, f"{kept.over_chance:.2f}"
    return {
        "kept, %": percent(kept.share),
        "chance": percent(kept.chance),
        "random features": interval(drawn.low, drawn.high, ".1f", 100),
        "over chance": f"{times} ({interval(*kept.interval, '.2f')})" if kept.interval else times,
    }
