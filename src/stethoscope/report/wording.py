"""The report's sentences: what the comparison shows, said so that "no evidence of benefit" can be said."""

from typing import NamedTuple

from stethoscope.display import interval, listed, ranged
from stethoscope.results.comparison import Comparison, Contrast, is_random
from stethoscope.results.diagnosis import Diagnosis, LayerDiagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection

# Fewer items than this per task leave intervals of about 14 points or more.
SMALL_SAMPLE = 200

_ARMS = {
    "base": "the base model, unchanged",
    "tuned": "the whole fine-tune: every layer's weight change",
    "recommended": "the edit that gains most within the budget of damage on calibration text",
    "selected": "the published method: the raw weight change in the selected layers only",
    "filtered": "the weight change in every layer, filtered",
    "selected_filtered": "the weight change in the selected layers only, filtered",
    "random_layers": "the raw weight change in as many layers, drawn at random",
    "scaled": "the raw weight change in every layer, at the coefficient that gives the selected edit's energy",
    "norm_ranked": "the raw weight change in as many layers, those in which it is largest",
    "bottom_layers": "the raw weight change in as many layers, those that stand out least",
    "random_matched": "the raw weight change in as many layers, drawn among sets of about the same energy",
    "projected": "the weight change in the selected layers, projected onto their top features' directions",
    "projected_energy_matched": "the projected edit, rescaled in each layer to the raw edit's norm",
    "complement": "what the projection throws away: the weight change less its projection",
    "random_subspace": "the weight change projected onto as many random directions",
    "random_subspace_energy_matched": "that, rescaled in each layer to the raw edit's norm",
    "hybrid": "raw in the selected layers; in the others projected onto the fewest features that keep the share",
    "fewest_features": "in the selected layers, projected onto the fewest features that keep the share of energy",
}


def describe_arm(arm: str, edits: Edits | None) -> str:
    """What an arm is, by its name, and which layers it changes; empty for one of the user's own without a plan."""
    text = _ARMS.get("random_layers" if is_random(arm) else arm, "")
    plan = edits.plans.get(arm) if edits else None
    if plan is None or not plan["layers"] or plan["default"]:
        return text
    return f"{text}{': ' if text else ''}layers {ranged(map(int, plan['layers']))}"


def findings(comparison: Comparison, geometry: Geometry | None) -> list[tuple[str, str]]:
    """What else the arms show, as pairs of a heading and sentences."""
    found = []
    for other, heading in {"selected": "Against the published method", "scaled": "Against the scaled change"}.items():
        if contrast := comparison.find("recommended", other):
            found.append((heading, contrast.verdict))
    if rivals := _against_random(comparison):
        found.append(("Against random layers", rivals))
    if everywhere := comparison.find("selected", "scaled"):
        found.append(("Against all layers at equal energy", everywhere.verdict))
    if tuned := comparison.find("tuned"):
        found.append(("The whole fine-tune", tuned.verdict + _share_kept(comparison, tuned)))
    if projected := comparison.find("projected"):
        found.append(("Projected", f"{projected.verdict} {geometry.verdict if geometry else ''}".strip()))
    return found


def _against_random(comparison: Comparison) -> str:
    contrasts = [c for c in comparison.contrasts if c.b == "selected" and is_random(c.a)]
    if not contrasts:
        return ""
    clear = [c.pooled.difference for c in contrasts if c.significant(comparison.alpha)]
    better, worse, total = sum(d > 0 for d in clear), sum(d < 0 for d in clear), len(contrasts)

    def sets(count: int) -> str:
        if total == 1:
            return "the random layer set"
        every = "both" if total == 2 else f"all {total}"
        return f"{every} random layer sets" if count == total else f"{count} of {total} random layer sets"

    if better:
        says = f"The selected layers beat {sets(better)}" + (f" and do worse than {sets(worse)}" if worse else "")
    elif worse:
        says = f"The selected layers do worse than {sets(worse)}"
    else:
        says = "No evidence that the selected layers are better than random ones"
    differences = "; ".join(f"{c.gain} over `{c.a}`" for c in contrasts)
    return f"{says}, on all target items together: {differences}."


def _share_kept(comparison: Comparison, tuned: Contrast) -> str:
    """What share of the whole fine-tune's gain and cost the selected layers have, where both are clearly above 0."""
    selected = comparison.find("selected")
    if selected is None or not (selected.is_better(comparison.alpha) and tuned.is_better(comparison.alpha)):
        return ""
    words = f" The selected layers alone give {selected.pooled.difference / tuned.pooled.difference:.0%} of its gain"
    if tuned.loss and selected.loss and tuned.loss.above and selected.loss.above:
        words += f" and {selected.loss.difference / tuned.loss.difference:.0%} of its control loss"
    return words + "."


