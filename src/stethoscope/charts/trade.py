"""The trade-off: what each arm gains on the target tasks against what it costs on control text."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from stethoscope.charts.style import COLOURS, axis, drawn, rule, tips, y

# What an arm's name begins with -> its colour and shape.
_ARMS = {
    "recommended": ("selected", "diamond"),
    "selected": ("selected", "triangle-up"),
    "tuned": ("tuned", "square"),
    "projected": ("projected", "triangle-down"),
    "random": ("other", "circle"),
}
_GAIN = "mean gain on the target tasks over the baseline, in {}"
_COST = "control loss, change in nats per token (right is worse)"

_FEW_RANDOM = 4  # more random sets than this are named as a group
_WIDTHS = (295, 640, 950)  # pixels at which labels should not cover each other
_HEIGHT = 360


def trade_off(rows: Sequence[Mapping[str, Any]], baseline: str, *, unit: str = "points", width: int) -> alt.LayerChart:
    """Target gain of each arm over the baseline against what it costs on control text; see `Comparison.plot`.

    Args:
        rows: by arm the gain in ``unit`` and the cost in nats per token, each with its interval; None is not known.
            Without any cost the gains alone are drawn.
    """
    looks = [next((v for k, v in _ARMS.items() if row["arm"].startswith(k)), ("edit", "triangle-up")) for row in rows]
    drawn_rows = [{**row, "colour": COLOURS[c], "shape": shape} for row, (c, shape) in zip(rows, looks, strict=True)]
    priced = [row for row in drawn_rows if row["cost"] is not None]
    return _plane(baseline, priced, unit, width) if priced else _gains(drawn_rows, unit, width)


def _plane(baseline: str, arms: Sequence[dict[str, Any]], unit: str, width: int) -> alt.LayerChart:
    here = {"arm": baseline, "gain": 0.0, "cost": 0.0, "colour": COLOURS["ink"], "shape": "circle"}
    rows = [here, *arms]
    domains = {name: _reach([row.get(f"{name}{end}") for row in rows for end in ("", "_low", "_high")])
               for name in ("gain", "cost")}  # fmt: skip
    _place_labels(rows, domains["cost"], domains["gain"])
    base = alt.Chart(alt.NamedData(name="arms")).encode(color=alt.Color("colour:N", scale=None))

    up = {"number": "+.3~f", "scale": alt.Scale(domain=domains["gain"], nice=False)}

    def x(field: str) -> alt.X:
        scale = alt.Scale(domain=domains["cost"], nice=False)
        return alt.X(f"{field}:Q", title=_COST, scale=scale, axis=axis("+.2~f"))

    at = {"x": x("cost"), "y": y("gain", **up)}
    whisker = base.mark_rule(strokeWidth=1.5, opacity=0.55)
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        **at, shape=alt.Shape("shape:N", scale=None), tooltip=_tips(unit)
    )
    beside = {name: alt.expr(f"datum.{name}") for name in ("align", "dx", "dy")}
    zero = rule("zero", 0.0, strokeDash=[2, 3])
    return drawn(
        zero.encode(x=x("zero")),
        zero.encode(y=y("zero", **up)),
        whisker.encode(x=at["x"], y=y("gain_low", **up), y2="gain_high:Q"),
        whisker.encode(x=x("cost_low"), x2="cost_high:Q", y=at["y"]),
        points,
        base.mark_text(**beside, baseline="middle", fontSize=12).encode(**at, text="label:N"),
        heading=_GAIN.format(unit),
        data={"arms": rows},
        width=width,
        height=_HEIGHT,
    )


def _gains(rows: Sequence[dict[str, Any]], unit: str, width: int) -> alt.LayerChart:
    base = alt.Chart(alt.NamedData(name="arms")).encode(
        y=alt.Y("arm:N", sort=None, title=None), color=alt.Color("colour:N", scale=None)
    )
    x = {"axis": axis("+.3~f"), "title": unit}
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=alt.X("gain:Q", **x), shape=alt.Shape("shape:N", scale=None), tooltip=_tips(unit)[:4]
    )
    return drawn(
        rule("zero", 0.0, "line").encode(x="zero:Q"),
        base.mark_rule(strokeWidth=1.5, opacity=0.55).encode(x=alt.X("gain_low:Q", **x), x2="gain_high:Q"),
        points,
        heading=_GAIN.format(unit),
        data={"arms": rows},
        width=width,
        height=36 * len(rows) + 20,
    )


def _place_labels(rows: list[dict[str, Any]], x_domain: Sequence[float], y_domain: Sequence[float]) -> None:
    """Give each row a label beside its mark, on the side and at the height where it covers least at all widths.

    A box hangs on a point: the point's share of the chart's width, then left, right, top and bottom in pixels.
    """
    Box = tuple[float, float, float, float, float]

    def clutter(box: Box, dy: int) -> float:
        share, left, right, top, bottom = box
        outside = 0
        met = 0
        for width in _WIDTHS:
            x = width * share
            outside += x + left < 0 or x + right > width or top < 0 or bottom > _HEIGHT
            for other in taken:
                apart = width * (other[0] - share)
                across = left < other[2] + apart and other[1] + apart < right
                met += across and top < other[4] and other[3] < bottom
        return met + 3 * outside + abs(dy) / 30

    shares = [(row["cost"] - x_domain[0]) / (x_domain[1] - x_domain[0]) for row in rows]
    heights = [_HEIGHT * (y_domain[1] - row["gain"]) / (y_domain[1] - y_domain[0]) for row in rows]
    taken: list[Box] = [(x, -6, 6, at - 6, at + 6) for x, at in zip(shares, heights, strict=True)]
    random = [row for row in rows if row["arm"].startswith("random_layers")]
    for row in rows:
        row.update(label=row["arm"], align="left", dx=0, dy=0)
    if len(random) > _FEW_RANDOM:
        for row in random:
            row["label"] = "random layer sets" if row is random[0] else ""
    for row, x, height in zip(rows, shares, heights, strict=True):
        if not row["label"]:
            continue
        length = 6.5 * len(row["label"]) + 6
        sides = {"left": (0.0, length), "right": (-length, 0.0)}
        places: list[tuple[int, str, Box]] = [
            (dy, side, (x, *sides[side], height + dy - 7, height + dy + 7))
            for dy in (-9, 9, -24, 24, -39, 39, -54, 54, -69, 69)
            for side in (("left", "right") if x < 0.5 else ("right", "left"))
        ]
        row["dy"], row["align"], box = min(places, key=lambda place: clutter(place[2], place[0]))
        row["dx"] = 6 if row["align"] == "left" else -6
        taken.append(box)


def _reach(values: Sequence[float | None]) -> list[float]:
    known = [0.0, *(v for v in values if v is not None)]
    low, high = min(known), max(known)
    margin = 0.08 * (high - low) or 1.0
    return [low - margin, high + margin]


def _tips(unit: str) -> list[alt.Tooltip]:
    form = "+.1f" if unit == "points" else "+.3~g"
    return tips(
        "arm:N",
        ("gain:Q", form, f"gain, {unit}"),
        ("gain_low:Q", form, "interval from"),
        ("gain_high:Q", form, "to"),
        ("cost:Q", "+.4f", "control loss, nats"),
        ("cost_low:Q", "+.4f", "interval from "),
        ("cost_high:Q", "+.4f", "to "),
    )
