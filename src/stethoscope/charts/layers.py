"""Charts with a place per layer: the scores with the SAEs' health, and the energy that features keep."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from stethoscope.charts.style import COLOURS, axis, configured, drawn, kinds, rule, tips, title, when, y

KEPT = "energy of the layer's change that is kept, %"
# What a layer is -> its colour and shape.
_LAYERS = {
    "selected": ("selected", "diamond"),
    "not selected": ("other", "circle"),
    "excluded": ("tuned", "cross"),
}

Rows = Sequence[Mapping[str, Any]]


def layer_profile(rows: Rows, corpora: Sequence[str], score: str, *, width: int) -> alt.VConcatChart:
    """Excess over chance per layer, coloured by ``kind``, and the SAEs' health below; see `Diagnosis.plot`.

    The parameter ``picked`` is the layer to highlight; -1 is none.
    """
    numbers = [row["layer"] for row in rows]
    scale = alt.Scale(domain=[min(numbers) - 0.5, max(numbers) + 0.5], nice=False, zero=False)

    def columns(name: str | None = None) -> tuple[alt.Chart, alt.Chart]:
        """Charts with a place on x per layer: its middle, and its whole width."""
        base, x = alt.Chart(alt.NamedData(name="layers")), {"title": name, "scale": scale}
        x["axis"] = alt.Axis(format="d", tickMinStep=1, grid=False)
        return base.encode(x=alt.X("layer:Q", **x)), base.encode(x=alt.X("left:Q", **x), x2="right:Q")

    def across(at: float) -> alt.Chart:
        return rule("at", at).encode(y=alt.Y("at:Q", title=None))

    def health(field: str, name: str | None, scale: alt.Scale, at: float | None = None) -> alt.LayerChart:
        base, column = columns(name)
        layers = [] if at is None else [across(at)]
        for i, corpus in enumerate(corpora):
            if any(row[f"{field}_{i}"] is not None for row in rows):
                dash = [1, 0] if corpus == "target" else [4, 3]
                dots = {"color": COLOURS["ink"], "size": 14}
                line = base.mark_line(color=COLOURS["ink"], strokeWidth=1.5, strokeDash=dash, point=dots)
                layers.append(line.encode(y=y(f"{field}_{i}", "~s", 3, scale=scale)))
        return alt.layer(*layers, _hits(column, corpora)).properties(height=80)

    base, column = columns()
    kind, shape = kinds(_LAYERS, legend=alt.Legend(orient="top", title=None, symbolOpacity=1))
    # The stroke closes the seams between neighbours.
    band = column.mark_rect(color=COLOURS["null"], stroke=COLOURS["null"], strokeWidth=1, aria=False)
    point = base.mark_point(filled=True, size=55, opacity=1)
    excess = alt.layer(
        band.encode(y=y("null_low", "+.2~f"), y2="null_high:Q"),
        across(0.0),
        base.mark_rule(strokeWidth=1.5).encode(y=y("low", "+.2~f"), y2="high:Q", color=kind),
        point.encode(y=y("excess", "+.2~f"), color=kind, shape=shape),
        _hits(column, corpora),
    )
    charts = {
        f"{score}: excess over chance": excess.properties(height=220),
        "SAE variance explained: target solid, control dashed": health(
            "explained", None, alt.Scale(domain=[0.0, 1.0], clamp=True), 0.5
        ),
        "SAE features active per token (L0): target solid, control dashed": health("l0", "layer", alt.Scale(zero=True)),
    }
    parts = [chart.properties(width=width, title=title(heading)) for heading, chart in charts.items()]
    stacked = alt.vconcat(*parts, spacing=16).resolve_scale(color="independent", shape="independent")
    picked = alt.param(name="picked", value=-1)
    return configured(stacked.add_params(picked).properties(datasets={"layers": rows}))


def _hits(column: alt.Chart, corpora: Sequence[str]) -> alt.Chart:
    """A whole column per layer to point at and click, tinted where it is the picked one."""
    against: list[tuple[str, str, str]] = [("against:N", "", "against")] if len(corpora) > 2 else []
    return column.mark_rect(color=COLOURS["selected"], cursor="pointer").encode(
        y=alt.value(0),
        y2=alt.value("height"),
        opacity=alt.condition("datum.layer === picked", alt.value(0.14), alt.value(0)),
        tooltip=tips(
            "layer:Q",
            ("kind:N", "", "kind"),
            ("excess:Q", "+.3f", "excess over chance"),
            ("low:Q", "+.3f", "95 % from"),
            ("high:Q", "+.3f", "to"),
            ("z:Q", ".1f"),
            ("p_familywise:Q", ".3f", "p, all layers"),
            *against,
            *((f"explained_{i}:Q", ".2f", f"variance explained, {name}") for i, name in enumerate(corpora)),
            *((f"l0_{i}:Q", ".0f", f"L0, {name}") for i, name in enumerate(corpora)),
        ),
    )


def energy_by_layer(rows: Rows, *, width: int) -> alt.LayerChart:
    """The share of each layer's change that its features keep, beside what random ones do; see `Geometry.plot`."""
    base = alt.Chart(alt.NamedData(name="layers")).encode(x=layer_axis())
    dots = base.mark_point(filled=True, opacity=1).encode(
        y=y("kept", ".3~f"),
        color=when("selected", COLOURS["selected"], COLOURS["other"]),
        shape=when("selected", "diamond", "circle"),
        size=when("selected", 110, 55),
        tooltip=tips(
            "layer:Q",
            ("kept:Q", ".1f", "kept, %"),
            ("chance:Q", ".1f", "chance, %"),
            ("low:Q", ".1f", "random features from"),
            ("high:Q", ".1f", "to"),
        ),
    )
    return drawn(
        base.mark_area(color=COLOURS["null"]).encode(y=y("low", ".3~f"), y2="high:Q"),
        base.mark_line(color=COLOURS["muted"], strokeDash=[4, 3], strokeWidth=1.5).encode(y=y("chance", ".3~f")),
        dots,
        heading=KEPT,
        data={"layers": rows},
        width=width,
        height=220,
    )


def effects_by_layer(rows: Rows, *, width: int) -> alt.LayerChart:
    """The shares of each layer's effect on target and protected text that the filter keeps; see `Filtering.plot`."""
    looks = {"target": ("selected", "diamond"), "protected": ("tuned", "cross")}
    kind, shape = kinds(looks, legend=alt.Legend(orient="top", title=None, symbolOpacity=1))
    dots = alt.Chart(alt.NamedData(name="effects")).mark_point(filled=True, opacity=1, size=55)
    tooltip = tips("layer:Q", ("kind:N", "", "text"), ("kept:Q", ".1f", "kept, %"))
    return drawn(
        rule("at", 100.0).encode(y=alt.Y("at:Q", title=None)),
        dots.encode(x=layer_axis(), y=y("kept", ".3~f"), color=kind, shape=shape, tooltip=tooltip),
        heading="mean squared effect of the layer's change that is kept, %",
        data={"effects": rows},
        width=width,
        height=220,
    )


def layer_axis() -> alt.X:
    """Layers on the x axis."""
    return alt.X("layer:Q", title="layer", axis=axis("d"), scale=alt.Scale(nice=False, padding=12))
