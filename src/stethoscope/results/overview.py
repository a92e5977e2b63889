"""What a comparison comes to: a sentence on whether to use the edit, and a row for each model that matters."""

from collections.abc import Sequence

from stethoscope.display import Rows, listed, number, short_names, table_of
from stethoscope.results.comparison import Comparison, Contrast, is_random
from stethoscope.results.comparison_tables import by_task

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
    gain, certain, cost = contrast.gain, contrast.significant(comparison.alpha), damage(comparison, contrast)
    if not contrast.is_better(comparison.alpha):
        why = "it is worse than the base model" if certain else "no evidence that it is better than the base model"
        better = _named(comparison, [t.task for t in contrast.family if t.task in contrast.improved])
        if not better:
            return f"Do not use this edit: {why} ({gain})."
        advice = "Do not use this edit" if certain else "Judge this edit yourself"
        though = f"though it is significantly better on {better}" + (f", but {cost}" if cost else "")
        return f"{advice}: {why} over all target items ({gain}), {though}."
    share = share_of_gain(comparison, contrast)
    gains = f"it gains {gain}" + (f", {share} of the fine-tune's gain" if share else "")
    if cost:
        return f"Use this edit only if its damage is acceptable: {gains}, but {cost}."
    but = f" but the loss, by {listed(rises)}" if (rises := _rises(contrast)) else ""
    return f"Use this edit: {gains}, and nothing that was measured became clearly worse{but}."


def damage(comparison: Comparison, contrast: Contrast) -> str:
    """What an arm clearly made worse, tasks and texts; empty for nothing."""
    worse = [f"is significantly worse on {_named(comparison, contrast.worsened)}"] if contrast.worsened else []
    return " and ".join([*worse, *(f"raises the loss by {rise}" for rise in _rises(contrast, FREE))])


def _rises(contrast: Contrast, least: float = 0.0) -> list[str]:
    """By how much, and on which text, a loss clearly rose by more than ``least`` nats per token."""
    losses = {"control": contrast.loss, "held-out target": contrast.target_loss}
    risen = [(name, loss.difference) for name, loss in losses.items() if loss and loss.above]
    return [f"{rise:.3f} nats per token on {name} text" for name, rise in risen if rise > least]


def _named(comparison: Comparison, tasks: Sequence[str]) -> str:
    names = short_names([*comparison.family, *comparison.controls])
    return listed(names[task] for task in tasks)


def share_of_gain(comparison: Comparison, contrast: Contrast) -> str:
    """An arm's gain in percent of the whole fine-tune's; empty where that has no certain gain."""
    tuned = comparison.find("tuned")
    if tuned is None or not tuned.is_better(comparison.alpha):
        return ""
    return f"{contrast.pooled.difference / tuned.pooled.difference:.0%}"


def overview(comparison: Comparison) -> Rows:
    """A row for the baseline, the edit, the arms that it has to beat, and the whole fine-tune; six at most.

    Results are over all target items. One set of random layers stands for all.
    """
    whole = next(line for lines in by_task(comparison).values() for line in lines if line.kind == "total")
    results = dict(zip(comparison.arms, whole.cells, strict=True))
    result = comparison.scale(comparison.together[0]).label or "accuracy, %"
    compared = [arm for arm in comparison.arms if comparison.find(arm)]
    first = [next((arm for arm in compared if arm.startswith(name)), None) for name in SHOWN]
    others = [arm for arm in compared if not is_random(arm) and arm != "tuned"]
    chosen = list(dict.fromkeys([*filter(None, first), *others]))[: MOST - 2]
    rows = []
    for arm in (comparison.baseline, *chosen, *(["tuned"] if "tuned" in compared else [])):
        contrast = comparison.find(arm)
        loss = contrast and contrast.loss
        rows.append(
            {
                "model": arm,
                result: results[arm].value,
                "gain": contrast.gain if contrast else "",
                "of the fine-tune's": share_of_gain(comparison, contrast) if contrast else "",
                "control loss, nats": f"{number(loss.difference, '+.3f')} ({loss.text('+.3f')})" if loss else "",
                "significantly worse on": _named(comparison, contrast.worsened) if contrast else "",
            }
        )
    filled = [head for head in rows[0] if any(row[head] for row in rows)]
    return table_of({head: row[head] for head in filled} for row in rows)
