"""The scalpel, examined: what feature directions keep of the task vector, and whether cutting along them helps."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import altair as alt

from stethoscope.report.look import COLOURS, axis, configured, title, y_axis
from stethoscope.report.tables import NONE, Row, percent
from stethoscope.report.words import points, signed
from stethoscope.results.comparison import Comparison, Contrast
from stethoscope.results.geometry import Draws, Geometry, LayerGeometry

_KEPT = "energy of the layer's change that is kept, %"
_HYBRIDS = ("hybrid", "filtered")


def energy_by_layer(geometry: Geometry, selected: Sequence[int] = (), *, width: int = 640) -> alt.LayerChart:
    """What each layer's top features keep of its change, above what random features and random directions keep.

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
    base = alt.Chart(alt.NamedData(name="layers")).encode(
        x=alt.X("layer:Q", title="layer", axis=axis("d"), scale=alt.Scale(nice=False, padding=12))
    )
    y: dict[str, Any] = {"title": None, "axis": y_axis(".3~f")}
    band = base.mark_area(color=COLOURS["null"]).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    chance = base.mark_line(color=COLOURS["muted"], strokeDash=[4, 3], strokeWidth=1.5).encode(y=alt.Y("chance:Q", **y))
    dots = base.mark_point(filled=True, opacity=1).encode(
        y=alt.Y("kept:Q", **y),
        color=alt.condition("datum.selected", alt.value(COLOURS["selected"]), alt.value(COLOURS["other"])),
        shape=alt.condition("datum.selected", alt.value("diamond"), alt.value("circle")),
        size=alt.condition("datum.selected", alt.value(110), alt.value(55)),
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
        color=alt.condition("datum.selected", alt.value(COLOURS["selected"]), alt.value(COLOURS["other"])),
        opacity=alt.condition("datum.selected", alt.value(1), alt.value(0.35)),
        tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("features:Q"), alt.Tooltip("kept:Q"), alt.Tooltip("chance:Q")],
    )
    chance = base.mark_line(color=COLOURS["ink"], strokeDash=[4, 3], strokeWidth=1.5).encode(y=alt.Y("chance:Q", **y))
    chosen = sorted({layer.features for layer in geometry.layers})
    rule = alt.Chart(alt.Data(values=[{"features": number} for number in chosen]))
    mark = rule.mark_rule(color=COLOURS["muted"], strokeDash=[2, 3]).encode(x="features:Q")
    chart = alt.layer(mark, lines, chance)
    return configured(chart.properties(width=width, height=280, title=title(_KEPT), datasets={"curves": rows}))


def geometry_rows(geometry: Geometry) -> list[Row]:
    """A row per layer, per kind of module and for all; shares in percent."""
    rows = [_layer_row(layer) for layer in geometry.layers]
    sums = {**{f"all {kind}": kept for kind, kept in geometry.kinds.items()}, "all": geometry.total}
    empty = dict.fromkeys(rows[0], "") if rows else {}
    return rows + [
        {
            **empty,
            "layer": name,
            "kept, %": percent(kept.share),
            "chance": percent(kept.chance),
            "random features": _drawn(kept.random_features),
            "over chance": _over(kept.over_chance, kept.interval),
        }
        for name, kept in sums.items()
    ]


def _layer_row(layer: LayerGeometry) -> Row:
    kept, needed = layer.kept, layer.curve.needed
    ranks = [t.effective_rank for t in layer.tensors if t.effective_rank is not None]
    overlaps = [t.overlap for t in layer.tensors if t.overlap is not None]
    return {
        "layer": str(layer.layer),
        "features": str(layer.features),
        "rank": str(layer.rank),
        "kept, %": percent(kept.share),
        "chance": percent(kept.chance),
        "random features": _drawn(kept.random_features),
        "over chance": _over(kept.over_chance, kept.interval),
        "functional": " / ".join(f"{percent(share)} {name}" for name, share in layer.functional.items()) or NONE,
        "its chance": " / ".join(percent(share) for share in layer.functional_chance.values()) or NONE,
        "features for 50, 90, 99 %": " / ".join(str(needed.get(part) or NONE) for part in ("50", "90", "99")),
        "writes where they read": f"{percent(layer.written.share)} ({percent(layer.written.chance)})"
        if layer.written
        else NONE,
        "effective rank": f"{median(ranks):.1f}" if ranks else NONE,
        "in leading directions": percent(sum(overlaps) / len(overlaps)) if overlaps else NONE,
    }


