"""How the report's pictures look: colours, type, axes.

Every colour is one of ``COLOURS`` and occurs as it stands in the SVG: the page's style sheet swaps them for dark
screens by value, so that no script is needed to print a page light.
"""

from typing import Any

import altair as alt

# Okabe and Ito's palette, told apart by the colour-blind; kinds also differ in shape.
COLOURS = {
    "ink": "#1b1c1e",
    "muted": "#5f6368",
    "line": "#d7d9dc",
    "paper": "#ffffff",
    "null": "#e3e5e8",
    "selected": "#0072b2",
    "other": "#6b7077",
    "tuned": "#d55e00",
    "projected": "#b04a86",
    "edit": "#007a5a",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
_ZERO = "datum.value === 0 ? '0' : datum.label"  # no sign on zero


def axis(number: str, ticks: int = 6, **options: Any) -> alt.Axis:
    """An axis of numbers in a d3 format."""
    return alt.Axis(labelExpr=_ZERO, format=number, tickCount=ticks, **options)


def y_axis(number: str, ticks: int = 6) -> alt.Axis:
    """The same, of a fixed width, so that pictures above each other are flush."""
    return axis(number, ticks, minExtent=38, maxExtent=38)


def title(text: str) -> alt.TitleParams:
    """A quiet line above a picture, which says what its y axis is."""
    return alt.TitleParams(text, anchor="start", frame="bounds", fontSize=12, fontWeight="normal", offset=8)


def configured(chart: Any) -> Any:
    """A finished chart with the report's type and colours."""
    return (
        chart.configure(background=COLOURS["paper"], font=FONT, padding=4)
        .configure_view(stroke=None)
        .configure_title(color=COLOURS["ink"])
        .configure_legend(labelColor=COLOURS["ink"], labelFontSize=12, padding=0, offset=6)
        .configure_axis(
            labelColor=COLOURS["muted"],
            titleColor=COLOURS["muted"],
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=11,
            domainColor=COLOURS["line"],
            tickColor=COLOURS["line"],
            gridColor=COLOURS["line"],
            gridOpacity=0.5,
        )
    )
