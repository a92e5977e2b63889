"""Arm against arm, by task and over all tasks: `compare(outcomes)` says what the data show, in numbers and words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

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
from stethoscope.evaluation.outcomes import SOURCE, DocumentDivergences, DocumentLosses, Outcomes, PerDocument
from stethoscope.evaluation.verdict import overall_verdict, task_verdict
from stethoscope.results.comparison import Comparison, Contrast, Flips, NoiseFloor, PairedDifference, TaskContrast

AGAIN = "_again"  # an arm named so is its namesake evaluated a second time


def compare(
    outcomes: Outcomes,
    *,
    baseline: str = "base",
    family: Sequence[str] | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    losses: Mapping[str, DocumentLosses] | None = None,
    target_losses: Mapping[str, DocumentLosses] | None = None,
    divergences: Mapping[str, DocumentDivergences] | None = None,
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
        family: tasks whose p-values are corrected together; the others are controls, corrected among themselves. All if
            not given.
        pairs: arms to compare, as (a, b) with b under test. If not given: every arm against the baseline, every edit
            against ``tuned``, and ``selected`` against every other edit.
        losses: control loss per document of each arm, on the same documents.
        target_losses: the same on held-out target text.
        divergences: divergence from the base per document of each arm, on the same documents; the base's is zero.
        metric: the metric that decides; each task's own (`Outcomes.metric_of`) if not given.
        alpha: level of every test; intervals have confidence 1 - alpha.
        margin: the loss of accuracy that non-inferiority would accept.
        margins: another margin for some tasks, by name.
        adjustment: ``holm`` or ``bh``.
        seed: of the bootstrap.
        inputs: hashes of what the outcomes were made from, by name; kept with the result.

    Raises:
        EvaluationError: arms that met other items, or names that are not there.
    """
    outcomes.check_comparable()
    tasks = list(family) if family is not None else outcomes.tasks
    twice = {arm: arm.removesuffix(AGAIN) for arm in outcomes.arms if arm.removesuffix(AGAIN) != arm}
    twice = {again: arm for again, arm in twice.items() if arm in outcomes.arms}
    if pairs is None:
        pairs = _default_pairs([arm for arm in outcomes.arms if arm not in twice], baseline)
    unknown = [name for pair in pairs for name in pair if name not in outcomes.arms]
    unknown += [name for name in (*tasks, *(margins or {})) if name not in outcomes.tasks]
    if metric is not None and metric not in outcomes.metrics:
        unknown.append(metric)
    if baseline not in outcomes.arms:
        unknown.insert(0, baseline)
    if unknown or not tasks:
        raise EvaluationError(
            "these outcomes do not hold what is to be compared",
            problems=[f"`{name}`" for name in dict.fromkeys(unknown)] or ["no task"],
            hint=f"arms: {', '.join(outcomes.arms)}; tasks: {', '.join(outcomes.tasks)};"
            f" metrics: {', '.join(outcomes.metrics)}",
        )
    controls = [name for name in outcomes.tasks if name not in tasks]
    contrasts = []
    for a, b in pairs:
        compared = []
        for names, in_family in ((tasks, True), (controls, False)):
            found = [
                _compare_task(
                    outcomes,
                    a,
                    b,
                    task,
                    metric or outcomes.metric_of(task),
                    alpha=alpha,
                    margin=(margins or {}).get(task, margin),
                    seed=seed,
                )
                for task in names
            ]
            adjusted = adjust([f["mcnemar"].p_value if f["mcnemar"] else None for f in found], adjustment)
            for entry, p in zip(found, adjusted, strict=True):
                verdict = task_verdict(entry["difference"], entry["non_inferiority"], p, a, b, alpha)
                compared.append(TaskContrast(**entry, in_family=in_family, p_adjusted=p, verdict=verdict))
        on_text = {
            "loss": _compare_documents(losses, a, b, alpha, seed),
            "divergence": _compare_documents(divergences, a, b, alpha, seed),
            "target_loss": _compare_documents(target_losses, a, b, alpha, seed),
        }
        contrasts.append(_conclude(outcomes, a, b, compared, on_text, alpha, margin, seed))
    return Comparison(
        seed=seed,
        inputs=dict(inputs or {}),
        baseline=baseline,
        family=tasks,
        controls=controls,
        alpha=alpha,
        margin=margin,
        adjustment=adjustment,
        accuracy=_accuracy(outcomes, metric),
        contrasts=contrasts,
        noise=[floor for again, arm in twice.items() for floor in aa_floor(outcomes, arm, again, metric=metric)],
    )