def _drawn(draws: Draws) -> str:
    return f"{percent(draws.low)} to {percent(draws.high)}"


def _over(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


class _Gain(NamedTuple):
    """What one arm gains over another, with its interval, and how that reads."""

    value: float
    low: float | None
    high: float | None
    text: str

    @property
    def up(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def down(self) -> bool:
        return self.high is not None and self.high < 0


def answers(comparison: Comparison) -> list[tuple[str, str]]:
    """The three questions that the cut arms were made for, each with what the data say; empty without such arms.

    Gains are falls of loss on held-out target text where that was measured, else accuracy on the target tasks.
    """
    return [found for found in (_why_weak(comparison), _thrown_away(comparison), _hybrids(comparison)) if found]


def _gain(comparison: Comparison, b: str, a: str | None = None) -> _Gain | None:
    contrast = comparison.find(b, a)
    return _read(contrast) if contrast else None


def _accuracy(contrast: Contrast) -> _Gain:
    pooled = contrast.pooled
    return _Gain(pooled.difference, pooled.low, pooled.high, points(pooled))


def _read(contrast: Contrast) -> _Gain:
    if (loss := contrast.target_loss) is None:
        return _accuracy(contrast)
    low, high = (None if end is None else -end for end in (loss.high, loss.low))
    text = f"{signed(-loss.difference, 3)} nats per token"
    if low is not None and high is not None:
        text += f" ({signed(low, 3)} to {signed(high, 3)})"
    return _Gain(-loss.difference, low, high, text)


def _why_weak(comparison: Comparison) -> tuple[str, str] | None:
    question = "Is the projected edit weak because it is small, because its direction is wrong, or both?"
    raw, cut = _gain(comparison, "selected"), _gain(comparison, "projected")
    lost = _gain(comparison, "selected", "projected")
    if raw is None or cut is None or lost is None:
        return None
    if not raw.up:
        return question, f"Not answered: the raw edit itself has no clear gain here ({raw.text})."
    if not lost.up:
        return question, f"It is not shown to be weak: raw over projected is {lost.text}."
    weak = f"Raw gains {raw.text}, projected {cut.text}"
    matched = _gain(comparison, "projected_energy_matched")
    still = _gain(comparison, "selected", "projected_energy_matched")
    mended = _gain(comparison, "projected_energy_matched", "projected")
    if matched is None or still is None or mended is None:
        return question, f"{weak}. The arm `projected_energy_matched` would tell which."
    reason = {
        (True, False): "Because it is small",
        (False, True): "Because its direction is wrong",
        (True, True): "Both",
        (False, False): "Undecided",
    }[mended.up, still.up]
    text = f"{reason}. {weak}; at the raw edit's norm it gains {matched.text}, {matched.value / raw.value:.0%} of raw."
    chance = _gain(comparison, "random_subspace_energy_matched")
    if chance:
        text += f" As many random directions at that norm give {chance.value / raw.value:.0%} ({chance.text})."
    return question, text


def _thrown_away(comparison: Comparison) -> tuple[str, str] | None:
    question = "Is what was thrown away what worked?"
    raw, rest = _gain(comparison, "selected"), _gain(comparison, "complement")
    less = _gain(comparison, "selected", "complement")
    if raw is None or rest is None or less is None:
        return None
    if not raw.up:
        return question, f"Not answered: the raw edit itself has no clear gain here ({raw.text})."
    share = f"without the features' directions the edit gains {rest.text}, {rest.value / raw.value:.0%} of raw"
    if not rest.up:
        return question, f"No: {share}."
    if less.up:
        return question, f"In part: {share}, and clearly less than it (raw is ahead by {less.text})."
    return question, f"Yes: {share}, and not clearly less than it."


def _hybrids(comparison: Comparison) -> tuple[str, str] | None:
    found = []
    for arm in _HYBRIDS:
        contrast = comparison.find("selected", arm)  # raw over the hybrid
        if contrast is None:
            continue
        gain, right, cost = _read(contrast), _accuracy(contrast), contrast.loss
        dearer = bool(cost and cost.high is not None and cost.high < 0)  # raw costs clearly less
        cheaper = bool(cost and cost.low is not None and cost.low > 0)
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
    return ("Does any hybrid beat raw injection on the trade-off?", "; ".join(found) + ".") if found else None
