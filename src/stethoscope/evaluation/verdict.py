"""What a comparison shows, in one sentence per task and one over all."""

from stethoscope.display import listed, p_value, points
from stethoscope.results.comparison import Contrast, NonInferiority, PairedDifference


def overall_verdict(contrast: Contrast, *, margin: float, alpha: float) -> str:
    """One sentence on a whole contrast: gain or not, over the family; what got worse; what is ruled out; its cost."""
    a, b, pooled, worsened = contrast.a, contrast.b, contrast.pooled, listed(contrast.worsened)
    tested = f"{len(contrast.family)} task{'' if len(contrast.family) == 1 else 's'}"
    better = sum(t.task in contrast.improved for t in contrast.family)
    differs = contrast.significant(alpha)
    gain = f"{points(pooled.difference)} points{_in_brackets(pooled, '+.1f', 100)} over {tested}"
    if better or (differs and pooled.difference > 0):
        if worsened:
            words = f"Mixed: `{b}` against `{a}` gains {gain}, but is significantly worse on {worsened}"
        else:
            where = f"significantly in {better} of them" if better else "though significantly in no single one"
            words = f"`{b}` beats `{a}` by {gain}, {where}"
    elif worsened or (differs and pooled.difference < 0):
        words = f"`{b}` is worse than `{a}`: {gain}" + (f", significantly on {worsened}" if worsened else "")
    else:
        words = f"No evidence of benefit: `{b}` against `{a}` gives {gain}"
    everywhere = {t.non_inferiority.margin for t in contrast.tasks} <= {margin}
    bound = f"a loss of {100 * margin:g} points" if everywhere else "a loss of its margin"
    safe, tasks = len(contrast.not_degraded), len(contrast.tasks)
    words += f"; {bound} or more is ruled out in {'every task' if safe == tasks else f'{safe} of {tasks} tasks'}"
    measured = {
        "target loss": contrast.target_loss,
        "control loss": contrast.loss,
        "divergence from the base": contrast.divergence,
    }
    for what, change in measured.items():
        if change is not None:
            words += f"; {what} {change.difference:+.3f} nats per token{_in_brackets(change, '+.3f', 1)}"
    return words + "."


def task_verdict(
    difference: PairedDifference, bound: NonInferiority, p_adjusted: float | None, a: str, b: str, alpha: float
) -> str:
    """One sentence on one task: do the arms differ, and is a loss of the margin ruled out."""
    differs = difference.above or difference.below if p_adjusted is None else p_adjusted < alpha
    p = "" if p_adjusted is None else f", adjusted p = {p_value(p_adjusted)}"
    gain = f"({points(difference.difference)} points{p})"
    if not differs:
        words = f"no evidence that `{b}` and `{a}` differ {gain}"
    else:
        words = f"`{b}` is {'better' if difference.difference > 0 else 'worse'} than `{a}` {gain}"
    margin = f"a loss of {100 * bound.margin:g} points or more is"
    if bound.shown is None:
        return f"{words}; whether {margin} ruled out is not defined: {bound.reason}."
    return f"{words}; {margin}{'' if bound.shown else ' not'} ruled out."


def _in_brackets(difference: PairedDifference, form: str, scale: int) -> str:
    return "" if difference.low is None or difference.high is None else f" ({difference.text(form, scale)})"
