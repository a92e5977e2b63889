"""What a comparison shows, in one sentence per task and one over all."""

from stethoscope.results.comparison import McNemar, NonInferiority, PairedDifference, TaskContrast


def overall_verdict(
    *,
    a: str,
    b: str,
    tasks: list[TaskContrast],
    pooled: PairedDifference,
    pooled_mcnemar: McNemar | None,
    improved: list[str],
    worsened: list[str],
    not_degraded: list[str],
    loss: PairedDifference | None,
    divergence: PairedDifference | None,
    target_loss: PairedDifference | None,
    margin: float,
    alpha: float,
) -> str:
    """One sentence on a whole contrast: gain or not, over the family; what got worse; what is ruled out; its cost."""
    family = [t.task for t in tasks if t.in_family]
    better = [name for name in improved if name in family]
    if pooled_mcnemar is not None:
        overall = pooled_mcnemar.p_value < alpha
    else:
        overall = pooled.low is not None and pooled.high is not None and not pooled.low <= 0 <= pooled.high
    tested = "1 task" if len(family) == 1 else f"{len(family)} tasks"
    gain = f"{100 * pooled.difference:+.1f} points"
    if pooled.low is not None and pooled.high is not None:
        gain += f" ({100 * pooled.low:+.1f} to {100 * pooled.high:+.1f})"
    if (better or (overall and pooled.difference > 0)) and worsened:
        words = f"Mixed: `{b}` against `{a}` gains {gain} over {tested}, but is significantly worse"
        words += f" on {', '.join(worsened)}"
    elif better or (overall and pooled.difference > 0):
        words = f"`{b}` beats `{a}` by {gain} over {tested}, "
        words += f"significantly in {len(better)} of them" if better else "though significantly in no single one"
    elif worsened or (overall and pooled.difference < 0):
        words = f"`{b}` is worse than `{a}`: {gain} over {tested}"
        if worsened:
            words += f", significantly on {', '.join(worsened)}"
    else:
        words = f"No evidence of benefit: `{b}` against `{a}` gives {gain} over {tested}"
    everywhere = {t.non_inferiority.margin for t in tasks} <= {margin}
    bound = f"a loss of {100 * margin:g} points" if everywhere else "a loss of its margin"
    where = "every task" if len(not_degraded) == len(tasks) else f"{len(not_degraded)} of {len(tasks)} tasks"
    words += f"; {bound} or more is ruled out in {where}"
    measured = {"target loss": target_loss, "control loss": loss, "divergence from the base": divergence}
    for what, change in measured.items():
        if change is not None:
            words += f"; {what} {change.difference:+.3f} nats per token"
            if change.low is not None and change.high is not None:
                words += f" ({change.low:+.3f} to {change.high:+.3f})"
    return words + "."


def task_verdict(
    difference: PairedDifference, bound: NonInferiority, p_adjusted: float | None, a: str, b: str, alpha: float
) -> str:
    """One sentence on one task: do the arms differ, and is a loss of the margin ruled out."""
    if p_adjusted is not None:
        differs, p = p_adjusted < alpha, f", adjusted p = {p_adjusted:.2g}"
    else:
        low, high = difference.low, difference.high
        differs, p = low is not None and high is not None and not low <= 0 <= high, ""
    gain = f"{100 * difference.difference:+.1f} points{p}"
    if not differs:
        words = f"no evidence that `{b}` and `{a}` differ ({gain})"
    else:
        words = f"`{b}` is {'better' if difference.difference > 0 else 'worse'} than `{a}` ({gain})"
    margin = f"a loss of {100 * bound.margin:g} points or more is"
    if bound.shown is None:
        return f"{words}; whether {margin} ruled out is not defined: {bound.reason}."
    return f"{words}; {margin}{'' if bound.shown else ' not'} ruled out."