def aa_floor(outcomes: Outcomes, arm: str, again: str, *, metric: str | None = None) -> list[NoiseFloor]:
    """How many items change their result when nothing changed but the run: the same arm evaluated twice.

    Greedy decoding is deterministic for a fixed composition of batches, so both runs of one command agree to the item.
    Another batch size, device or version rounds in another order and may flip items whose two best tokens nearly tie: a
    difference between arms is to be seen beside that. (SmolLM2-135M, 24 items of arithmetic, batches of 24 and of 5: 3
    responses and no result changed in bfloat16, none in float32.)

    Args:
        outcomes: holds both runs as arms, on the same items.
        arm, again: their names.
        metric: each task's own (`Outcomes.metric_of`) if not given.

    Returns:
        a floor for each task that both runs have.
    """
    floors = []
    for task in outcomes.tasks:
        one, two = outcomes.rows(arm, task), outcomes.rows(again, task)
        name = metric or outcomes.metric_of(task)
        changed, n = int((_results(one, name) != _results(two, name)).sum()), len(one)
        interval = stats.binomtest(changed, n).proportion_ci(0.95, method="exact")
        kept = bool(one["response"].notna().all() and two["response"].notna().all())
        floors.append(
            NoiseFloor(
                task=task,
                arm=arm,
                again=again,
                n=n,
                changed=changed,
                share=changed / n,
                low=float(interval.low),
                high=float(interval.high),
                responses=int((one["response"] != two["response"]).sum()) if kept else None,
            )
        )
    return floors


def _accuracy(outcomes: Outcomes, metric: str | None) -> list[dict[str, Any]]:
    table = outcomes.accuracy(metric).astype(object)
    table = table.where(table.notna(), None)
    means = outcomes.frame.groupby(["task", "arm"])[outcomes.metrics].mean()
    rows = []
    for row in table.to_dict("records"):
        known = means.loc[(row["task"], row["arm"])].dropna()
        rows.append({**{str(k): v for k, v in row.items()}, "metrics": {str(k): float(v) for k, v in known.items()}})
    return rows


def _default_pairs(arms: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    pairs = [(baseline, arm) for arm in arms if arm != baseline]
    edits = [arm for arm in arms if arm not in (baseline, "tuned")]
    if "tuned" in arms and baseline != "tuned":
        pairs += [("tuned", arm) for arm in edits]
    if "selected" in edits:
        pairs += [(arm, "selected") for arm in edits if arm != "selected"]
    pairs += [(arm, f"{arm}_energy_matched") for arm in edits if f"{arm}_energy_matched" in edits]
    return pairs


def _compare_task(
    outcomes: Outcomes, a: str, b: str, task: str, metric: str, *, alpha: float, margin: float, seed: int
) -> dict[str, Any]:
    rows_a, rows_b = outcomes.rows(a, task), outcomes.rows(b, task)
    x, y = _results(rows_a, metric), _results(rows_b, metric)
    if unscored := [arm for arm, values in ((a, x), (b, y)) if np.isnan(values).any()]:
        raise EvaluationError(
            f"task `{task}` has items without `{metric}`",
            problems=[f"arm `{arm}`" for arm in unscored],
            hint=f"choose a metric that scores every item; there are: {', '.join(outcomes.metrics)}",
        )
    n = len(x)
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "n": n,
        "accuracy_a": float(x.mean()),
        "accuracy_b": float(y.mean()),
    }
    confidence = 1 - alpha
    sources = _sources(rows_a)
    clustered: dict[str, Any] = {"confidence": confidence, "rng": rng, "clusters": sources}
    if not np.isin(np.concatenate([x, y]), (0, 1)).all():
        why = f"`{metric}` is not 0 or 1 for every item"
        undefined = ("unpaired", "mcnemar", "p_adjusted", "smallest_detectable_gain", "flips")
        return found | {
            "unpaired": None,
            "mcnemar": None,
            "difference": paired_difference(x, y, **clustered),
            "non_inferiority": non_inferiority(x, y, margin, **clustered),
            "smallest_detectable_gain": None,
            "flips": None,
            "reasons": dict.fromkeys(undefined, why),
        }
    detectable = smallest_detectable_gain(n, float((x != y).mean()), alpha=alpha)
    flips = _flips(rows_a, rows_b, x, y)
    reasons = {
        "smallest_detectable_gain": detectable.reason,
        "flips": None if flips else "no extraction is recorded",
        "p": None if sources is None else "items share sources: intervals are clustered by them, p-values are not",
    }
    return found | {
        "unpaired": unpaired_z(int(x.sum()), n, int(y.sum()), n),
        "mcnemar": mcnemar_exact(int((x > y).sum()), int((y > x).sum())),
        "difference": paired_difference(x, y, method="score" if sources is None else "bootstrap", **clustered),
        "non_inferiority": non_inferiority(x, y, margin, **clustered),
        "smallest_detectable_gain": detectable.gain,
        "flips": flips,
        "reasons": {name: reason for name, reason in reasons.items() if reason},
    }


