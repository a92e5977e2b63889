"""The trade-off of every method as a curve."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from stethoscope.charts.style import COLOURS, axis, drawn, rule, tips, y

# What a method's name begins with -> its colour; the others differ in shape.
_COLOURS = {"filter": "edit", "raw": "selected", "scaled": "tuned", "SAE": "projected"}
_KEPT = "share of the fine-tune's gain that is kept, %"
OTHERS = "other edits"  # of no curve
_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")


def tradeoff_curves(rows: Sequence[Mapping[str, Any]], text: str, *, width: int) -> alt.LayerChart | None:
    """The share of the gain kept against damage on a text, a line per method; None without a gain, see `TradeOff`."""
    chosen = [
        {**row, "kept": 100 * row["kept_value"]}
        for row in rows
        if row["text"] == text and row["kept_value"] is not None
    ]
    return _curves(chosen, {}, f"loss on {text}", _KEPT, width) if chosen else None


def calibration_curves(
    rows: Sequence[Mapping[str, Any]], marks: Mapping[int, str], *, share: bool, width: int
) -> alt.LayerChart:
    """The same of a calibration's edits, some of them marked by number, see `Calibration.plot`."""
    heading = _KEPT if share else "fall of target loss, in nats per token"
    return _curves(rows, marks, "loss on the protected text that suffers most", heading, width)


def _curves(
    rows: Sequence[Mapping[str, Any]], marks: Mapping[int, str], cost: str, heading: str, width: int
) -> alt.LayerChart:
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = [COLOURS[next((c for k, c in _COLOURS.items() if name.startswith(k)), "other")] for name in names]
    shapes = [_SHAPES[n % len(_SHAPES)] for n in range(len(names))]
    legend = {"sort": None, "legend": alt.Legend(orient="top", title=None, columns=2, symbolOpacity=1)}
    x = alt.X(
        "damage_value:Q",
        title=f"{cost}, change in nats per token (right is worse)",
        scale=alt.Scale(type="symlog", constant=0.01),
        axis=axis("+~g", values=[-1, -0.1, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3]),
    )
    base = alt.Chart(alt.NamedData(name="points")).encode(
        x=x,
        y=y("kept", ".3~g"),
        color=alt.Color("method:N", scale=alt.Scale(domain=names, range=colours), **legend),
        strokeWidth=alt.condition("datum.method === 'filter'", alt.value(3), alt.value(1.25)),
    )
    shape = alt.Shape("method:N", scale=alt.Scale(domain=names, range=shapes), **legend)
    shown = tips("method:N", "parameter:N", "value:Q", ("kept:Q", ".3~f"), ("damage_value:Q", "+.4f"))
    marked = {row["n"]: {**row, "mark": marks[row["n"]]} for row in rows if row.get("n") in marks}
    mark = alt.Chart(alt.NamedData(name="marks")).encode(x=x, y=y("kept", ".3~g"))
    return drawn(
        rule("zero", 0.0, strokeDash=[2, 3]).encode(x=alt.X("zero:Q")),
        base.transform_filter(f"datum.method !== '{OTHERS}'").mark_line().encode(order="order:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(shape=shape, tooltip=shown),
        mark.mark_point(size=200, strokeWidth=2, opacity=1, color=COLOURS["ink"]),
        mark.mark_text(align="left", dx=11, dy=4, fontSize=12, color=COLOURS["ink"]).encode(text="mark:N"),
        heading=heading,
        data={"points": [{"order": n, **row} for n, row in enumerate(rows)], "marks": [*marked.values()]},
        width=width,
        height=360,
    )
