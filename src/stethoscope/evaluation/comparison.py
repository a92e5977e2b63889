"""Arm against arm, by task and over all tasks: `compare(outcomes)` says what the data show, in numbers and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from stethoscope.display import listed, p_value
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.inference import (
    adjust,
    mcnemar_exact,
    non_inferiority,
    paired_difference,
    ratio_difference,
    smallest_detectable_gain,
    unpaired_z,
)
from stethoscope.evaluation.outcomes import SOURCE, Outcomes, PerDocument
from stethoscope.results.comparison import Comparison, Contrast, Flips, NoiseFloor, TaskContrast
from stethoscope.results.paired import PairedDifference
from stethoscope.results.scale import SHARE, Scale

AGAIN = "_again"  # an arm named so is its namesake evaluated a second time
Costs = Mapping[str, PerDocument]


def compare(
    outcomes: Outcomes,
    *,
    baseline: str = "base",
    family: Sequence[str] | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    losses: Costs | None = None,
    target_losses: Costs | None = None,
    divergences: Costs | None = None,
    metric: str | None = None,
    alpha: float = 0.05,
    margin: float = 0.02,
    margins: Mapping[str, float] | None = None,
    adjustment: str = "holm",
    seed: int = 0,
    inputs: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare arms on the items that they share.

    Args:
        outcomes: results of all arms on the same items; where they have a ``source``, intervals are clustered. An arm
            named like another with ``_again`` behind it is that arm evaluated twice: it is compared with nothing, and
            gives the noise floor (`aa_floor`).
        baseline: the arm that every other is compared with.
        family: tasks whose p-values are corrected together, all by default; the others are controls, corrected among
            themselves.
        pairs: arms to compare, as (a, b) with b under test. If not given: every arm against the baseline, every edit
            against ``tuned``, and ``recommended`` and ``selected`` against every other edit.
        losses, target_losses, divergences: of each arm on the same documents: loss on control text and on held-out
            target text, and divergence from the base, whose own is zero.
        metric: the metric that decides; each task's own (`Outcomes.metric_of`) if not given.
        alpha: level of every test; intervals have confidence 1 - alpha.
        margin: the loss that non-inferiority would accept, of shares; ``margins`` has others by task, each in its
            metric's unit. Other metrics than shares have no margin unless one is given there.
        adjustment: ``holm`` or ``bh``.
        seed: of the bootstrap.
        inputs: hashes of what the outcomes were made from, by name; kept with the result.

    Raises:
        EvaluationError: arms that met other items, or names that are not there.
    """
    outcomes.check_comparable()
    arms, tasks = outcomes.arms, list(dict.fromkeys(outcomes.tasks if family is None else family))
    twice = {again: arm for again in arms if (arm := again.removesuffix(AGAIN)) != again and arm in arms}
    if pairs is None:
        pairs = _default_pairs([arm for arm in arms if arm not in twice], baseline)
    unknown = [name for name in (baseline, *(arm for pair in pairs for arm in pair)) if name not in arms]
    unknown += [name for name in (*tasks, *(margins or {})) if name not in outcomes.tasks]
    unknown += [metric] if metric is not None and metric not in outcomes.metrics else []
    if unknown or not tasks:
        raise EvaluationError(
            "these outcomes do not hold what is to be compared",
            problems=[f"`{name}`" for name in dict.fromkeys(unknown)] or ["no task"],
            hint=f"arms: {', '.join(arms)}; tasks: {', '.join(outcomes.tasks)}; metrics: {', '.join(outcomes.metrics)}",
        )
    controls = [name for name in outcomes.tasks if name not in tasks]
    contrasts = []
    for a, b in pairs:
        pair = _Pair(outcomes=outcomes, a=a, b=b, alpha=alpha, seed=seed)
        compared = []
        for names in (tasks, controls):
            found = [pair.on_task(t, metric or outcomes.metric_of(t), margin, margins or {}) for t in names]
            adjusted = adjust([entry.pop("p_value") for entry in found], adjustment)
            for entry, p in zip(found, adjusted, strict=True):
                task = TaskContrast(**entry, in_family=names is tasks, p_adjusted=p)
                compared.append(replace(task, verdict=_task_verdict(task, a, b, alpha)))
        significant = [t for t in compared if t.p_adjusted is not None and t.p_adjusted < alpha]
        contrast = Contrast(
            a=a, b=b, tasks=compared, **pair.pooled([t for t in compared if t.in_family]),
            improved=[t.task for t in significant if t.difference.difference > 0],
            worsened=[t.task for t in significant if t.difference.difference < 0],
            not_degraded=[t.task for t in compared if t.non_inferiority.shown],
            loss=pair.on_text(losses), divergence=pair.on_text(divergences), target_loss=pair.on_text(target_losses),
            verdict="",
        )  # fmt: skip
        contrasts.append(replace(contrast, verdict=_overall_verdict(contrast, margin=margin, alpha=alpha)))
    return Comparison(
        seed=seed, inputs=dict(inputs or {}), baseline=baseline, family=tasks, controls=controls, alpha=alpha,
        margin=margin, adjustment=adjustment, accuracy=_accuracy(outcomes, metric), contrasts=contrasts,
        scales={task: outcomes.scales(task) for task in outcomes.tasks},
        noise=[floor for again, arm in twice.items() for floor in aa_floor(outcomes, arm, again, metric=metric)],
    )  # fmt: skip


