"""Every edit that `calibrate` tried, and the one it chose."""

from collections.abc import Mapping
from typing import Any, ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import NONE, Display, Rows, number, percent, ranged, table_of


class CalibrationPoint(Frozen):
    """One edit and its true effect on calibration text, in nats per token against the base.

    Attributes:
        coefficients: layer -> coefficient; empty is the base itself.
        strength: of the filter before them; None is the raw change.
        threshold: the least z among its layers.
        target_gain: by how much the target loss falls; errors are standard errors, paired over documents.
        control_cost: by how much the control loss rises; ``control_increase`` is that as a share of the base's. Of
            several texts, that which suffers most; ``damage`` has the cost on each.
        on_front: no other point gains as much for less, or more for as little.
    """

    coefficients: dict[int, float]
    strength: float | None
    threshold: float | None
    damage: dict[str, float]
    target_gain: float
    target_error: float
    control_cost: float
    control_error: float
    control_increase: float
    on_front: bool

    @property
    def layers(self) -> str:
        """Layers by coefficient, such as ``3, 8 at 1, filtered at strength 3``."""
        layers: dict[float, list[int]] = {}
        for layer, amount in self.coefficients.items():
            layers.setdefault(amount, []).append(layer)
        filtered = "" if self.strength is None else f", filtered at strength {self.strength:g}"
        return "; ".join(f"{ranged(some)} at {amount:g}" for amount, some in layers.items()) + filtered or "none"


class Calibration(Display, Artifact):
    """Every edit that was tried, and the one to make.

    Attributes:
        z: each layer's score relative to its null, as it was given.
        budget: the share, or nats, by which control loss may rise, see ``rule``; None weighs a nat against a nat.
        base_loss: nats per token of each corpus.
        best: the point of best trade-off; ``choice`` is the one to make, see ``rule``.
        forwards: of the whole calibration text, that were spent.
        seen: corpus -> hash of its documents, which no claim may be tested on.
    """

    FILE: ClassVar[str] = "calibration.json"

    z: dict[int, float]
    budget: float | None
    base_loss: dict[str, float]
    points: tuple[CalibrationPoint, ...]
    best: int
    choice: int
    rule: str
    reason: str
    forwards: float
    seen: dict[str, str]

    @property
    def edit(self) -> CalibrationPoint | None:
        """The chosen edit; None where nothing is worth its cost."""
        return self.points[self.choice] if self.coefficients else None

    @property
    def coefficients(self) -> dict[int, float]:
        """Layer -> coefficient of the chosen edit; empty where no gain outweighs its cost."""
        return self.points[self.choice].coefficients

    @property
    def verdict(self) -> str:
        """Why the choice was made, and by which rule."""
        return f"{self.reason}. Rule: {self.rule}."

    @property
    def whole(self) -> CalibrationPoint | None:
        """The whole fine-tune, if it was tried and gains something: the gain that others keep a share of."""
        every = dict.fromkeys(self.z, 1.0)
        return next((p for p in self.points if p.coefficients == every and not p.strength and p.target_gain > 0), None)

    def plot(self, selected: Mapping[int, float] | None = None, *, width: int = 640) -> Any:
        """Gain against damage of every edit tried, a curve per method, as an Altair chart; the choice is marked.

        Args:
            selected: coefficients of another edit to mark, if it was tried.
            width: of the plotting area in pixels.
        """
        from stethoscope.charts.tradeoff import calibration_curves

        points = enumerate(self.points)
        marks = {n: "selected" for n, p in points if p.coefficients == selected and p.strength is None}
        if self.edit:
            marks[self.choice] = "recommended"
        return calibration_curves(self.rows(), marks, share=bool(self.whole), width=width)

    def rows(self) -> list[dict[str, Any]]:
        """The points by method, from the most change to the least; base and whole change belong to several methods."""
        scale = 100 / self.whole.target_gain if self.whole else 1.0
        order = sorted(self.z, key=lambda layer: (-self.z[layer], layer))
        rows = []
        for n, point in enumerate(self.points):
            k, amounts = len(point.coefficients), {*point.coefficients.values()}
            every, raw = k == len(order), point.strength is None
            methods: dict[str, tuple[str, float]] = {}
            if every and amounts == {1.0}:
                methods["filter"] = ("strength", point.strength or 0.0)
            if raw and (every or not k) and len(amounts) <= 1:
                methods["scaled"] = ("coefficient", max(amounts, default=0.0))
            if raw and amounts <= {1.0} and point.coefficients.keys() == {*order[:k]}:
                methods["raw, best layers"] = ("layers", float(k))
            figures = {"n": n, "kept": scale * point.target_gain, "damage_value": point.control_cost}
            rows += [
                {"method": method, "parameter": parameter, "value": value, **figures}
                for method, (parameter, value) in (methods or {"other edits": ("layers", float(k))}).items()
            ]
        most_first = {"strength": 1, "coefficient": -1, "layers": -1}
        return sorted(rows, key=lambda row: (row["method"], most_first[row["parameter"]] * row["value"]))

    def table(self) -> Rows:
        """A row per edit on the front, and the chosen one, by rising cost; gain and cost with their standard errors."""
        shown = [point for n, point in enumerate(self.points) if point.on_front or n == self.choice]
        return table_of(
            {
                "edit": point.layers,
                "number": str(len(point.coefficients)),
                "z at least": number(point.threshold, ".1f"),
                "target gain": f"{point.target_gain:+.4f} ± {point.target_error:.4f}",
                "control cost": f"{point.control_cost:+.4f} ± {point.control_error:.4f}",
                "control, %": percent(point.control_increase, "+.2f"),
                "chosen": "yes" if point == self.points[self.choice] else NONE,
            }
            for point in sorted(shown, key=lambda point: point.control_cost)
        )
