"""Was the choice of layers a good one? The cloud of layer sets from `validate`, and the calibration's front."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from stethoscope.report.look import COLOURS, axis, configured, title, y_axis
from stethoscope.results.calibration import Calibration
from stethoscope.results.validation import Beaten, Correlation, ScoreValidation, SetEffect

_COST = "control loss, change in nats per token (right is worse)"
_GAIN = "fall of target loss, in nats per token"
_KINDS = {
    "sae": ("listens through SAEs", "selected", "diamond"),
    "rival": ("needs no SAE", "tuned", "square"),
    "truth": ("the truth itself", "edit", "triangle-up"),
    "random": ("random sets of as many layers", "other", "circle"),
}


def validation_plane(validation: ScoreValidation, k: int, *, width: int = 640) -> alt.LayerChart:
    """What each score's best k layers do when injected together, in the cloud of random sets.

    Args:
        k: one of the sizes that were judged.
        width: of the plotting area in pixels.
    """
    rows = [_row("", "random", effect) for effect in validation.random[k].equal_size]
    for name, found in validation.scores.items():
        rows.append(_row(name, found.kind, found.sets[k].effect))
    looks = [look for kind, look in _KINDS.items() if any(row["kind"] == look[0] for row in rows)]
    kind: dict[str, Any] = {"sort": None, "title": None}
    base = alt.Chart(alt.NamedData(name="sets")).encode(
        x=alt.X("cost:Q", title=_COST, axis=axis("+.2~f")),
        y=alt.Y("gain:Q", title=None, axis=y_axis("+.2~f")),
        color=alt.Color(
            "kind:N",
            scale=alt.Scale(domain=[look[0] for look in looks], range=[COLOURS[look[1]] for look in looks]),
            legend=alt.Legend(orient="top", columns=2, labelLimit=300),
            **kind,
        ),
        tooltip=[
            alt.Tooltip("score:N"),
            alt.Tooltip("layers:N"),
            alt.Tooltip("gain:Q", format="+.4f"),
            alt.Tooltip("cost:Q", format="+.4f"),
        ],
    )
    shapes = alt.Scale(domain=[look[0] for look in looks], range=[look[2] for look in looks])
    points = base.mark_point(filled=True, opacity=0.85).encode(
        shape=alt.Shape("kind:N", scale=shapes, **kind),
        size=alt.condition(alt.datum.score == "", alt.value(35), alt.value(110)),
    )
    labels = base.mark_text(align="left", dx=8, dy=-6, fontSize=11).encode(text="shown:N")
    _label_apart(rows)
    chart = alt.layer(points, labels)
    return configured(chart.properties(width=width, height=380, title=title(_GAIN), datasets={"sets": rows}))


def score_profiles(validation: ScoreValidation, *, picked: str = "", width: int = 640) -> alt.LayerChart:
    """One score's layers, chosen from a list, beside the true gain of injecting each layer alone.

    Scores have units of their own, so each is drawn as a share of its largest layer.

    Args:
        picked: the score shown first; the first of all if not given.
        width: of the plotting area in pixels.
    """
    truth = next(found for found in validation.scores.values() if found.kind == "truth")
    names = [name for name, found in validation.scores.items() if found.kind != "truth"]
    rows = [
        {
            "score": name,
            "kind": _KINDS[found.kind][0],
            "layer": layer,
            "value": value,
            "share": value / _largest(found.values),
            "truth": truth.values[layer] / _largest(truth.values),
            "gain": truth.values[layer],
        }
        for name, found in validation.scores.items()
        if found.kind != "truth"
        for layer, value in found.values.items()
    ]
    shown = alt.param(
        name="shown",
        value=picked if picked in names else names[0],
        bind=alt.binding_select(options=names, name="score "),
    )
    base = (
        alt.Chart(alt.NamedData(name="scores"))
        .transform_filter("datum.score === shown")
        .encode(
            x=alt.X("layer:Q", title="layer", axis=axis("d"), scale=alt.Scale(nice=False, padding=12)),
            tooltip=[
                alt.Tooltip("layer:Q"),
                alt.Tooltip("score:N"),
                alt.Tooltip("kind:N"),
                alt.Tooltip("value:Q", format=".4~g"),
                alt.Tooltip("gain:Q", format="+.4f", title="true gain, nats per token"),
            ],
        )
    )
    y: dict[str, Any] = {"title": None, "axis": y_axis(".0%")}
    bars = base.mark_bar(color=COLOURS["selected"], width=8).encode(y=alt.Y("share:Q", **y))
    line = base.mark_line(color=COLOURS["edit"], strokeWidth=1.5, point=alt.OverlayMarkDef(color=COLOURS["edit"]))
    chart = alt.layer(bars, line.encode(y=alt.Y("truth:Q", **y))).add_params(shown)
    heading = title("score (bars), true gain (line); shares of the largest")
    return configured(chart.properties(width=width, height=200, title=heading, datasets={"scores": rows}))


def calibration_front(calibration: Calibration, *, width: int = 640) -> alt.LayerChart:
    """Every edit that was tried: target gain against control cost, the front as a line, the choice as a diamond."""
    rows = [
        {
            "layers": ", ".join(f"{n} at {c:g}" for n, c in point.coefficients.items()) or "none",
            "gain": point.target_gain,
            "cost": point.control_cost,
            "gain_low": point.target_gain - point.target_error,
            "gain_high": point.target_gain + point.target_error,
            "front": point.on_front,
            "chosen": i == calibration.choice,
        }
        for i, point in enumerate(calibration.points)
    ]
    base = alt.Chart(alt.NamedData(name="edits")).encode(
        x=alt.X("cost:Q", title=_COST, axis=axis("+.3~f")), y=alt.Y("gain:Q", title=None, axis=y_axis("+.2~f"))
    )
    front = base.transform_filter("datum.front").mark_line(
        color=COLOURS["other"], interpolate="step-after", strokeWidth=1.5
    )
    whisker = base.transform_filter("datum.chosen").mark_rule(color=COLOURS["selected"], strokeWidth=1.5)
    points = base.mark_point(filled=True, opacity=0.9).encode(
        color=alt.condition("datum.chosen", alt.value(COLOURS["selected"]), alt.value(COLOURS["other"])),
        shape=alt.condition("datum.chosen", alt.value("diamond"), alt.value("circle")),
        size=alt.condition("datum.chosen", alt.value(160), alt.value(45)),
        tooltip=[
            alt.Tooltip("layers:N"),
            alt.Tooltip("gain:Q", format="+.4f"),
            alt.Tooltip("cost:Q", format="+.4f"),
        ],
    )
    whiskers = whisker.encode(y=alt.Y("gain_low:Q", title=None), y2="gain_high:Q")
    chart = alt.layer(front, whiskers, points)
    return configured(chart.properties(width=width, height=320, title=title(_GAIN), datasets={"edits": rows}))


def validation_rows(validation: ScoreValidation, k: int) -> list[dict[str, str]]:
    """A row per score, best trade-off first."""
    ordered = sorted(validation.scores.items(), key=lambda item: -item[1].sets[k].effect.trade_off)
    return [
        {
            "score": name,
            "kind": _KINDS[found.kind][0],
            "correlation with gain": _correlation(found.gain),
            "with gain less cost": _correlation(found.trade_off),
            f"best {k} layers": ", ".join(map(str, found.sets[k].effect.layers)),
            "gain": f"{found.sets[k].effect.target_gain:+.3f}",
            "cost": f"{found.sets[k].effect.control_cost:+.3f}",
            "shared with the truth": f"{100 * found.sets[k].overlap:.0f} %",
            "beats random sets": _share(found.sets[k].beaten),
            "beats sets of equal energy": _share(found.sets[k].beaten_matched),
        }
        for name, found in ordered
    ]


def calibration_rows(calibration: Calibration) -> list[dict[str, str]]:
    """A row per edit on the front, by rising cost."""
    return [
        {
            "layers": ", ".join(f"{n} at {c:g}" for n, c in point.coefficients.items()) or "none",
            "z at least": "" if point.threshold is None else f"{point.threshold:.1f}",
            "target gain": f"{point.target_gain:+.4f} ± {point.target_error:.4f}",
            "control cost": f"{point.control_cost:+.4f} ± {point.control_error:.4f}",
            "chosen": "yes" if point == calibration.points[calibration.choice] else "",
        }
        for point in calibration.front
    ]


def _row(name: str, kind: str, effect: SetEffect) -> dict[str, Any]:
    return {
        "score": name,
        "kind": _KINDS[kind][0],
        "layers": ", ".join(map(str, effect.layers)),
        "gain": effect.target_gain,
        "cost": effect.control_cost,
    }


def _largest(values: Mapping[int, float]) -> float:
    return max(map(abs, values.values())) or 1.0


def _label_apart(rows: Sequence[dict[str, Any]]) -> None:
    """Name each place once: scores that chose the same layers, or nearly the same effect, share a label."""
    spans = [max(row[key] for row in rows) - min(row[key] for row in rows) or 1.0 for key in ("cost", "gain")]
    placed: list[dict[str, Any]] = []
    for row in rows:
        row["shown"] = row["score"]
        near = next(
            (
                other
                for other in placed
                if abs(row["cost"] - other["cost"]) < 0.22 * spans[0]
                and abs(row["gain"] - other["gain"]) < 0.045 * spans[1]
            ),
            None,
        )
        if row["score"] and near is not None:
            row["shown"] = ""
            near["count"] = near.get("count", 0) + 1
            near["shown"] = f"{near['score']} and {near['count']} more"
        elif row["score"]:
            placed.append(row)


def _correlation(found: Correlation) -> str:
    return "undefined" if found.rho is None else f"{found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _share(found: Beaten | None) -> str:
    return "" if found is None else f"{100 * found.share:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"
