"""How charts look: colours, type, axes.

Every colour is one of ``COLOURS`` and occurs as it stands in the SVG: the page's style sheet swaps them for those of
``DARK`` on dark screens by value, so that no script is needed to print a page light.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

# On light and on dark screens. Okabe and Ito's palette, told apart by the colour-blind; kinds also differ in shape.
_PALETTE = {
    "ink": ("#1b1c1e", "#e8eaed"),
    "muted": ("#5f6368", "#a4a9b0"),
    "line": ("#d7d9dc", "#3c4046"),
    "paper": ("#ffffff", "#16181b"),
    "null": ("#e3e5e8", "#2b2f35"),
    "selected": ("#0072b2", "#56b4e9"),
    "other": ("#6b7077", "#9aa0a8"),
    "tuned": ("#d55e00", "#f0894a"),
    "projected": ("#b04a86", "#e39ac6"),
    "edit": ("#007a5a", "#4cc2a0"),
}
COLOURS = {name: light for name, (light, _) in _PALETTE.items()}
DARK = {name: dark for name, (_, dark) in _PALETTE.items()}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def axis(number: str, ticks: int = 6, **options: Any) -> alt.Axis:
    """An axis of numbers in a d3 format, without a sign on zero."""
    return alt.Axis(labelExpr="datum.value === 0 ? '0' : datum.label", format=number, tickCount=ticks, **options)


def y(field: str, number: str, ticks: int = 6, **options: Any) -> alt.Y:
    """A quantity on a y axis of a fixed width, so that charts are flush; the line above the chart explains it."""
    return alt.Y(f"{field}:Q", title=None, axis=axis(number, ticks, minExtent=38, maxExtent=38), **options)


def tips(*fields: str | tuple[str, str] | tuple[str, str, str]) -> list[alt.Tooltip]:
    """Tooltips of fields such as ``arm:N``, each with its format and its title where it has one."""
    parts = [(field, "") if isinstance(field, str) else field for field in fields]
    return [
        alt.Tooltip(name, format=number or alt.Undefined, title=title[0] if title else alt.Undefined)
        for name, number, *title in parts
    ]


def rule(field: str, at: float, colour: str = "muted", **options: Any) -> alt.Chart:
    """A line across a chart, for its ``x`` or ``y`` to be given in ``field``."""
    return alt.Chart(alt.Data(values=[{field: at}])).mark_rule(color=COLOURS[colour], **options)


def when(field: str, value: Any, otherwise: Any) -> Any:
    """One value where a row's ``field`` is true, and another elsewhere."""
    return alt.condition(f"datum.{field}", alt.value(value), alt.value(otherwise))


def kinds(looks: Mapping[str, tuple[str, str]], **options: Any) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape by a row's ``kind``, of which ``looks`` has them by name."""
    colours, shapes = zip(*looks.values(), strict=True)
    colour = alt.Scale(domain=list(looks), range=[COLOURS[name] for name in colours])
    return alt.Color("kind:N", scale=colour, **options), alt.Shape(
        "kind:N", scale=alt.Scale(domain=list(looks), range=list(shapes))
    )


def title(text: str) -> alt.TitleParams:
    """A quiet line above a chart, which says what its y axis is."""
    return alt.TitleParams(text, anchor="start", frame="bounds", fontSize=12, fontWeight="normal", offset=8)


def drawn(
    *layers: alt.Chart, heading: str, data: Mapping[str, Sequence[Mapping[str, Any]]], width: int = 640, height: int
) -> alt.LayerChart:
    """Layers as one finished chart, ``width`` and ``height`` of its plotting area in pixels."""
    chart = alt.layer(*layers).properties(width=width, height=height, title=title(heading), datasets=data)
    return configured(chart)


def configured(chart: Any) -> Any:
    """A finished chart with the report's type and colours."""
    return chart.configure(  # at once: each call copies the chart with its data
        background=COLOURS["paper"],
        font=FONT,
        padding=4,
        view=alt.ViewConfig(stroke=None),
        title=alt.TitleConfig(color=COLOURS["ink"]),
        legend=alt.LegendConfig(labelColor=COLOURS["ink"], labelFontSize=12, padding=0, offset=6),
        axis=alt.AxisConfig(
            labelColor=COLOURS["muted"],
            titleColor=COLOURS["muted"],
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=11,
            domainColor=COLOURS["line"],
            tickColor=COLOURS["line"],
            gridColor=COLOURS["line"],
            gridOpacity=0.5,
        ),
    )