def _sources(rows: pd.DataFrame) -> NDArray[Any] | None:
    """Which items share a source, where that is known."""
    if SOURCE not in rows or rows[SOURCE].isna().any():
        return None
    return rows[SOURCE].to_numpy(dtype=np.str_)


def _results(rows: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    return rows[metric].to_numpy(dtype=np.float64)


def _flips(rows_a: pd.DataFrame, rows_b: pd.DataFrame, x: NDArray[np.float64], y: NDArray[np.float64]) -> Flips | None:
    if rows_a["extracted"].isna().any() or rows_b["extracted"].isna().any():
        return None
    unknown = bool(rows_a["truncated"].isna().any() or rows_b["truncated"].isna().any())

    def count(failed: pd.DataFrame) -> dict[str, int]:
        extracted = failed["extracted"].astype(bool)
        cut = failed["truncated"].fillna(False).astype(bool) & ~extracted
        if unknown:
            return {"format": int((~extracted).sum()), "correctness": int(extracted.sum())}
        return {
            "format": int((~extracted & ~cut).sum()),
            "truncation": int(cut.sum()),
            "correctness": int(extracted.sum()),
        }

    reason = "whether responses were cut off is not recorded, so `format` counts those too" if unknown else None
    return Flips(gained=count(rows_a[y > x]), lost=count(rows_b[x > y]), reason=reason)


def _compare_documents(
    measured: Mapping[str, PerDocument] | None, a: str, b: str, alpha: float, seed: int
) -> PairedDifference | None:
    if not measured or a not in measured or b not in measured:
        return None
    one, two = measured[a], measured[b]
    if not np.array_equal(one.tokens, two.tokens):
        raise EvaluationError("the control texts of two arms are not the same documents", hint="measure them again")
    used = one.tokens > 0
    return ratio_difference(
        one.sums[used], two.sums[used], one.tokens[used], confidence=1 - alpha, rng=np.random.default_rng(seed)
    )


def _conclude(
    outcomes: Outcomes,
    a: str,
    b: str,
    tasks: list[TaskContrast],
    on_text: dict[str, PairedDifference | None],
    alpha: float,
    margin: float,
    seed: int,
) -> Contrast:
    family = [t for t in tasks if t.in_family]
    x, y = (np.concatenate([_results(outcomes.rows(arm, t.task), t.metric) for t in family]) for arm in (a, b))
    strata = np.repeat(np.arange(len(family)), [t.n for t in family])
    known = [_sources(outcomes.rows(a, t.task)) for t in family]
    sources = None if any(labels is None for labels in known) else np.concatenate([s for s in known if s is not None])
    rng = np.random.default_rng(seed)
    pooled = paired_difference(x, y, confidence=1 - alpha, strata=strata, clusters=sources, rng=rng)
    counted = [t.mcnemar for t in family if t.mcnemar]
    pooled_mcnemar = (
        mcnemar_exact(sum(m.b for m in counted), sum(m.c for m in counted)) if len(counted) == len(family) else None
    )
    significant = [t for t in tasks if t.p_adjusted is not None and t.p_adjusted < alpha]
    contrast = Contrast(
        a=a,
        b=b,
        tasks=tasks,
        pooled=pooled,
        pooled_mcnemar=pooled_mcnemar,
        improved=[t.task for t in significant if t.difference.difference > 0],
        worsened=[t.task for t in significant if t.difference.difference < 0],
        not_degraded=[t.task for t in tasks if t.non_inferiority.shown],
        verdict="",
        **on_text,
    )
    return replace(contrast, verdict=overall_verdict(contrast, margin=margin, alpha=alpha))
