"""The trade-off: what each arm gains on the target tasks against what it costs on control text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt

from stethoscope.report.look import COLOURS, axis, configured, title, y_axis
from stethoscope.results.comparison import Comparison, Contrast, is_random

_LOOKS = {
    "selected": ("selected", "diamond"),
    "tuned": ("tuned", "square"),
    "projected": ("projected", "triangle-down"),
    "random": ("other", "circle"),
}
_GAIN = "mean gain on the target tasks over the baseline, in points"
_COST = "control loss, change in nats per token (right is worse)"

_FEW_RANDOM = 4  # more random sets than this are named as a group
_CORNER = 0.3  # share of the picture's width that is too narrow to tell several arms apart
_WIDTHS = (295, 640, 950)  # pixels at which labels should not cover each other


def trade_off(comparison: Comparison, *, without: Sequence[str] = (), width: int = 640) -> alt.LayerChart:
    """Mean target gain of each arm over the baseline against what it costs on control text, with intervals.

    Without control losses the gains alone are drawn.

    Args:
        without: arms to leave out: ``tuned`` is often so far from the edits that they cannot be told apart.
        width: of the plotting area in pixels.
    """
    found = [c for arm in comparison.arms if arm not in without and (c := comparison.find(arm)) is not None]
    return _plane(comparison.baseline, found, width) if any(c.loss for c in found) else _gains(found, width)


def is_crowded(comparison: Comparison) -> bool:
    """Whether the edits lie in a corner of the picture because the whole fine-tune is far away."""
    contrasts = [c for arm in comparison.arms if (c := comparison.find(arm)) is not None]
    rows = [row for row in trade_off_rows(contrasts) if row["cost"] is not None]
    edits = [row for row in rows if row["arm"] != "tuned"]
    reach = [max((abs(row["cost"]) for row in some), default=0.0) for some in (edits, rows)]
    return len(edits) > 1 and reach[0] < _CORNER * reach[1]


def trade_off_rows(contrasts: Sequence[Contrast]) -> list[dict[str, Any]]:
    """What the trade-off draws: a row per arm, gains in points and costs in nats per token."""
    rows = []
    for contrast in contrasts:
        gain, cost = contrast.pooled, contrast.loss
        colour, shape = next((v for k, v in _LOOKS.items() if contrast.b.startswith(k)), ("edit", "triangle-up"))
        rows.append(
            {
                "arm": contrast.b,
                "gain": 100 * gain.difference,
                "gain_low": None if gain.low is None else 100 * gain.low,
                "gain_high": None if gain.high is None else 100 * gain.high,
                "cost": cost.difference if cost else None,
                "cost_low": cost.low if cost else None,
                "cost_high": cost.high if cost else None,
                "colour": COLOURS[colour],
                "shape": shape,
            }
        )
    return rows


def _plane(baseline: str, contrasts: Sequence[Contrast], width: int, height: int = 360) -> alt.LayerChart:
    here = {"arm": baseline, "gain": 0.0, "cost": 0.0, "colour": COLOURS["ink"], "shape": "circle"}
    rows = [here, *(row for row in trade_off_rows(contrasts) if row["cost"] is not None)]
    y_domain = _span([row.get(key) for row in rows for key in ("gain", "gain_low", "gain_high")])
    x_domain = _span([row.get(key) for row in rows for key in ("cost", "cost_low", "cost_high")])
    _place_labels(rows, x_domain, y_domain, height)
    base = alt.Chart(alt.NamedData(name="arms")).encode(color=alt.Color("colour:N", scale=None))

    def x(field: str) -> alt.X:
        return alt.X(field, title=_COST, scale=alt.Scale(domain=x_domain, nice=False), axis=axis("+.2~f"))

    def y(field: str) -> alt.Y:
        return alt.Y(field, title=None, scale=alt.Scale(domain=y_domain, nice=False), axis=y_axis("+.3~f"))

    at = {"x": x("cost:Q"), "y": y("gain:Q")}
    whisker = base.mark_rule(strokeWidth=1.5, opacity=0.55)
    whiskers = [
        whisker.encode(x=at["x"], y=y("gain_low:Q"), y2="gain_high:Q"),
        whisker.encode(x=x("cost_low:Q"), x2="cost_high:Q", y=at["y"]),
    ]
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        **at, shape=alt.Shape("shape:N", scale=None), tooltip=_arm_tooltip()
    )
    beside = {name: alt.expr(f"datum.{name}") for name in ("align", "dx", "dy")}
    labels = base.mark_text(**beside, baseline="middle", fontSize=12).encode(**at, text="label:N")
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=COLOURS["muted"], strokeDash=[2, 3])
    axes = [zero.encode(x=x("zero:Q")), zero.encode(y=y("zero:Q"))]
    chart = alt.layer(*axes, *whiskers, points, labels)
    return configured(chart.properties(width=width, height=height, title=title(_GAIN), datasets={"arms": rows}))


def _gains(contrasts: Sequence[Contrast], width: int) -> alt.LayerChart:
    rows = trade_off_rows(contrasts)
    base = alt.Chart(alt.NamedData(name="arms")).encode(
        y=alt.Y("arm:N", sort=None, title=None), color=alt.Color("colour:N", scale=None)
    )
    x = {"axis": axis("+.3~f"), "title": "points"}
    chart = alt.layer(
        alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=COLOURS["line"]).encode(x="zero:Q"),
        base.mark_rule(strokeWidth=1.5, opacity=0.55).encode(x=alt.X("gain_low:Q", **x), x2="gain_high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            x=alt.X("gain:Q", **x), shape=alt.Shape("shape:N", scale=None), tooltip=_arm_tooltip()[:4]
        ),
    )
    return configured(
        chart.properties(width=width, height=36 * len(rows) + 20, title=title(_GAIN), datasets={"arms": rows})
    )


class _Box(NamedTuple):
    """A rectangle that hangs on a point: the point's share of the picture's width, and pixels from there."""

    share: float
    left: float
    right: float
    top: float
    bottom: float

    def covers(self, other: "_Box", width: int) -> bool:
        """Whether two boxes meet in a picture of some width."""
        apart = width * (other.share - self.share)
        across = self.left < other.right + apart and other.left + apart < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def leaves(self, width: int, height: int) -> bool:
        """Whether the box is not all in the picture."""
        x = width * self.share
        return x + self.left < 0 or x + self.right > width or self.top < 0 or self.bottom > height


def _place_labels(
    rows: list[dict[str, Any]], x_domain: Sequence[float], y_domain: Sequence[float], height: int
) -> None:
    """Give each row a label beside its mark, on the side and at the height where it covers least at all widths."""
    crowded = sum(is_random(row["arm"]) for row in rows) > _FEW_RANDOM
    shares = [(row["cost"] - x_domain[0]) / (x_domain[1] - x_domain[0]) for row in rows]
    heights = [height * (y_domain[1] - row["gain"]) / (y_domain[1] - y_domain[0]) for row in rows]
    taken = [_Box(x, -6, 6, y - 6, y + 6) for x, y in zip(shares, heights, strict=True)]

    def clutter(place: tuple[int, str, _Box]) -> float:
        dy, _, box = place
        met = sum(box.covers(other, width) for other in taken for width in _WIDTHS)
        return met + 3 * sum(box.leaves(width, height) for width in _WIDTHS) + abs(dy) / 30

    named = False
    for row, x, y in zip(rows, shares, heights, strict=True):
        row.update(label=row["arm"], align="left", dx=0, dy=0)
        if crowded and is_random(row["arm"]):
            row["label"] = "" if named else "random layer sets"
            named = True
        length = 6.5 * len(row["label"]) + 6
        sides = {"left": (0.0, length), "right": (-length, 0.0)}
        places = [
            (dy, side, _Box(x, *sides[side], y + dy - 7, y + dy + 7))
            for dy in (-9, 9, -24, 24, -39, 39, -54, 54, -69, 69)
            for side in (("left", "right") if x < 0.5 else ("right", "left"))
        ]
        if row["label"]:
            row["dy"], row["align"], box = min(places, key=clutter)
            row["dx"] = 6 if row["align"] == "left" else -6
            taken.append(box)


def _span(values: Sequence[float | None]) -> list[float]:
    known = [0.0, *(v for v in values if v is not None)]
    low, high = min(known), max(known)
    margin = 0.08 * (high - low) or 1.0
    return [low - margin, high + margin]


def _arm_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("arm:N"),
        alt.Tooltip("gain:Q", format="+.1f", title="gain, points"),
        alt.Tooltip("gain_low:Q", format="+.1f", title="interval from"),
        alt.Tooltip("gain_high:Q", format="+.1f", title="to"),
        alt.Tooltip("cost:Q", format="+.4f", title="control loss, nats"),
        alt.Tooltip("cost_low:Q", format="+.4f", title="interval from "),
        alt.Tooltip("cost_high:Q", format="+.4f", title="to "),
    ]