def aa_floor(outcomes: Outcomes, arm: str, again: str, *, metric: str | None = None) -> list[NoiseFloor]:
    """How many items of each task change their result, by ``metric`` as in `compare`, when an arm runs ``again``.

    Greedy decoding is deterministic for a fixed composition of batches. Another batch size, device or version rounds in
    another order and may flip items whose two best tokens nearly tie.
    """
    floors = []
    for task in outcomes.tasks:
        one, two = outcomes.rows(arm, task), outcomes.rows(again, task)
        name = metric or outcomes.metric_of(task)
        changed, n = len(one[name].compare(two[name])), len(one)
        low, high = stats.binomtest(changed, n).proportion_ci(0.95, method="exact")
        kept = bool(one["response"].notna().all() and two["response"].notna().all())
        floors.append(
            NoiseFloor(
                task=task, arm=arm, again=again, n=n, changed=changed, share=changed / n, low=float(low),
                high=float(high), responses=int((one["response"] != two["response"]).sum()) if kept else None,
            )
        )  # fmt: skip
    return floors


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Arm ``b`` against arm ``a``; every bootstrap begins with the same seed."""

    outcomes: Outcomes
    a: str
    b: str
    alpha: float
    seed: int

    @property
    def _bootstrap(self) -> dict[str, Any]:
        return {"confidence": 1 - self.alpha, "rng": np.random.default_rng(self.seed)}

    def on_task(self, task: str, metric: str, margin: float, margins: Mapping[str, float]) -> dict[str, Any]:
        """The fields of a `TaskContrast`, without what takes the other tasks, and ``p_value``, not yet corrected."""
        rows_a, rows_b = (self.outcomes.rows(arm, task) for arm in (self.a, self.b))
        x, y = (rows[metric].to_numpy(dtype=np.float64) for rows in (rows_a, rows_b))
        if unscored := [arm for arm, values in ((self.a, x), (self.b, y)) if np.isnan(values).any()]:
            raise EvaluationError(
                f"task `{task}` has items without `{metric}`",
                problems=[f"arm `{arm}`" for arm in unscored],
                hint=f"choose a metric that scores every item; there are: {', '.join(self.outcomes.metrics)}",
            )
        scale, means = self.outcomes.scale(task, metric), (float(x.mean()), float(y.mean()))
        if scale.higher_is_better is False:  # turned, so that more is better in all that follows
            x, y = (1 - x, 1 - y) if scale.is_share else (-x, -y)
        sources, n = _sources(rows_a), len(x)
        unfit = "" if np.isin([x, y], (0, 1)).all() else f"`{metric}` is not 0 or 1 for every item"
        why = unfit or ("" if sources is None else "items share sources")  # no exact test fits
        method: Literal["bootstrap", "score"] = "bootstrap" if why else "score"
        difference = paired_difference(x, y, method=method, clusters=sources, **self._bootstrap)
        limit = margins.get(task, margin if scale.is_share else None)
        flips = None if unfit or "," in metric else _flips(rows_a, rows_b, x, y)
        unknown = "only the first filter's extraction is recorded" if "," in metric else "no extraction is recorded"
        reasons = {} if flips else {"flips": unfit or unknown}
        found: dict[str, Any] = {
            "task": task, "metric": metric, "scale": scale, "n": n, "accuracy_a": means[0], "accuracy_b": means[1],
            "difference": difference, "flips": flips, "reasons": reasons,
            "non_inferiority": non_inferiority(x, y, limit, clusters=sources, **self._bootstrap),
        }  # fmt: skip
        if why:
            lacking, p = ("unpaired", "mcnemar", "smallest_detectable_gain"), difference.p_value
            reasons |= dict.fromkeys(lacking, why)
            reasons |= {"p_adjusted": str(difference.reason)} if p is None else {"p": f"of a paired t-test, as {why}"}
            return found | dict.fromkeys(lacking) | {"p_value": p}
        detectable = smallest_detectable_gain(n, float((x != y).mean()), alpha=self.alpha)
        if detectable.reason:
            reasons["smallest_detectable_gain"] = detectable.reason
        return found | {
            "unpaired": unpaired_z(int(x.sum()), n, int(y.sum()), n),
            "mcnemar": (test := mcnemar_exact(int((x > y).sum()), int((y > x).sum()))),
            "p_value": test.p_value,
            "smallest_detectable_gain": detectable.gain,
        }

    def pooled(self, family: Sequence[TaskContrast]) -> dict[str, Any]:
        """The tasks of the family that share a unit as one, items resampled within tasks."""
        unit = SHARE if any(t.scale.is_share for t in family) else family[0].scale.unit
        family = [t for t in family if t.scale.unit == unit]
        rows = {arm: [self.outcomes.rows(arm, t.task) for t in family] for arm in (self.a, self.b)}
        signs = [-1 if t.scale.higher_is_better is False else 1 for t in family]
        x, y = (
            np.concatenate([sign * r[t.metric] for r, t, sign in zip(own, family, signs, strict=True)])
            for own in rows.values()
        )
        known = [(_sources(own), own["item"].to_numpy(dtype=np.str_)) for own in rows[self.a]]
        shared = any(labels is not None for labels, _ in known)  # an item without a source is one of its own
        sources = np.concatenate([own if labels is None else labels for labels, own in known]) if shared else None
        strata = np.repeat(np.arange(len(family)), [t.n for t in family])
        tests = [t.mcnemar for t in family if t.mcnemar]
        exact = mcnemar_exact(sum(m.b for m in tests), sum(m.c for m in tests)) if len(tests) == len(family) else None
        return {
            "scale": Scale(unit=unit),
            "pooled": paired_difference(x, y, strata=strata, clusters=sources, **self._bootstrap),
            "pooled_mcnemar": exact,
        }

    def on_text(self, costs: Costs | None) -> PairedDifference | None:
        """Difference of a cost in nats per token, over documents; None where it was not measured for both arms."""
        if not costs or self.a not in costs or self.b not in costs:
            return None
        one, two = costs[self.a], costs[self.b]
        if not np.array_equal(one.tokens, two.tokens):
            raise EvaluationError("the control texts of two arms are not the same documents", hint="measure them again")
        used = one.tokens > 0
        return ratio_difference(one.sums[used], two.sums[used], one.tokens[used], **self._bootstrap)


def _accuracy(outcomes: Outcomes, metric: str | None) -> list[dict[str, Any]]:
    table = outcomes.accuracy(metric).astype(object)
    means = outcomes.frame.groupby(["task", "arm"])[outcomes.metrics].mean()
    rows = []
    for row in table.where(table.notna(), None).to_dict("records"):
        known = means.loc[(row["task"], row["arm"])].dropna()
        rows.append({**{str(k): v for k, v in row.items()}, "metrics": {str(k): float(v) for k, v in known.items()}})
    return rows


def _default_pairs(arms: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    pairs = [(baseline, arm) for arm in arms if arm != baseline]
    edits = [arm for arm in arms if arm not in (baseline, "tuned")]
    if "tuned" in arms and baseline != "tuned":
        pairs += [("tuned", arm) for arm in edits]
    for edit in ("recommended", "selected"):
        if edit in edits:
            pairs += [(arm, edit) for arm in edits if arm != edit and (edit, arm) not in pairs]
    return pairs + [(arm, f"{arm}_energy_matched") for arm in edits if f"{arm}_energy_matched" in edits]


def _sources(rows: pd.DataFrame) -> NDArray[Any] | None:
    """Which items share a source, where that is known."""
    if SOURCE not in rows or rows[SOURCE].isna().any():
        return None
    return rows[SOURCE].to_numpy(dtype=np.str_)


def _flips(rows_a: pd.DataFrame, rows_b: pd.DataFrame, x: NDArray[np.float64], y: NDArray[np.float64]) -> Flips | None:
    """Items that changed, by what was wrong with the failed response; None where no extraction is recorded."""
    both = pd.concat([rows_a, rows_b])
    if both["extracted"].isna().any():
        return None
    unknown = bool(both["truncated"].isna().any())
    causes = ("format", "correctness") if unknown else ("format", "truncation", "correctness")

    def count(failed: pd.DataFrame) -> dict[str, int]:
        cut = failed["truncated"].fillna(False).astype(bool) & (not unknown)
        cause = np.where(failed["extracted"].astype(bool), "correctness", np.where(cut, "truncation", "format"))
        return {name: int((cause == name).sum()) for name in causes}

    reason = "whether responses were cut off is not recorded, so `format` counts those too" if unknown else None
    return Flips(gained=count(rows_a[y > x]), lost=count(rows_b[x > y]), reason=reason)


def _overall_verdict(contrast: Contrast, *, margin: float, alpha: float) -> str:
    """One sentence on a whole contrast: gain or not, over the family; what got worse; what is ruled out; its cost."""
    a, b, pooled, worsened = contrast.a, contrast.b, contrast.pooled, listed(contrast.worsened)
    pooled_over, unknown = len(contrast.together), [t for t in contrast.tasks if t.scale.higher_is_better is None]
    tested = f"{pooled_over} task{'' if pooled_over == 1 else 's'}"
    tested += "" if pooled_over == len(contrast.family) else f" of {len(contrast.family)}, the others in other units"
    better = sum(t.task in contrast.improved for t in contrast.family)
    differs = contrast.significant(alpha)
    gain = f"{contrast.gain} over {tested}"
    if pooled.low is not None and differs != (pooled.above or pooled.below):
        gain += ", an interval that the test does not bear out"
    if better and pooled.difference <= 0:
        words = f"Mixed: `{b}` against `{a}` gives {gain}, but is significantly better on {listed(contrast.improved)}"
        words += f" and worse on {worsened}" if worsened else ""
    elif better or (differs and pooled.difference > 0):
        if worsened:
            words = f"Mixed: `{b}` against `{a}` gains {gain}, but is significantly worse on {worsened}"
        else:
            where = f"significantly in {better} of them" if better else "though significantly in no single one"
            words = f"`{b}` beats `{a}` by {gain}, {where}"
    elif differs or (worsened and pooled.difference <= 0):
        words = f"`{b}` is worse than `{a}`: {gain}" + (f", significantly on {worsened}" if worsened else "")
    else:
        words = f"No evidence of benefit: `{b}` against `{a}` gives {gain}"
        words += f", and is significantly worse on {worsened}" if worsened else ""
    bounded = [t for t in contrast.tasks if t.non_inferiority.margin is not None]
    everywhere = all(t.scale.is_share and t.non_inferiority.margin == margin for t in bounded)
    bound = f"a loss of {100 * margin:g} points" if everywhere else "a loss of its margin"
    safe, tasks = len(contrast.not_degraded), len(contrast.tasks)
    if bounded:
        where = "every task" if safe == tasks else f"{safe} of {len(bounded)} tasks"
        words += f"; {bound} or more is ruled out in {where}"
    measured = contrast.target_loss, contrast.loss, contrast.divergence
    for what, change in zip(("target loss", "control loss", "divergence from the base"), measured, strict=True):
        if change is not None:
            words += f"; {what} {change.difference:+.3f} nats per token"
            words += "" if change.low is None else f" ({change.text('+.3f')})"
    if unknown:
        which = listed(f"`{t.metric}` of {t.task}" for t in unknown)
        words += f"; whether more is better is not known of {which}, and is taken to be so"
    return words + "."


def _task_verdict(task: TaskContrast, a: str, b: str, alpha: float) -> str:
    """One sentence on one task: do the arms differ, and is a loss of the margin ruled out."""
    difference, bound, scale = task.difference, task.non_inferiority, task.scale
    differs = task.p_adjusted is not None and task.p_adjusted < alpha
    p = "" if task.p_adjusted is None else f", adjusted p = {p_value(task.p_adjusted)}"
    known = {True: "", False: ", lower is better", None: ", if more is better"}[scale.higher_is_better]
    gain = f"({scale.words(difference.difference)}{known}{p})"
    if not differs:
        words = f"no evidence that `{b}` and `{a}` differ {gain}"
    else:
        words = f"`{b}` is {'better' if difference.difference > 0 else 'worse'} than `{a}` {gain}"
    if bound.margin is None:
        return f"{words}."
    margin = f"a loss of {scale.factor * bound.margin:g} {scale.of_gains} or more is"
    if bound.shown is None:
        return f"{words}; whether {margin} ruled out is not defined: {bound.reason}."
    return f"{words}; {margin}{'' if bound.shown else ' not'} ruled out."
