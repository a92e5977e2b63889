"""The result of `diagnose`: every layer's specificity for the target, and the SAEs' health."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float64
from numpy import ndarray

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import NONE, Display, Rows, first_of, interval, number, p_value, percent, table_of

# A feature that fires on more than this share of tokens says little about any of them.
DENSE_RATE = 0.1
ALPHA = 0.05  # of the family-wise p-value at which a layer is said to stand out
NAMED = 8  # layers that a sentence names
# Columns of the table that a terminal has room for.
_SHORT = (
    "layer", "excess", "interval", "z", "p, all layers", "rank", "stability", "explained", "L0", "excluded",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SAEHealth:
    """An SAE's health on some text.

    Attributes:
        tokens: tokens it was measured on; a feature can be called dead only against this number.
        variance_explained: 1 less residual over total variance, about the mean; at most 1, and below 0 for an SAE
            that is worse than the mean.
        l0: features that fire on a token, on average.
        dead: share of features that never fired, in [0, 1].
        dense: share of features that fired on more than a tenth of the tokens, in [0, 1].
        encoding_error: total variation between the features' shares of activation mass as SAELens encodes them in
            float32 and as they were encoded in the pass; None where that was not measured.
    """

    tokens: int
    variance_explained: float | None
    l0: float | None
    dead: float | None
    dense: float | None
    encoding_error: float | None = None

    def on(self, rate: Float64[ndarray, " width"], tokens: int) -> "SAEHealth":
        """The same SAE with what firing rates on more tokens say."""
        if not tokens:
            return self
        shares = {"dead": float((rate == 0).mean()), "dense": float((rate > DENSE_RATE).mean())}
        return replace(self, tokens=tokens, l0=float(rate.sum()), **shares)


class FeatureDifference(Frozen):
    """One feature's firing rate and share of activation mass on target and control text."""

    feature: int
    target_rate: float
    control_rate: float
    target_mass: float
    control_mass: float


class LayerDiagnosis(Frozen):
    """One layer's score, compared with chance, and the health of its SAE.

    Attributes:
        score: specificity as defined, without correction for chance.
        null: mean of the permutation null.
        excess: score less ``null``; ``interval`` is its 95 % block-bootstrap interval.
        z: excess in standard deviations of the null.
        p: permutation p; ``p_familywise`` is adjusted for all layers.
        rank: place by excess, from 1; ``stability`` is the share of resamples that place it as high or higher.
        increment: excess over that of the layer before, since ``resid_post`` accumulates.
        increment_z: in standard deviations of the increment's own null.
        against: the control that the layer stands out least against; all figures above are those against it.
        health: by corpus.
        flag: why the layer is excluded from selection, or None.
        features: those that differ most toward the target, or contribute most to it.
    """

    layer: int
    score: float
    null: float
    excess: float
    interval: tuple[float, float]
    z: float
    p: float
    p_familywise: float
    rank: int
    stability: float
    increment: float
    increment_z: float
    against: str
    health: dict[str, SAEHealth]
    flag: str | None
    features: tuple[FeatureDifference, ...]

    @property
    def null_deviation(self) -> float:
        """Standard deviation of the permutation null, which the saved z holds."""
        return abs(self.excess / self.z) if self.z else 0.0


class CorpusSummary(Frozen):
    """Size of one corpus, as collected.

    Attributes:
        sinks: the most that any layer left out.
        broken: places of documents that could not be processed and do not count among ``documents``.
    """

    documents: int
    blocks: int
    tokens: int
    sinks: int
    broken: tuple[int, ...] = ()