def notices(
    diagnosis: Diagnosis, comparison: Comparison, selection: Selection | None = None, edits: Edits | None = None
) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    sizes = [t.n for c in comparison.contrasts for t in c.tasks]
    if sizes and min(sizes) < SMALL_SAMPLE:
        items = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        text = f"Small sample: {items} items per task."
        contrast = comparison.find(comparison.edit)
        # the median over target tasks of the smallest gain of the edit that would be seen
        if gains := sorted(t.smallest_detectable_gain or 1.0 for t in contrast.family) if contrast else []:
            least = gains[len(gains) // 2]
            seen = f"below about {100 * least:.0f} points " if least < 1 else ""
            text += f" A true gain {seen}in one task may well be missed."
        found.append(f"{text} Run more items before acting on this.")
    doubts = selection.warnings if selection else ()
    warnings = [*diagnosis.warnings, *doubts, *(f"the arm {warning}" for warning in (edits.warnings if edits else ()))]
    return [*found, *(warning[:1].upper() + warning[1:] + "." for warning in warnings)]


def layer_facts(layer: LayerDiagnosis, diagnosis: Diagnosis) -> str:
    """One layer's standing, in a sentence or two."""
    others = "" if len(diagnosis.controls) < 2 else f", against `{layer.against}`, the control it stands out least from"
    text = (
        f"Excess over chance {layer.excess:+.3f} (z {layer.z:.1f}), rank {layer.rank} of {len(diagnosis.layers)}, as"
        f" high or higher in {layer.stability:.0%} of resamples{others}. It adds {layer.increment:+.3f} (z"
        f" {layer.increment_z:.1f}) to the layer before it."
    )
    return f"{text} Excluded: {layer.flag}." if layer.flag else text


class _Gain(NamedTuple):
    """What one arm gains over another, whether it is clearly above or below 0, and the gain in words."""

    value: float
    above: bool
    below: bool
    text: str


def _gained(contrast: Contrast, *, accuracy: bool = False) -> _Gain:
    """The fall of loss on held-out target text where that was measured, else, or if asked for, the rise of accuracy."""
    loss, pooled = contrast.target_loss, contrast.pooled
    if loss is None or accuracy:
        certain = contrast.significant(1 - pooled.confidence)
        return _Gain(
            pooled.difference, certain and pooled.difference > 0, certain and pooled.difference < 0, contrast.gain
        )
    text = f"{-loss.difference:+.3f} nats per token"
    if loss.low is not None and loss.high is not None:
        text += f" ({interval(-loss.high, -loss.low, '+.3f')})"
    return _Gain(-loss.difference, loss.below, loss.above, text)


def answers(comparison: Comparison) -> list[tuple[str, str]]:
    """Three questions and what the arms that project say of each; those without their arms are left out.

    Gains are falls of loss on held-out target text where that was measured, else accuracy on the target tasks.
    """
    weak = "Is the projected edit weak because it is small, because its direction is wrong, or both?"
    asked = {
        weak: _why_weak(comparison),
        "Is what was thrown away what worked?": _thrown_away(comparison),
        "Does any hybrid beat raw injection on the trade-off?": _hybrids(comparison),
    }
    return [(question, answer) for question, answer in asked.items() if answer]


def _gain(comparison: Comparison, b: str, a: str | None = None) -> _Gain | None:
    contrast = comparison.find(b, a)
    return _gained(contrast) if contrast else None


def _why_weak(comparison: Comparison) -> str | None:
    raw, cut = _gain(comparison, "selected"), _gain(comparison, "projected")
    lost = _gain(comparison, "selected", "projected")
    if raw is None or cut is None or lost is None:
        return None
    if not raw.above:
        return _no_raw_gain(raw)
    if not lost.above:
        return f"It is not shown to be weak: raw over projected is {lost.text}."
    weak = f"Raw gains {raw.text}, projected {cut.text}"
    matched = _gain(comparison, "projected_energy_matched")
    still = _gain(comparison, "selected", "projected_energy_matched")
    mended = _gain(comparison, "projected_energy_matched", "projected")
    if matched is None or still is None or mended is None:
        return f"{weak}. The arm `projected_energy_matched` would tell which."
    size, direction = mended.above, still.above
    one = "Because it is small" if size else "Because its direction is wrong" if direction else "Undecided"
    reason = "Both" if size and direction else one
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
    if not raw.above:
        return _no_raw_gain(raw)
    share = f"without the features' directions the edit gains {rest.text}, {rest.value / raw.value:.0%} of raw"
    if not rest.above:
        return f"No: {share}."
    if less.above:
        return f"In part: {share}, and clearly less than it (raw is ahead by {less.text})."
    return f"Yes: {share}, and not clearly less than it."


def _hybrids(comparison: Comparison) -> str | None:
    found = []
    for arm in ("hybrid", "fewest_features"):
        contrast = comparison.find("selected", arm)  # raw over the hybrid
        if contrast is None:
            continue
        gain, right, cost = _gained(contrast), _gained(contrast, accuracy=True), contrast.loss
        up, down = gain.above or right.above, gain.below or right.below
        dearer, cheaper = bool(cost and cost.below), bool(cost and cost.above)  # is the hybrid, in control loss
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
        paid = [f"{gain.text} of gain", *([f"{right.text} of accuracy"] if contrast.target_loss else [])]
        paid += [f"{cost.difference:+.3f} nats per token of control loss"] if cost else []
        found.append(f"`{arm}` {verdict}: raw injection is ahead of it by {listed(paid)}")
    return "; ".join(found) + "." if found else None
