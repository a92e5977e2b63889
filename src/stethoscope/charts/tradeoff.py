"""The trade-off of every method as a curve."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from stethoscope.charts.style import COLOURS, axis, drawn, rule, tips, y

# What a method's name begins with -> its colour; the others differ in shape.
_COLOURS = {"filter": "edit", "raw": "selected", "scaled": "tuned", "SAE": "projected"}
_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")


def tradeoff_curves(rows: Sequence[Mapping[str, Any]], text: str, *, width: int) -> alt.LayerChart | None:
    """The share of the gain kept against damage on a text, a line per method; None without a gain, see `TradeOff`."""
    chosen = [
        {**row, "order": n, "kept": 100 * row["kept_value"]}
        for n, row in enumerate(rows)
        if row["text"] == text and row["kept_value"] is not None
    ]
    names = list(dict.fromkeys(row["method"] for row in chosen))
    if not names:
        return None
    colours = [COLOURS[next((c for k, c in _COLOURS.items() if name.startswith(k)), "other")] for name in names]
    shapes = [_SHAPES[n % len(_SHAPES)] for n in range(len(names))]
    legend = {"sort": None, "legend": alt.Legend(orient="top", title=None, columns=2, symbolOpacity=1)}
    x = alt.X(
        "damage_value:Q",
        title=f"loss on {text}, change in nats per token (right is worse)",
        scale=alt.Scale(type="symlog", constant=0.01),
        axis=axis("+~g", values=[-1, -0.1, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3]),
    )
    base = alt.Chart(alt.NamedData(name="points")).encode(
        x=x,
        y=y("kept", "d"),
        color=alt.Color("method:N", scale=alt.Scale(domain=names, range=colours), **legend),
        strokeWidth=alt.condition("datum.method === 'filter'", alt.value(3), alt.value(1.25)),
    )
    shape = alt.Shape("method:N", scale=alt.Scale(domain=names, range=shapes), **legend)
    shown = tips("method:N", "parameter:N", "value:Q", ("kept:Q", ".1f", "kept, %"), ("damage_value:Q", "+.4f"))
    return drawn(
        rule("zero", 0.0, strokeDash=[2, 3]).encode(x=alt.X("zero:Q")),
        base.mark_line().encode(order="order:Q"),
        base.mark_point(filled=True, size=45, opacity=1).encode(shape=shape, tooltip=shown),
        heading="share of the fine-tune's gain that is kept, %",
        data={"points": chosen},
        width=width,
        height=360,
    )
