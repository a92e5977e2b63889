"""Charts, table and sentences on projected edits: the energy that feature directions keep, and what the edits gain."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import altair as alt

from stethoscope.report.look import COLOURS, axis, configured, title, y_axis
from stethoscope.report.tables import NONE, Row, percent
from stethoscope.report.words import points, signed
from stethoscope.results.comparison import Comparison, Contrast, PairedDifference
from stethoscope.results.geometry import Geometry, Kept, LayerGeometry

_KEPT = "energy of the layer's change that is kept, %"


def energy_by_layer(geometry: Any, selected: Sequence[int] = (), *, width: int = 640) -> alt.LayerChart:
    """The share of each layer's change that its features keep, beside what random features and directions keep.

    Args:
        geometry: a `Geometry`, or its saved values.
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
    base = alt.Chart(alt.NamedData(name="layers")).encode(
        x=alt.X("layer:Q", title="layer", axis=axis("d"), scale=alt.Scale(nice=False, padding=12))
    )
    y: dict[str, Any] = {"title": None, "axis": y_axis(".3~f")}
    band = base.mark_area(color=COLOURS["null"]).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    chance = base.mark_line(color=COLOURS["muted"], strokeDash=[4, 3], strokeWidth=1.5).encode(y=alt.Y("chance:Q", **y))
    dots = base.mark_point(filled=True, opacity=1).encode(
        y=alt.Y("kept:Q", **y),
        color=_if_selected(COLOURS["selected"], COLOURS["other"]),
        shape=_if_selected("diamond", "circle"),
        size=_if_selected(110, 55),
        tooltip=[
            alt.Tooltip("layer:Q"),
            alt.Tooltip("kept:Q", format=".1f", title="kept, %"),
            alt.Tooltip("chance:Q", format=".1f", title="chance, %"),
            alt.Tooltip("low:Q", format=".1f", title="random features from"),
            alt.Tooltip("high:Q", format=".1f", title="to"),
        ],
    )
    chart = alt.layer(band, chance, dots)
    return configured(chart.properties(width=width, height=220, title=title(_KEPT), datasets={"layers": rows}))


def energy_curves(geometry: Geometry, selected: Sequence[int] = (), *, width: int = 640) -> alt.LayerChart:
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
    base = alt.Chart(alt.NamedData(name="curves")).encode(
        x=alt.X("features:Q", title="features, most specific first", axis=axis(",d"), scale=alt.Scale(nice=False)),
        detail="layer:N",
    )
    y: dict[str, Any] = {"title": None, "axis": y_axis("d"), "scale": alt.Scale(domain=[0, 100])}
    lines = base.mark_line(strokeWidth=1.25).encode(
        y=alt.Y("kept:Q", **y),
        color=_if_selected(COLOURS["selected"], COLOURS["other"]),
        opacity=_if_selected(1, 0.35),
        tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("features:Q"), alt.Tooltip("kept:Q"), alt.Tooltip("chance:Q")],
    )
    chance = base.mark_line(color=COLOURS["ink"], strokeDash=[4, 3], strokeWidth=1.5).encode(y=alt.Y("chance:Q", **y))
    chosen = sorted({layer.features for layer in geometry.layers})
    rule = alt.Chart(alt.Data(values=[{"features": number} for number in chosen]))
    mark = rule.mark_rule(color=COLOURS["muted"], strokeDash=[2, 3]).encode(x="features:Q")
    chart = alt.layer(mark, lines, chance)
    return configured(chart.properties(width=width, height=280, title=title(_KEPT), datasets={"curves": rows}))


def _if_selected(value: Any, otherwise: Any) -> Any:
    return alt.condition("datum.selected", alt.value(value), alt.value(otherwise))


def geometry_rows(geometry: Geometry) -> list[Row]:
    """A row per layer, per kind of module and for all; shares in percent."""
    rows = [_layer_row(layer) for layer in geometry.layers]
    sums = {**{f"all {kind}": kept for kind, kept in geometry.kinds.items()}, "all": geometry.total}
    empty = dict.fromkeys(rows[0], "") if rows else {}
    return rows + [{**empty, "layer": name, **_kept_cells(kept)} for name, kept in sums.items()]


def _layer_row(layer: LayerGeometry) -> Row:
    needed, written = layer.curve.needed, layer.written
    ranks = [t.effective_rank for t in layer.tensors if t.effective_rank is not None]
    overlaps = [t.overlap for t in layer.tensors if t.overlap is not None]
    return {
        "layer": str(layer.layer),
        "features": str(layer.features),
        "rank": str(layer.rank),
        **_kept_cells(layer.kept),
        "functional": " / ".join(f"{percent(share)} {name}" for name, share in layer.functional.items()) or NONE,
        "its chance": " / ".join(percent(share) for share in layer.functional_chance.values()) or NONE,
        "features for 50, 90, 99 %": " / ".join(str(needed.get(part) or NONE) for part in ("50", "90", "99")),
        "writes where they read": f"{percent(written.share)} ({percent(written.chance)})" if written else NONE,
        "effective rank": f"{median(ranks):.1f}" if ranks else NONE,
        "in leading directions": percent(sum(overlaps) / len(overlaps)) if overlaps else NONE,
    }


