"""The charts that only the report shows: energy by features, gains by cause, validation."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from stethoscope.charts.layers import KEPT, layer_axis
from stethoscope.charts.style import COLOURS, axis, drawn, kinds, rule, tips, when, y
from stethoscope.display import listed
from stethoscope.results.comparison import CAUSES, Comparison, flipped
from stethoscope.results.validation import KINDS, ScoreValidation

_CAUSES = {"correctness": "selected", "format": "tuned", "truncation": "projected"}
_RANDOM = "random sets of as many layers"
_SETS = {
    KINDS["sae"]: ("selected", "diamond"),
    KINDS["rival"]: ("tuned", "square"),
    KINDS["truth"]: ("edit", "triangle-up"),
    _RANDOM: ("other", "circle"),
}
_COST = "control loss, change in nats per token (right is worse)"
_GAIN = "fall of target loss, in nats per token"


def energy_curves(geometry: Any, selected: Sequence[int] = (), *, width: int = 640) -> alt.LayerChart:
    """Energy kept against number of features, a line per layer, with the chance level."""
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
        heading=KEPT,
        data={"curves": rows},
        width=width,
        height=280,
    )


def gain_split(comparison: Comparison) -> alt.LayerChart | None:
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
    there = {row["cause"] for row in rows}
    known = {CAUSES[cause]: COLOURS[colour] for cause, colour in _CAUSES.items() if CAUSES[cause] in there}
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
        height=24 * len({row["arm"] for row in rows}) + 12,
    )


def validation_plane(validation: ScoreValidation, k: int, *, width: int = 640) -> alt.LayerChart:
    """What each score's best k layers do when injected together, in the cloud of random sets.

    Args:
        k: one of the sizes that were judged.
        width: of the plotting area in pixels.
    """
    sets = [("", _RANDOM, effect) for effect in validation.random[k].equal_size]
    sets += [(name, KINDS[found.kind], found.sets[k].effect) for name, found in validation.scores.items()]
    rows: list[dict[str, Any]] = [
        {"score": name, "kind": kind, "layers": listed(s.layers), "gain": s.target_gain, "cost": s.control_cost}
        for name, kind, s in sets
    ]
    _label_apart(rows)
    there = {kind: look for kind, look in _SETS.items() if any(row["kind"] == kind for row in rows)}
    legend = alt.Legend(orient="top", columns=2, labelLimit=300)
    colour, shape = kinds(there, sort=None, title=None, legend=legend)
    base = alt.Chart(alt.NamedData(name="sets")).encode(
        x=alt.X("cost:Q", title=_COST, axis=axis("+.2~f")),
        y=y("gain", "+.2~f"),
        color=colour,
        tooltip=tips("score:N", "layers:N", ("gain:Q", "+.4f"), ("cost:Q", "+.4f")),
    )
    points = base.mark_point(filled=True, opacity=0.85).encode(
        shape=shape.sort(None).title(None),
        size=alt.condition(alt.datum.score == "", alt.value(35), alt.value(110)),
    )
    labels = base.mark_text(align="left", dx=8, dy=-6, fontSize=11).encode(text="shown:N")
    return drawn(points, labels, heading=_GAIN, data={"sets": rows}, width=width, height=380)


def score_profiles(validation: ScoreValidation, *, picked: str = "") -> alt.LayerChart:
    """One score's layers, chosen from a list, beside what injecting each layer alone truly gains less what it costs.

    Scores have units of their own, so each is drawn as a share of its largest layer.

    Args:
        picked: the score shown first; the first of all if not given.
    """
    true, truth = next((name, found) for name, found in validation.scores.items() if found.kind == "truth")
    judged = {name: found for name, found in validation.scores.items() if found.kind != "truth"}
    largest = {name: max(map(abs, found.values.values())) or 1.0 for name, found in validation.scores.items()}
    rows = [
        {
            "score": name,
            "kind": KINDS[found.kind],
            "layer": layer,
            "value": value,
            "share": value / largest[name],
            "truth": truth.values[layer] / largest[true],
            "gain": truth.values[layer],
        }
        for name, found in judged.items()
        for layer, value in found.values.items()
    ]
    options = alt.binding_select(options=list(judged), name="score ")
    shown = alt.param(name="shown", value=picked if picked in judged else next(iter(judged)), bind=options)
    gain = ("gain:Q", "+.4f", "true gain less cost, nats per token")
    base = alt.Chart(alt.NamedData(name="scores")).transform_filter("datum.score === shown")
    base = base.encode(x=layer_axis(), tooltip=tips("layer:Q", "score:N", "kind:N", ("value:Q", ".4~g"), gain))
    line = base.mark_line(color=COLOURS["edit"], strokeWidth=1.5, point=alt.OverlayMarkDef(color=COLOURS["edit"]))
    return drawn(
        base.mark_bar(color=COLOURS["selected"], width=8).encode(y=y("share", ".0%")).add_params(shown),
        line.encode(y=y("truth", ".0%")),
        heading="score (bars), true gain less cost (line); shares of the largest",
        data={"scores": rows},
        height=200,
    )


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
