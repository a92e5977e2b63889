"""Target gain against damage on protected text, of every way to edit, over its one parameter."""

from typing import Any, ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import Display, Rows, table_of
from stethoscope.results.keeping import Measured

TARGET, FILTER = "target", "filter"
SHARE, BUDGET = 0.95, 0.01  # of the gain to keep; nats per token of damage to allow


class Figure(Measured):
    """A figure of a whole curve, and why it has no value; an end of its interval is None where resamples have none."""

    reason: str = ""


class Point(Frozen):
    """One edit, in nats per token against the base.

    Attributes:
        value: of the method's parameter.
        kept: the fall of target loss as a share of the whole fine-tune's.
        damage: protected text -> by how much its loss rises.
    """

    value: float
    kept: Measured
    damage: dict[str, Measured]


class Curve(Frozen):
    """One method, from the most change to the least.

    Attributes:
        damage: protected text -> the least damage with `SHARE` of the gain kept.
        kept: protected text -> the largest share kept with at most `BUDGET` of damage.
    """

    parameter: str
    points: tuple[Point, ...]
    damage: dict[str, Figure]
    kept: dict[str, Figure]


class TradeOff(Display, Artifact):
    """Every method's curve, the filter's among them, on documents that no edit was made from.

    Attributes:
        gain: by how much the whole fine-tune lowers target loss, in nats per token.
        documents: of the target and every protected text.
    """

    FILE: ClassVar[str] = "tradeoff.json"

    gain: Measured
    documents: dict[str, int]
    methods: dict[str, Curve]

    @property
    def protected(self) -> list[str]:
        """Names of the protected texts."""
        return [text for text in self.documents if text != TARGET]

    @property
    def verdict(self) -> str:
        """The filter's damage with `SHARE` of the gain kept, beside the best rival's."""
        if self.gain.low is None or self.gain.low <= 0:
            return "No evidence that the fine-tune is better on the target text, so there is nothing to keep."
        said = []
        for text in self.protected:
            damage = {name: curve.damage[text] for name, curve in self.methods.items()}
            others = {n: d.value for n, d in damage.items() if not n.startswith(FILTER) and d.value is not None}
            said.append(f"{damage[FILTER].shown('+.3f')} on {text}")
            if best := min(others, key=lambda name: others[name], default=None):
                said[-1] += f" and `{best}`, the best rival, by {damage[best].shown('+.3f')}"
        return f"With {100 * SHARE:g} % of the fine-tune's gain kept, the filter changes the loss by {'; '.join(said)}."

    def table(self) -> Rows:
        """A row per method: its two figures for each protected text."""
        return table_of(
            {"method": name}
            | {f"damage on {t} at {100 * SHARE:g} % kept": curve.damage[t].shown("+.3f") for t in self.protected}
            | {f"kept, %, at {BUDGET:g} on {t}": curve.kept[t].shown(".0f", 100) for t in self.protected}
            for name, curve in self.methods.items()
        )

    def to_frame(self) -> Any:
        """A pandas frame: a row per method, value and protected text."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """The same as plain values, None where something is not defined."""
        return [
            {"method": name, "parameter": curve.parameter, "value": point.value, "text": text}
            | {f"kept_{end}": value for end, value in point.kept.model_dump().items()}
            | {f"damage_{end}": value for end, value in point.damage[text].model_dump().items()}
            for name, curve in self.methods.items()
            for point in curve.points
            for text in self.protected
        ]

    def plot(self, text: str | None = None, *, width: int = 640) -> Any:
        """Gain kept against damage on one protected text, the first if None: an Altair chart; None without a gain."""
        from stethoscope.charts.tradeoff import tradeoff_curves

        return tradeoff_curves(self.rows(), text or self.protected[0], width=width)
