"""What a comparison comes to: a sentence on whether to use the edit, and a row for each model that matters."""

from stethoscope.display import NONE, Rows, listed, short_names, table_of
from stethoscope.results.comparison import Comparison, Contrast, is_random

FREE = 0.01  # nats per token by which the loss may rise before that counts as damage
SHOWN = ("recommended", "selected", "random_layers", "scaled", "projected")  # the arms to show first
MOST = 6


def headline(comparison: Comparison) -> str:
    """Whether to use the edit, with what it gains and costs, in one sentence."""
    contrast = comparison.find(comparison.edit)
    if contrast is None:
        return comparison.verdict
    if unknown := [f"`{t.metric}` of {t.task}" for t in contrast.family if t.scale.higher_is_better is None]:
        return (
            f"Judge this edit yourself: it is not known whether more is better of {listed(unknown)} ({contrast.gain})."
        )
    gain, certain = contrast.gain, contrast.significant(comparison.alpha)
    if not certain or contrast.pooled.difference <= 0:
        why = "it is worse than the base model" if certain else "no evidence that it is better than the base model"
        return f"Do not use this edit: {why} ({gain})."
    share = share_of_gain(comparison, contrast)
    gains = f"it gains {gain}" + (f", {share} of the fine-tune's gain" if share else "")
    if cost := damage(comparison, contrast):
        return f"Use this edit only if its damage is acceptable: {gains}, but {cost}."
    return f"Use this edit: {gains}, and nothing that was measured became clearly worse."


def damage(comparison: Comparison, contrast: Contrast) -> str:
    """What an arm clearly made worse, tasks and control text; empty for nothing."""
    found = []
    if contrast.worsened:
        names = short_names([*comparison.family, *comparison.controls])
        found.append(f"is significantly worse on {listed(names[task] for task in contrast.worsened)}")
    if (loss := contrast.loss) and loss.above and loss.difference > FREE:
        found.append(f"raises the loss on control text by {loss.difference:.3f} nats per token")
    return " and ".join(found)


def share_of_gain(comparison: Comparison, contrast: Contrast) -> str:
    """An arm's gain in percent of the whole fine-tune's; empty where that has no certain gain."""
    tuned = comparison.find("tuned")
    if tuned is None or not tuned.pooled.above:
        return ""
    return f"{contrast.pooled.difference / tuned.pooled.difference:.0%}"


def overview(comparison: Comparison) -> Rows:
    """A row for the baseline, the edit, the arms that it has to beat, and the whole fine-tune; six at most.

    One set of random layers stands for all.
    """
    names = short_names([*comparison.family, *comparison.controls])
    tasks = comparison.together
    scales = {comparison.scale(task) for task in tasks}
    scale = comparison.scale(tasks[0])
    result = scale.label or "accuracy, %"
    compared = [arm for arm in comparison.arms if comparison.find(arm)]
    first = [next((arm for arm in compared if arm.startswith(name)), None) for name in SHOWN]
    others = [arm for arm in compared if not is_random(arm) and arm != "tuned"]
    chosen = list(dict.fromkeys([*filter(None, first), *others]))[: MOST - 2]
    rows = []
    for arm in (comparison.baseline, *chosen, *(["tuned"] if "tuned" in compared else [])):
        found = [r["accuracy"] for r in comparison.accuracy if r["arm"] == arm and r["task"] in tasks]
        row = dict.fromkeys(("gain", "of the fine-tune's", "control loss, nats", "significantly worse on"), "")
        if contrast := comparison.find(arm):
            loss = contrast.loss
            row = {
                "gain": contrast.gain,
                "of the fine-tune's": share_of_gain(comparison, contrast),
                "control loss, nats": f"{loss.difference:+.3f} ({loss.text('+.3f')})" if loss else "",
                "significantly worse on": listed(names[task] for task in contrast.worsened),
            }
        rows.append({"model": arm, result: scale.text(sum(found) / len(found)) if len(scales) == 1 else NONE, **row})
    filled = [head for head in rows[0] if any(row[head] for row in rows)]
    return table_of({head: row[head] for head in filled} for row in rows)
