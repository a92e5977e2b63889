"""The layer profile: what each layer hears, and whether to believe it."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from stethoscope.report.look import COLOURS, configured, title, y_axis
from stethoscope.results.diagnosis import Diagnosis, LayerDiagnosis
from stethoscope.results.selection import Selection

KINDS = {"selected": "diamond", "not selected": "circle", "not believed": "cross"}


def layer_profile(diagnosis: Diagnosis, selection: Selection | None = None, *, width: int = 640) -> alt.VConcatChart:
    """Excess over chance per layer, with the selected layers marked and the SAEs' health below.

    The parameter ``picked`` is the layer to highlight; -1 is none.

    Args:
        selection: its layers are marked.
        width: of the plotting area in pixels.
    """
    rows = profile_rows(diagnosis, selection)
    numbers = [row["layer"] for row in rows]
    scale = alt.Scale(domain=[min(numbers) - 0.5, max(numbers) + 0.5], nice=False, zero=False)
    base, column = _columns(scale)
    kind = {
        "color": alt.Color(
            "kind:N",
            scale=alt.Scale(domain=list(KINDS), range=[COLOURS[c] for c in ("selected", "other", "tuned")]),
            legend=alt.Legend(orient="top", title=None, symbolOpacity=1),
        ),
        "shape": alt.Shape("kind:N", scale=alt.Scale(domain=list(KINDS), range=list(KINDS.values()))),
    }
    # The stroke closes the seams between neighbours.
    band = column.mark_rect(color=COLOURS["null"], stroke=COLOURS["null"], strokeWidth=1, aria=False).encode(
        y=_y("null_low:Q", "+.2~f"), y2="null_high:Q"
    )
    interval = base.mark_rule(strokeWidth=1.5).encode(y=_y("low:Q", "+.2~f"), y2="high:Q", color=kind["color"])
    point = base.mark_point(filled=True, size=55, opacity=1).encode(y=_y("excess:Q", "+.2~f"), **kind)
    score = alt.layer(band, _rule(0.0), interval, point, _hits(column, list(diagnosis.corpora))).properties(
        height=220, title=title(f"{diagnosis.score}: excess over chance")
    )
    corpora = list(diagnosis.corpora)
    explained = _health(rows, _columns(scale), "explained", corpora, domain=[0.0, 1.0], rule=0.5)
    active = _health(rows, _columns(scale, name="layer"), "l0", corpora)
    charts = [
        score,
        explained.properties(title=title("SAE variance explained: target solid, control dashed")),
        active.properties(title=title("SAE features active per token (L0): target solid, control dashed")),
    ]
    stacked = alt.vconcat(*(chart.properties(width=width) for chart in charts), spacing=16)
    stacked = stacked.resolve_scale(color="independent", shape="independent")
    picked = alt.param(name="picked", value=-1)
    return configured(stacked.add_params(picked).properties(datasets={"layers": rows}))


def profile_rows(diagnosis: Diagnosis, selection: Selection | None) -> list[dict[str, Any]]:
    """What the layer profile draws: a row per layer."""
    chosen = set(selection.layers if selection else ())

    def kind(layer: LayerDiagnosis) -> str:
        if layer.layer in chosen:
            return "selected"
        return "not selected" if layer.flag is None else "not believed"

    return [
        {
            "layer": layer.layer,
            "left": layer.layer - 0.5,
            "right": layer.layer + 0.5,
            "kind": kind(layer),
            "excess": layer.excess,
            "low": layer.interval[0],
            "high": layer.interval[1],
            "null_low": -2 * layer.null_deviation,
            "null_high": 2 * layer.null_deviation,
            "z": layer.z,
            "p_familywise": layer.p_familywise,
            "against": layer.against,
            # by number: in a field's name, dots and brackets of a corpus' name would mean something to Vega
            **{f"explained_{i}": _value(layer, name, "variance_explained") for i, name in enumerate(diagnosis.corpora)},
            **{f"l0_{i}": _value(layer, name, "l0") for i, name in enumerate(diagnosis.corpora)},
        }
        for layer in diagnosis.layers
    ]


def _value(layer: LayerDiagnosis, corpus: str, field: str) -> float | None:
    return getattr(layer.health[corpus], field) if corpus in layer.health else None


def _columns(scale: alt.Scale, *, name: str | None = None) -> tuple[alt.Chart, alt.Chart]:
    """Charts with a place on x per layer: its middle, and its whole width."""
    axis = alt.Axis(format="d", tickMinStep=1, grid=False)
    base = alt.Chart(alt.NamedData(name="layers"))
    return (
        base.encode(x=alt.X("layer:Q", title=name, scale=scale, axis=axis)),
        base.encode(x=alt.X("left:Q", title=name, scale=scale, axis=axis), x2="right:Q"),
    )


def _hits(column: alt.Chart, corpora: Sequence[str]) -> alt.Chart:
    """A whole column per layer to point at and click, tinted where it is the picked one."""
    return column.mark_rect(color=COLOURS["selected"], cursor="pointer").encode(
        y=alt.value(0),
        y2=alt.value("height"),
        opacity=alt.condition("datum.layer === picked", alt.value(0.14), alt.value(0)),
        tooltip=[
            alt.Tooltip("layer:Q"),
            alt.Tooltip("kind:N", title="kind"),
            alt.Tooltip("excess:Q", format="+.3f", title="excess over chance"),
            alt.Tooltip("low:Q", format="+.3f", title="95 % from"),
            alt.Tooltip("high:Q", format="+.3f", title="to"),
            alt.Tooltip("z:Q", format=".1f"),
            alt.Tooltip("p_familywise:Q", format=".3f", title="p, all layers"),
            *([alt.Tooltip("against:N", title="against")] if len(corpora) > 2 else ()),
            *(
                alt.Tooltip(f"explained_{i}:Q", format=".2f", title=f"variance explained, {name}")
                for i, name in enumerate(corpora)
            ),
            *(alt.Tooltip(f"l0_{i}:Q", format=".0f", title=f"L0, {name}") for i, name in enumerate(corpora)),
        ],
    )


def _health(
    rows: Sequence[dict[str, Any]],
    columns: tuple[alt.Chart, alt.Chart],
    field: str,
    corpora: Sequence[str],
    *,
    domain: Sequence[float] | None = None,
    rule: float | None = None,
) -> alt.LayerChart:
    base, column = columns
    scale = alt.Scale(domain=list(domain), clamp=True) if domain else alt.Scale(zero=True)
    layers = [_rule(rule)] if rule is not None else []
    for i, name in enumerate(corpora):
        if any(row[f"{field}_{i}"] is not None for row in rows):
            dash = [1, 0] if name == "target" else [4, 3]
            line = base.mark_line(
                color=COLOURS["ink"], strokeWidth=1.5, strokeDash=dash, point={"color": COLOURS["ink"], "size": 14}
            )
            layers.append(line.encode(y=alt.Y(f"{field}_{i}:Q", title=None, scale=scale, axis=y_axis("~s", 3))))
    return alt.layer(*layers, _hits(column, corpora)).properties(height=80)


def _y(field: str, number: str) -> alt.Y:
    return alt.Y(field, title=None, axis=y_axis(number))


def _rule(at: float) -> alt.Chart:
    return (
        alt.Chart(alt.Data(values=[{"at": at}])).mark_rule(color=COLOURS["muted"]).encode(y=alt.Y("at:Q", title=None))
    )
