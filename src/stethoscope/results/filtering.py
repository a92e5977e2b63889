"""What the filter let through in each layer, at every strength."""

from typing import ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import Display, Rows, number, percent, table_of


class Effect(Frozen):
    """What a change does: its squared Frobenius norm, and its mean squared effect on outputs per token of two texts.

    Attributes:
        target: E |D x|^2 over target text, summed over tensors.
        protected: the same over the protected texts, weighted.
    """

    energy: float = 0.0
    target: float = 0.0
    protected: float = 0.0

    @property
    def specificity(self) -> float | None:
        """The effect on target over that on protected text; None where there is none on protected text."""
        return self.target / self.protected if self.protected > 0 else None


class LayerFiltering(Frozen):
    """One layer's change before the filter and at each strength.

    Attributes:
        layer: None for the tensors outside the layers.
        separability: how far target and protected text can be told apart at its inputs, from 0, not at all, to 1; None
            if it was not measured. The root mean square of (1 - mu) / (1 + mu) over the generalised eigenvalues mu
            of protected against target moments; the mean of that over inputs, weighted by their sizes.
        filtered: one per strength.
    """

    layer: int | None
    separability: float | None = None
    raw: Effect
    filtered: tuple[Effect, ...]


class Filtering(Display, Artifact):
    """A task vector filtered at several strengths.

    Attributes:
        weights: protected text -> its weight.
        tokens: text -> tokens that the moments are over.
        layers: the layers, then the tensors outside them.
    """

    FILE: ClassVar[str] = "filter.json"

    strengths: tuple[float, ...]
    weights: dict[str, float]
    tokens: dict[str, int]
    layers: tuple[LayerFiltering, ...]

    @property
    def verdict(self) -> str:
        """What the middle strength lets through."""
        place = len(self.strengths) // 2
        raw = [sum(getattr(one.raw, key) for one in self.layers) for key in ("target", "protected")]
        after = [sum(getattr(one.filtered[place], key) for one in self.layers) for key in ("target", "protected")]
        target, protected = (_share(*pair) for pair in zip(after, raw, strict=True))
        return (
            f"At strength {self.strengths[place]:g} the filter keeps {target} % of the change's effect on target text"
            f" and {protected} % of that on protected text."
        )

    def table(self) -> Rows:
        """A row per layer, at the middle strength."""
        place = len(self.strengths) // 2
        kept = f"at {self.strengths[place]:g}, %"
        return table_of(
            {
                "layer": "outside" if one.layer is None else str(one.layer),
                "separability": number(one.separability, ".2f"),
                "target / protected": number(one.raw.specificity, ".2f"),
                f"energy {kept}": _share(one.filtered[place].energy, one.raw.energy),
                f"target effect {kept}": _share(one.filtered[place].target, one.raw.target),
                f"protected effect {kept}": _share(one.filtered[place].protected, one.raw.protected),
            }
            for one in self.layers
        )


def _share(after: float, before: float) -> str:
    return percent(after / before if before > 0 else None)