class Diagnosis(Display, Artifact):
    """Every layer's specificity for the target, in order of depth."""

    FILE: ClassVar[str] = "diagnosis.json"

    score: str
    increments: bool
    corpora: dict[str, CorpusSummary]
    layers: tuple[LayerDiagnosis, ...]
    warnings: tuple[str, ...]

    @property
    def controls(self) -> list[str]:
        """The corpora that the target was compared with."""
        return [name for name in self.corpora if name != "target"]

    @property
    def verdict(self) -> str:
        """One sentence: which layers are specific to the target beyond chance, and how many are excluded."""
        found = [layer for layer in self.layers if layer.flag is None and layer.p_familywise <= ALPHA]
        found.sort(key=lambda layer: layer.rank)
        whole = f"{len(self.layers)} layers"
        if found:
            names = first_of([str(layer.layer) for layer in found], NAMED)
            said = f"{len(found)} of {whole} stand out from chance by `{self.score}`, strongest first: {names}"
        else:
            said = f"No evidence by `{self.score}` that any of {whole} is specific to the target"
        flagged = sum(layer.flag is not None for layer in self.layers)
        return f"{said}; {flagged} are excluded for their SAEs." if flagged else f"{said}."

    def to_frame(self) -> Any:
        """A pandas frame: a row per layer, ``variance_explained`` and ``l0`` by corpus in columns of their own."""
        import pandas as pd

        rows = []
        for layer in self.layers:
            row = layer.model_dump(exclude={"interval", "health", "features", "flag"})
            row |= zip(("low", "high"), layer.interval, strict=True)
            for field in ("variance_explained", "l0"):
                row |= {f"{field}_{name}": getattr(health, field) for name, health in layer.health.items()}
            rows.append(row | {"flag": layer.flag or ""})
        return pd.DataFrame(rows)

    def plot(self, selection: Any = None, *, width: int = 640) -> Any:
        """The layer profile, an Altair chart: excess over chance per layer, and the SAEs' health below.

        Args:
            selection: a `Selection`, whose layers are marked.
            width: of the plotting area in pixels.
        """
        from stethoscope.charts.layers import layer_profile

        chosen = selection.layers if selection else ()
        rows = [
            {
                "layer": layer.layer,
                "left": layer.layer - 0.5,
                "right": layer.layer + 0.5,
                "kind": "selected" if layer.layer in chosen else "excluded" if layer.flag else "not selected",
                "excess": layer.excess,
                "low": layer.interval[0],
                "high": layer.interval[1],
                "null_low": -2 * layer.null_deviation,
                "null_high": 2 * layer.null_deviation,
                "z": layer.z,
                "p_familywise": layer.p_familywise,
                "against": layer.against,
                # by number: in a field's name, dots and brackets of a corpus' name would mean something to Vega
                **{
                    f"{short}_{i}": getattr(layer.health[name], field) if name in layer.health else None
                    for short, field in (("explained", "variance_explained"), ("l0", "l0"))
                    for i, name in enumerate(self.corpora)
                },
            }
            for layer in self.layers
        ]
        return layer_profile(rows, list(self.corpora), self.score, width=width)

    def table(self, *, full: bool = False) -> Rows:
        """A row per layer, of several corpora with a number each.

        Args:
            full: also the columns that a terminal has no room for.
        """
        rows = []
        for layer in self.layers:
            healths = [layer.health[name] for name in self.corpora if name in layer.health]
            row = {
                "layer": str(layer.layer),
                "score": f"{layer.score:.3f}",
                "null": f"{layer.null:.3f}",
                "excess": f"{layer.excess:+.3f}",
                "interval": interval(*layer.interval, "+.3f"),
                "z": f"{layer.z:.1f}",
                "p": p_value(layer.p),
                "p, all layers": p_value(layer.p_familywise),
                "rank": str(layer.rank),
                "stability": f"{layer.stability:.0%}",
                "against": layer.against,
                "increment": f"{layer.increment:+.3f}",
                "z of increment": f"{layer.increment_z:.1f}",
                "explained": " / ".join(number(h.variance_explained, ".2f") for h in healths),
                "L0": " / ".join(number(h.l0, ".0f") for h in healths),
                "dead, %": " / ".join(percent(h.dead) for h in healths),
                "dense, %": " / ".join(percent(h.dense) for h in healths),
                "excluded": layer.flag or NONE,
            }
            rows.append(row if full else {name: row[name] for name in _SHORT})
        return table_of(rows)
