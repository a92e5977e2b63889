"""The report's sentences: what the comparison shows, said so that "no evidence of benefit" can be said."""

from collections.abc import Sequence

from stethoscope.results.comparison import Comparison, Contrast, PairedDifference, is_random
from stethoscope.results.diagnosis import Diagnosis, LayerDiagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection

# Fewer items than this per task leave intervals of about 14 points or more.
SMALL_SAMPLE = 200
MINUS = "\N{MINUS SIGN}"

_ARMS = {
    "base": "the base model, unchanged",
    "tuned": "the whole fine-tune: every layer's weight change",
    "selected": "the raw weight change in the selected layers only",
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
    "filtered": "in the selected layers, projected onto the fewest features that keep the recipe's share of energy",
}


def describe_arm(arm: str, edits: Edits | None) -> str:
    """What an arm is, by its name, and which layers it changes; empty for one of the user's own without a plan."""
    text = _ARMS.get("random_layers" if is_random(arm) else arm, "")
    plan = edits.plans.get(arm) if edits else None
    if plan is None or not plan["layers"] or plan["default"]:
        return text
    return f"{text}{': ' if text else ''}layers {', '.join(sorted(plan['layers'], key=int))}"


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Tasks' names without the words that they all begin with."""
    parts = [task.split("_") for task in tasks]
    shared = 0
    while len(tasks) > 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1 and shared + 1 < min(map(len, parts)):
        shared += 1
    return {task: "_".join(p[shared:]) for task, p in zip(tasks, parts, strict=True)}


def headline(comparison: Comparison) -> tuple[str, str]:
    """The verdict on the selected layers against the baseline: its first clause, and what follows."""
    contrast = comparison.find("selected") or (comparison.contrasts[0] if comparison.contrasts else None)
    if contrast is None:
        return "Nothing was compared.", ""
    first, _, rest = contrast.verdict.partition("; ")
    return first.rstrip(".") + ".", rest[:1].upper() + rest[1:]


def findings(comparison: Comparison, geometry: Geometry | None) -> list[tuple[str, str]]:
    """What else the arms show, as pairs of a heading and sentences."""
    found = []
    if rivals := _against_random(comparison):
        found.append(("Against random layers", rivals))
    if spread := comparison.find("selected", "scaled"):
        found.append(("Against all layers at equal energy", spread.verdict))
    for arm in comparison.arms:
        contrast = comparison.find(arm)
        if contrast and arm.startswith("tuned"):
            found.append(("The whole fine-tune", contrast.verdict + _share_kept(comparison, contrast)))
        elif contrast and arm == "projected":
            found.append(("Projected", f"{contrast.verdict} {geometry.verdict if geometry else ''}".strip()))
    return found


def _against_random(comparison: Comparison) -> str:
    contrasts = [c for c in comparison.contrasts if c.b == "selected" and is_random(c.a)]
    if not contrasts:
        return ""
    better = sum(c.pooled.difference > 0 and _significant(c, comparison.alpha) for c in contrasts)
    worse = sum(c.pooled.difference < 0 and _significant(c, comparison.alpha) for c in contrasts)
    total = len(contrasts)

    def sets(count: int) -> str:
        if total == 1:
            return "the random layer set"
        every = "both" if total == 2 else f"all {total}"
        return f"{every} random layer sets" if count == total else f"{count} of {total} random layer sets"

    if better:
        says = f"The selected layers beat {sets(better)}"
        if worse:
            says += f" and do worse than {sets(worse)}"
    elif worse:
        says = f"The selected layers do worse than {sets(worse)}"
    else:
        says = "No evidence that the selected layers are better than random ones"
    differences = "; ".join(f"{points(c.pooled)} over `{c.a}`" for c in contrasts)
    return f"{says}, on all target items together: {differences}."


def _share_kept(comparison: Comparison, tuned: Contrast) -> str:
    """What share of the whole fine-tune's gain and cost the selected layers have, where both are clearly above 0."""
    selected = comparison.find("selected")
    if selected is None or not all(c.pooled.clear and c.pooled.difference > 0 for c in (selected, tuned)):
        return ""
    words = f" The selected layers alone give {selected.pooled.difference / tuned.pooled.difference:.0%} of its gain"
    if tuned.loss and selected.loss and all(x.clear and x.difference > 0 for x in (selected.loss, tuned.loss)):
        words += f" and {selected.loss.difference / tuned.loss.difference:.0%} of its control loss"
    return words + "."


def _significant(contrast: Contrast, alpha: float) -> bool:
    if contrast.pooled_mcnemar is not None:
        return contrast.pooled_mcnemar.p_value < alpha
    return contrast.pooled.clear


def notices(
    diagnosis: Diagnosis, comparison: Comparison, selection: Selection | None = None, edits: Edits | None = None
) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    sizes = [t.n for c in comparison.contrasts for t in c.tasks]
    if sizes and min(sizes) < SMALL_SAMPLE:
        items = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        text = f"Small sample: {items} items per task."
        if (least := _resolution(comparison)) is not None:
            seen = f"below about {100 * least:.0f} points " if least < 1 else ""
            text += f" A true gain {seen}in one task would usually be missed."
        found.append(f"{text} Run more items before acting on this.")
    doubts = selection.warnings if selection else ()
    warnings = [*diagnosis.warnings, *doubts, *(f"the arm {warning}" for warning in (edits.warnings if edits else ()))]
    return [*found, *(warning[:1].upper() + warning[1:] + "." for warning in warnings)]


def layer_facts(layer: LayerDiagnosis, diagnosis: Diagnosis) -> str:
    """One layer's standing, in a sentence or two."""
    standing = (
        f"Excess over chance {signed(layer.excess, 3)} (z {layer.z:.1f}), rank {layer.rank} of"
        f" {len(diagnosis.layers)}, as high or higher in {layer.stability:.0%} of resamples"
    )
    against = (
        "" if len(diagnosis.controls) < 2 else f", against `{layer.against}`, the control it stands out least from"
    )
    added = f"{signed(layer.increment, 3)} (z {layer.increment_z:.1f})"
    text = f"{standing}{against}. It adds {added} to the layer before it."
    return f"{text} Not believed: {layer.flag}." if layer.flag else text


def _resolution(comparison: Comparison) -> float | None:
    """The median over target tasks of the smallest gain of the selected arm that would be seen."""
    contrast = comparison.find("selected")
    gains = sorted(t.smallest_detectable_gain or 1.0 for t in contrast.tasks if t.in_family) if contrast else []
    return gains[len(gains) // 2] if gains else None


def points(difference: PairedDifference) -> str:
    """A difference of accuracies in points, with its interval where it has one."""
    text = f"{signed(100 * difference.difference)} points"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} ({signed(100 * difference.low)} to {signed(100 * difference.high)})"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, a true minus, and no sign for what rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)
