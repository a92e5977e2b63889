"""What the filter let through in each layer, at every strength."""

from typing import Any, ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import Display, Rows, listed, number, percent, table_of
from stethoscope.errors import StethoscopeError


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
        tensors: how many changes lie beside it at each strength.
    """

    FILE: ClassVar[str] = "filter.json"

    strengths: tuple[float, ...]
    tensors: int = 0
    weights: dict[str, float]
    tokens: dict[str, int]
    layers: tuple[LayerFiltering, ...]

    @property
    def middle(self) -> float:
        """The strength that is shown where none is asked for."""
        return self.strengths[len(self.strengths) // 2]

    def _place(self, strength: float | None = None) -> int:
        at = self.middle if strength is None else strength
        if at not in self.strengths:
            raise StethoscopeError(f"nothing was filtered at strength {at:g}", hint=f"known: {listed(self.strengths)}")
        return self.strengths.index(at)

    @property
    def verdict(self) -> str:
        """What the middle strength lets through."""
        place = self._place()
        shares = []
        for text in ("target", "protected"):
            before = sum(getattr(one.raw, text) for one in self.layers)
            shares.append(_share(sum(getattr(one.filtered[place], text) for one in self.layers), before))
        return (
            f"At strength {self.middle:g} the filter keeps {percent(shares[0])} % of the mean squared effect that the"
            f" change has on target text, and {percent(shares[1])} % of that on protected text."
        )

    def to_frame(self) -> Any:
        """A data frame with a row per layer and strength (0 is the raw change), shares relative to the raw change."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": one.layer,
                "separability": one.separability,
                "specificity": one.raw.specificity,
                "strength": strength,
                **{f"{key}_kept": _share(value, getattr(one.raw, key)) for key, value in effect.model_dump().items()},
            }
            for one in self.layers
            for strength, effect in zip((0.0, *self.strengths), (one.raw, *one.filtered), strict=True)
        )

    def plot(self, strength: float | None = None, *, width: int = 640) -> Any:
        """The shares of each layer's effects that are kept at a strength, an Altair chart; the middle one if None."""
        from stethoscope.charts.layers import effects_by_layer

        place = self._place(strength)
        rows = [
            {"layer": one.layer, "kind": text, "kept": 100 * share}
            for one in self.layers
            for text in ("target", "protected")
            for share in [_share(getattr(one.filtered[place], text), getattr(one.raw, text))]
            if one.layer is not None and share is not None
        ]
        return effects_by_layer(rows, width=width)

    def table(self, strength: float | None = None) -> Rows:
        """A row per layer, at a strength; the middle one if None."""
        place = self._place(strength)
        kept = f"kept at {self.strengths[place]:g}, %"
        return table_of(
            {
                "layer": "outside" if one.layer is None else str(one.layer),
                "separability": number(one.separability, ".2f"),
                "target / protected": number(one.raw.specificity, ".2f"),
                f"energy {kept}": percent(_share(one.filtered[place].energy, one.raw.energy)),
                f"target effect {kept}": percent(_share(one.filtered[place].target, one.raw.target)),
                f"protected effect {kept}": percent(_share(one.filtered[place].protected, one.raw.protected)),
            }
            for one in self.layers
        )


def _share(after: float, before: float) -> float | None:
    return after / before if before > 0 else None
