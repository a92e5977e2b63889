"""The report's charts, each from a saved result: layers, energy kept, gains by cause, calibration, validation."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from stethoscope.display import listed
from stethoscope.report.style import COLOURS, axis, configured, drawn, rule, tips, title, when, y
from stethoscope.results.calibration import Calibration
from stethoscope.results.comparison import CAUSES, Comparison, flipped
from stethoscope.results.diagnosis import Diagnosis, LayerDiagnosis
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection
from stethoscope.results.validation import KINDS, ScoreValidation, SetEffect

# What a layer is -> its colour and shape.
_LAYERS = {
    "selected": ("selected", "diamond"),
    "not selected": ("other", "circle"),
    "excluded": ("tuned", "cross"),
}
_CAUSES = {"correctness": "selected", "format": "tuned", "truncation": "projected"}
_RANDOM = "random sets of as many layers"
_SETS = {
    KINDS["sae"]: ("selected", "diamond"),
    KINDS["rival"]: ("tuned", "square"),
    KINDS["truth"]: ("edit", "triangle-up"),
    _RANDOM: ("other", "circle"),
}
_KEPT = "energy of the layer's change that is kept, %"
_COST = "control loss, change in nats per token (right is worse)"
_GAIN = "fall of target loss, in nats per token"


def layer_profile(diagnosis: Diagnosis, selection: Selection | None = None, *, width: int = 640) -> alt.VConcatChart:
    """Excess over chance per layer, with the selected layers marked and the SAEs' health below.

    The parameter ``picked`` is the layer to highlight; -1 is none.

    Args:
        selection: its layers are marked.
        width: of the plotting area in pixels.
    """
    rows, corpora = profile_rows(diagnosis, selection), list(diagnosis.corpora)
    numbers = [row["layer"] for row in rows]
    scale = alt.Scale(domain=[min(numbers) - 0.5, max(numbers) + 0.5], nice=False, zero=False)

    def columns(name: str | None = None) -> tuple[alt.Chart, alt.Chart]:
        """Charts with a place on x per layer: its middle, and its whole width."""
        base, x = alt.Chart(alt.NamedData(name="layers")), {"title": name, "scale": scale}
        x["axis"] = alt.Axis(format="d", tickMinStep=1, grid=False)
        return base.encode(x=alt.X("layer:Q", **x)), base.encode(x=alt.X("left:Q", **x), x2="right:Q")

    def health(field: str, name: str | None, scale: alt.Scale, at: float | None = None) -> alt.LayerChart:
        base, column = columns(name)
        layers = [] if at is None else [_across(at)]
        for i, corpus in enumerate(corpora):
            if any(row[f"{field}_{i}"] is not None for row in rows):
                dash = [1, 0] if corpus == "target" else [4, 3]
                dots = {"color": COLOURS["ink"], "size": 14}
                line = base.mark_line(color=COLOURS["ink"], strokeWidth=1.5, strokeDash=dash, point=dots)
                layers.append(line.encode(y=y(f"{field}_{i}", "~s", 3, scale=scale)))
        return alt.layer(*layers, _hits(column, corpora)).properties(height=80)

    base, column = columns()
    shapes = alt.Scale(domain=list(_LAYERS), range=[shape for _, shape in _LAYERS.values()])
    colours = alt.Scale(domain=list(_LAYERS), range=[COLOURS[colour] for colour, _ in _LAYERS.values()])
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1)
    kind = alt.Color("kind:N", scale=colours, legend=legend)
    # The stroke closes the seams between neighbours.
    band = column.mark_rect(color=COLOURS["null"], stroke=COLOURS["null"], strokeWidth=1, aria=False)
    point = base.mark_point(filled=True, size=55, opacity=1)
    score = alt.layer(
        band.encode(y=y("null_low", "+.2~f"), y2="null_high:Q"),
        _across(0.0),
        base.mark_rule(strokeWidth=1.5).encode(y=y("low", "+.2~f"), y2="high:Q", color=kind),
        point.encode(y=y("excess", "+.2~f"), color=kind, shape=alt.Shape("kind:N", scale=shapes)),
        _hits(column, corpora),
    )
    explained = health("explained", None, alt.Scale(domain=[0.0, 1.0], clamp=True), 0.5)
    charts = {
        f"{diagnosis.score}: excess over chance": score.properties(height=220),
        "SAE variance explained: target solid, control dashed": explained,
        "SAE features active per token (L0): target solid, control dashed": health("l0", "layer", alt.Scale(zero=True)),
    }
    parts = [chart.properties(width=width, title=title(heading)) for heading, chart in charts.items()]
    stacked = alt.vconcat(*parts, spacing=16).resolve_scale(color="independent", shape="independent")
    picked = alt.param(name="picked", value=-1)
    return configured(stacked.add_params(picked).properties(datasets={"layers": rows}))


def profile_rows(diagnosis: Diagnosis, selection: Selection | None) -> list[dict[str, Any]]:
    """What the layer profile draws: a row per layer."""
    chosen = set(selection.layers if selection else ())

    def kind(layer: LayerDiagnosis) -> str:
        if layer.layer in chosen:
            return "selected"
        return "not selected" if layer.flag is None else "excluded"

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
            **{
                f"{short}_{i}": getattr(layer.health[name], field) if name in layer.health else None
                for short, field in (("explained", "variance_explained"), ("l0", "l0"))
                for i, name in enumerate(diagnosis.corpora)
            },
        }
        for layer in diagnosis.layers
    ]


def _across(at: float) -> alt.Chart:
    return rule("at", at).encode(y=alt.Y("at:Q", title=None))


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


def energy_by_layer(geometry: Geometry, selected: Sequence[int] = (), *, width: int = 640) -> alt.LayerChart:
    """The share of each layer's change that its features keep, beside what random features and directions keep.

    Args:
        selected: layers that are marked.
        width: of the plotting area in pixels.
    """
    rows = [
        {
            "layer": layer.layer,
            "kept": 100 * layer.kept.share,
            "chance": 100 * layer.kept.chance,
            "low": 100 * layer.kept.random_features.low,
            "high": 100 * layer.kept.random_features.high,
            "selected": layer.layer in selected,
        }
        for layer in geometry.layers
    ]
    base = alt.Chart(alt.NamedData(name="layers")).encode(x=_layer_axis())
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
        heading=_KEPT,
        data={"layers": rows},
        width=width,
        height=220,
    )


def _layer_axis() -> alt.X:
    return alt.X("layer:Q", title="layer", axis=axis("d"), scale=alt.Scale(nice=False, padding=12))


def energy_curves(geometry: Any, selected: Sequence[int] = (), *, width: int = 640) -> alt.LayerChart:
    """Energy kept against number of features, a line per layer, with the chance level; see `energy_by_layer`."""
    rows = [
        {
            "layer": layer.layer,
            "features": number,
            "kept": round(100 * share, 2),
            "chance": round(100 * chance, 2),
            "selected": layer.layer in selected,
        }
        for layer in geometry.layers
        for number, share, chance in zip(layer.curve.features, layer.curve.share, layer.curve.chance, strict=True)
    ]
    x = alt.X("features:Q", title="features, most specific first", axis=axis(",d"), scale=alt.Scale(nice=False))
    base = alt.Chart(alt.NamedData(name="curves")).encode(x=x, detail="layer:N")
    whole = alt.Scale(domain=[0, 100])
    lines = base.mark_line(strokeWidth=1.25).encode(
        y=y("kept", "d", scale=whole),
        color=when("selected", COLOURS["selected"], COLOURS["other"]),
        opacity=when("selected", 1, 0.35),
        tooltip=tips("layer:N", "features:Q", "kept:Q", "chance:Q"),
    )
    chance = base.mark_line(color=COLOURS["ink"], strokeDash=[4, 3], strokeWidth=1.5)
    cuts = alt.Data(values=[{"features": number} for number in sorted({layer.features for layer in geometry.layers})])
    return drawn(
        alt.Chart(cuts).mark_rule(color=COLOURS["muted"], strokeDash=[2, 3]).encode(x="features:Q"),
        lines,
        chance.encode(y=y("chance", "d", scale=whole)),
        heading=_KEPT,
        data={"curves": rows},
        width=width,
        height=280,
    )


def gain_split(comparison: Comparison, *, width: int = 640) -> alt.LayerChart | None:
    """Each arm's change over the baseline on all target items, by cause of failure; None where causes are not known."""
    rows = [
        {"arm": arm, "cause": CAUSES[cause], "points": change.points, "mended": change.gained, "broken": change.lost}
        for arm in comparison.arms
        if (contrast := comparison.find(arm))
        for cause in _CAUSES
        if (change := flipped([t for t in contrast.family if t.flips], cause))
    ]
    if not rows:
        return None
    known = {CAUSES[cause]: COLOURS[colour] for cause, colour in _CAUSES.items()}
    known = {words: colour for words, colour in known.items() if any(row["cause"] == words for row in rows)}
    colours = alt.Scale(domain=list(known), range=list(known.values()))
    bars = (
        alt.Chart(alt.NamedData(name="gains"))
        .mark_bar(height=12)
        .encode(
            x=alt.X("points:Q", title="points", axis=axis("+.3~f"), stack=True),
            y=alt.Y("arm:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color("cause:N", scale=colours, sort=None, legend=alt.Legend(orient="top", title=None)),
            tooltip=tips("arm:N", "cause:N", "mended:Q", "broken:Q", ("points:Q", "+.1f")),
        )
    )
    return drawn(
        bars,
        rule("zero", 0.0).encode(x="zero:Q"),
        heading="items mended less items broken, in points",
        data={"gains": rows},
        width=width,
        height=24 * len({row["arm"] for row in rows}) + 12,
    )


def calibration_front(calibration: Calibration, *, width: int = 640) -> alt.LayerChart:
    """Every edit that was tried: target gain against control cost, the front as a line, the choice as a diamond."""
    rows = [
        {
            "layers": point.layers,
            "gain": point.target_gain,
            "cost": point.control_cost,
            "gain_low": point.target_gain - point.target_error,
            "gain_high": point.target_gain + point.target_error,
            "front": point.on_front,
            "chosen": i == calibration.choice,
        }
        for i, point in enumerate(calibration.points)
    ]
    x = alt.X("cost:Q", title=_COST, axis=axis("+.3~f"))
    base = alt.Chart(alt.NamedData(name="edits")).encode(x=x, y=y("gain", "+.2~f"))
    front = base.transform_filter("datum.front")
    whisker = base.transform_filter("datum.chosen").mark_rule(color=COLOURS["selected"], strokeWidth=1.5)
    points = base.mark_point(filled=True, opacity=0.9).encode(
        color=when("chosen", COLOURS["selected"], COLOURS["other"]),
        shape=when("chosen", "diamond", "circle"),
        size=when("chosen", 160, 45),
        tooltip=tips("layers:N", ("gain:Q", "+.4f"), ("cost:Q", "+.4f")),
    )
    return drawn(
        front.mark_line(color=COLOURS["other"], interpolate="step-after", strokeWidth=1.5),
        whisker.encode(y=alt.Y("gain_low:Q", title=None), y2="gain_high:Q"),
        points,
        heading=_GAIN,
        data={"edits": rows},
        width=width,
        height=320,
    )


def validation_plane(validation: ScoreValidation, k: int, *, width: int = 640) -> alt.LayerChart:
    """What each score's best k layers do when injected together, in the cloud of random sets.

    Args:
        k: one of the sizes that were judged.
        width: of the plotting area in pixels.
    """
    rows = [_set("", _RANDOM, effect) for effect in validation.random[k].equal_size]
    rows += [_set(name, KINDS[found.kind], found.sets[k].effect) for name, found in validation.scores.items()]
    _label_apart(rows)
    there = {kind: look for kind, look in _SETS.items() if any(row["kind"] == kind for row in rows)}
    colours = alt.Scale(domain=list(there), range=[COLOURS[colour] for colour, _ in there.values()])
    shapes = alt.Scale(domain=list(there), range=[shape for _, shape in there.values()])
    legend = alt.Legend(orient="top", columns=2, labelLimit=300)
    base = alt.Chart(alt.NamedData(name="sets")).encode(
        x=alt.X("cost:Q", title=_COST, axis=axis("+.2~f")),
        y=y("gain", "+.2~f"),
        color=alt.Color("kind:N", sort=None, title=None, scale=colours, legend=legend),
        tooltip=tips("score:N", "layers:N", ("gain:Q", "+.4f"), ("cost:Q", "+.4f")),
    )
    points = base.mark_point(filled=True, opacity=0.85).encode(
        shape=alt.Shape("kind:N", sort=None, title=None, scale=shapes),
        size=alt.condition(alt.datum.score == "", alt.value(35), alt.value(110)),
    )
    labels = base.mark_text(align="left", dx=8, dy=-6, fontSize=11).encode(text="shown:N")
    return drawn(points, labels, heading=_GAIN, data={"sets": rows}, width=width, height=380)


def score_profiles(validation: ScoreValidation, *, picked: str = "", width: int = 640) -> alt.LayerChart:
    """One score's layers, chosen from a list, beside the true gain of injecting each layer alone.

    Scores have units of their own, so each is drawn as a share of its largest layer.

    Args:
        picked: the score shown first; the first of all if not given.
        width: of the plotting area in pixels.
    """
    truth = next(found for found in validation.scores.values() if found.kind == "truth")
    judged = {name: found for name, found in validation.scores.items() if found.kind != "truth"}
    rows = [
        {
            "score": name,
            "kind": KINDS[found.kind],
            "layer": layer,
            "value": value,
            "share": value / _largest(found.values),
            "truth": truth.values[layer] / _largest(truth.values),
            "gain": truth.values[layer],
        }
        for name, found in judged.items()
        for layer, value in found.values.items()
    ]
    options = alt.binding_select(options=list(judged), name="score ")
    shown = alt.param(name="shown", value=picked if picked in judged else next(iter(judged)), bind=options)
    gain = ("gain:Q", "+.4f", "true gain, nats per token")
    base = alt.Chart(alt.NamedData(name="scores")).transform_filter("datum.score === shown")
    base = base.encode(x=_layer_axis(), tooltip=tips("layer:Q", "score:N", "kind:N", ("value:Q", ".4~g"), gain))
    line = base.mark_line(color=COLOURS["edit"], strokeWidth=1.5, point=alt.OverlayMarkDef(color=COLOURS["edit"]))
    return drawn(
        base.mark_bar(color=COLOURS["selected"], width=8).encode(y=y("share", ".0%")).add_params(shown),
        line.encode(y=y("truth", ".0%")),
        heading="score (bars), true gain (line); shares of the largest",
        data={"scores": rows},
        width=width,
        height=200,
    )


def _set(name: str, kind: str, effect: SetEffect) -> dict[str, Any]:
    return {
        "score": name,
        "kind": kind,
        "layers": listed(effect.layers),
        "gain": effect.target_gain,
        "cost": effect.control_cost,
    }


def _largest(values: Mapping[int, float]) -> float:
    return max(map(abs, values.values())) or 1.0


def _label_apart(rows: Sequence[dict[str, Any]]) -> None:
    """Name each place once: scores that chose the same layers, or nearly the same effect, share a label."""
    reach = {key: max(row[key] for row in rows) - min(row[key] for row in rows) or 1.0 for key in ("cost", "gain")}
    near = {"cost": 0.22 * reach["cost"], "gain": 0.045 * reach["gain"]}
    placed: list[dict[str, Any]] = []
    for row in rows:
        row["shown"] = row["score"]
        met = [other for other in placed if all(abs(row[key] - other[key]) < near[key] for key in near)]
        if row["score"] and met:
            row["shown"], first = "", met[0]
            first["count"] = first.get("count", 0) + 1
            first["shown"] = f"{first['score']} and {first['count']} more"
        elif row["score"]:
            placed.append(row)