def _kept_cells(kept: Kept) -> Row:
    drawn, interval = kept.random_features, kept.interval
    return {
        "kept, %": percent(kept.share),
        "chance": percent(kept.chance),
        "random features": f"{percent(drawn.low)} to {percent(drawn.high)}",
        "over chance": f"{kept.over_chance:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""),
    }


class _Gain(NamedTuple):
    """What one arm gains over another, whether its interval lies above or below 0, and the gain in words."""

    value: float
    up: bool
    down: bool
    text: str


def _above(difference: PairedDifference | None) -> bool:
    return difference is not None and difference.low is not None and difference.low > 0


def _below(difference: PairedDifference | None) -> bool:
    return difference is not None and difference.high is not None and difference.high < 0


def _accuracy(contrast: Contrast) -> _Gain:
    pooled = contrast.pooled
    return _Gain(pooled.difference, _above(pooled), _below(pooled), points(pooled))


def _of_contrast(contrast: Contrast) -> _Gain:
    """The fall of loss on held-out target text where that was measured, else the rise of accuracy."""
    if (loss := contrast.target_loss) is None:
        return _accuracy(contrast)
    text = f"{signed(-loss.difference, 3)} nats per token"
    if loss.low is not None and loss.high is not None:
        text += f" ({signed(-loss.high, 3)} to {signed(-loss.low, 3)})"
    return _Gain(-loss.difference, _below(loss), _above(loss), text)


def answers(comparison: Comparison) -> list[tuple[str, str]]:
    """Three questions and what the arms that project say of each; those without their arms are left out.

    Gains are falls of loss on held-out target text where that was measured, else accuracy on the target tasks.
    """
    asked = {
        "Is the projected edit weak because it is small, because its direction is wrong, or both?": _why_weak,
        "Is what was thrown away what worked?": _thrown_away,
        "Does any hybrid beat raw injection on the trade-off?": _hybrids,
    }
    return [(question, found) for question, answer in asked.items() if (found := answer(comparison))]


def _gain(comparison: Comparison, b: str, a: str | None = None) -> _Gain | None:
    contrast = comparison.find(b, a)
    return _of_contrast(contrast) if contrast else None


def _why_weak(comparison: Comparison) -> str | None:
    raw, cut = _gain(comparison, "selected"), _gain(comparison, "projected")
    lost = _gain(comparison, "selected", "projected")
    if raw is None or cut is None or lost is None:
        return None
    if not raw.up:
        return _no_raw_gain(raw)
    if not lost.up:
        return f"It is not shown to be weak: raw over projected is {lost.text}."
    weak = f"Raw gains {raw.text}, projected {cut.text}"
    matched = _gain(comparison, "projected_energy_matched")
    still = _gain(comparison, "selected", "projected_energy_matched")
    mended = _gain(comparison, "projected_energy_matched", "projected")
    if matched is None or still is None or mended is None:
        return f"{weak}. The arm `projected_energy_matched` would tell which."
    reason = {
        (True, False): "Because it is small",
        (False, True): "Because its direction is wrong",
        (True, True): "Both",
        (False, False): "Undecided",
    }[mended.up, still.up]
    text = f"{reason}. {weak}; at the raw edit's norm it gains {matched.text}, {matched.value / raw.value:.0%} of raw."
    if chance := _gain(comparison, "random_subspace_energy_matched"):
        text += f" As many random directions at that norm give {chance.value / raw.value:.0%} ({chance.text})."
    return text


def _no_raw_gain(raw: _Gain) -> str:
    return f"Not answered: the raw edit itself has no clear gain here ({raw.text})."


def _thrown_away(comparison: Comparison) -> str | None:
    raw, rest = _gain(comparison, "selected"), _gain(comparison, "complement")
    less = _gain(comparison, "selected", "complement")
    if raw is None or rest is None or less is None:
        return None
    if not raw.up:
        return _no_raw_gain(raw)
    share = f"without the features' directions the edit gains {rest.text}, {rest.value / raw.value:.0%} of raw"
    if not rest.up:
        return f"No: {share}."
    if less.up:
        return f"In part: {share}, and clearly less than it (raw is ahead by {less.text})."
    return f"Yes: {share}, and not clearly less than it."


def _hybrids(comparison: Comparison) -> str | None:
    found = []
    for arm in ("hybrid", "filtered"):
        contrast = comparison.find("selected", arm)  # raw over the hybrid
        if contrast is None:
            continue
        gain, right, cost = _of_contrast(contrast), _accuracy(contrast), contrast.loss
        dearer, cheaper = _below(cost), _above(cost)  # the hybrid costs more control loss than raw, or less
        up, down = gain.up or right.up, gain.down or right.down
        if up and down:
            verdict = "gains by one measure and loses by another"
        elif (down and not dearer) or (cheaper and not up):
            verdict = "beats raw injection"
        elif (up and not cheaper) or (dearer and not down):
            verdict = "is worse than raw injection"
        elif up or down:
            verdict = "trades gain against cost"
        else:
            verdict = "is not clearly better or worse"
        paid = [f"{gain.text} of gain"]
        if contrast.target_loss:
            paid.append(f"{right.text} of accuracy")
        if cost:
            paid.append(f"{signed(cost.difference, 3)} nats per token of control loss")
        found.append(f"`{arm}` {verdict}: raw injection is ahead of it by {', '.join(paid)}")
    return "; ".join(found) + "." if found else None
