"""Arm against arm, by task and over all tasks: `compare(outcomes)` says what the data show, in numbers and words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stethoscope.artifacts import write_json
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.inference import (
    McNemar,
    NonInferiority,
    PairedDifference,
    UnpairedZ,
    adjust,
    mcnemar_exact,
    non_inferiority,
    paired_difference,
    ratio_difference,
    smallest_detectable_gain,
    unpaired_z,
)
from stethoscope.evaluation.outcomes import DocumentLosses, Outcomes

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Items that changed between right and wrong, by what was wrong: paired counts.

    ``format``: no answer could be extracted; ``truncation``: none, and the token limit cut the response off;
    ``correctness``: an answer was given and was wrong.
    """

    gained: dict[str, int]
    lost: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TaskContrast:
    """One arm against another on one task; ``p_adjusted`` is McNemar's p-value corrected over the family."""

    task: str
    metric: str
    in_family: bool
    n: int
    accuracy_a: float
    accuracy_b: float
    unpaired: UnpairedZ | None
    mcnemar: McNemar | None
    p_adjusted: float | None
    difference: PairedDifference
    non_inferiority: NonInferiority
    smallest_detectable_gain: float | None
    flips: Flips | None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Arm ``b`` against arm ``a`` on every task, pooled over the family, and on control text.

    ``pooled`` weighs items equally and resamples within tasks; ``improved``, ``worsened`` and ``not_degraded`` name
    tasks; ``loss`` is the change of control loss in nats per token, positive where b is worse.
    """

    a: str
    b: str
    tasks: list[TaskContrast]
    pooled: PairedDifference
    pooled_mcnemar: McNemar | None
    improved: list[str]
    worsened: list[str]
    not_degraded: list[str]
    loss: PairedDifference | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every contrast that was asked for, with the settings and the inputs (hashes by name) that it rests on."""

    seed: int
    inputs: dict[str, str]
    baseline: str
    family: list[str]
    controls: list[str]
    alpha: float
    margin: float
    adjustment: str
    accuracy: list[dict[str, Any]]
    contrasts: list[Contrast]

    def contrast(self, b: str, a: str | None = None) -> Contrast:
        """Arm ``b`` against arm ``a`` (the baseline if not given)."""
        for found in self.contrasts:
            if (found.a, found.b) == (a or self.baseline, b):
                return found
        raise EvaluationError(f"`{b}` was not compared with `{a or self.baseline}`")

    def to_frame(self) -> pd.DataFrame:
        """A row per contrast and task, and one with task ``pooled`` per contrast."""
        rows = []
        for contrast in self.contrasts:
            for t in contrast.tasks:
                rows.append(
                    {
                        "a": contrast.a,
                        "b": contrast.b,
                        "task": t.task,
                        "in_family": t.in_family,
                        "n": t.n,
                        "accuracy_a": t.accuracy_a,
                        "accuracy_b": t.accuracy_b,
                        **_interval(t.difference),
                        "z": t.unpaired.statistic if t.unpaired else None,
                        "p_unpaired": t.unpaired.p_value if t.unpaired else None,
                        "only_a": t.mcnemar.b if t.mcnemar else None,
                        "only_b": t.mcnemar.c if t.mcnemar else None,
                        "p_mcnemar": t.mcnemar.p_value if t.mcnemar else None,
                        "p_adjusted": t.p_adjusted,
                        "non_inferior": t.non_inferiority.shown,
                        "smallest_margin": t.non_inferiority.smallest_margin,
                        "smallest_detectable_gain": t.smallest_detectable_gain,
                    }
                )
            rows.append(
                {
                    "a": contrast.a,
                    "b": contrast.b,
                    "task": "pooled",
                    "in_family": True,
                    "n": contrast.pooled.n,
                    **_interval(contrast.pooled),
                    "p_mcnemar": contrast.pooled_mcnemar.p_value if contrast.pooled_mcnemar else None,
                }
            )
        return pd.DataFrame(rows)

    def save(self, path: Path) -> None:
        """Write ``comparison.json``, whole or not at all."""
        write_json(path, {"schema": SCHEMA, "stethoscope": version("sae-stethoscope"), **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            EvaluationError: the file is missing, is something else, or has another schema.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            known = value.pop("schema") == SCHEMA
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise EvaluationError(f"`{path}` does not hold a comparison: {error}") from error
        if not known:
            raise EvaluationError(f"`{path}` was written by another version of stethoscope", hint="compare again")
        value.pop("stethoscope")
        contrasts = [_contrast(entry) for entry in value.pop("contrasts")]
        return cls(**value, contrasts=contrasts)


def compare(
    outcomes: Outcomes,
    *,
    baseline: str = "base",
    family: Sequence[str] | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    losses: Mapping[str, DocumentLosses] | None = None,
    alpha: float = 0.05,
    margin: float = 0.02,
    adjustment: str = "holm",
    seed: int = 0,
    inputs: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare arms on the items that they share.

    Args:
        outcomes: results of all arms on the same items; one metric per task decides (`Outcomes.metric_of`).
        baseline: the arm that every other is compared with.
        family: tasks whose p-values are corrected together; the others are controls, corrected among themselves. All if
            not given.
        pairs: arms to compare, as (a, b) with b under test. If not given: every arm against the baseline, every edit
            against ``tuned``, and ``selected`` against every other edit.
        losses: control loss per document of each arm, on the same documents.
        alpha: level of every test; intervals have confidence 1 - alpha.
        margin: the loss of accuracy that non-inferiority would accept.
        adjustment: ``holm`` or ``bh``.
        seed: of the bootstrap.
        inputs: hashes of what the outcomes were made from, by name; kept with the result.

    Raises:
        EvaluationError: arms that met other items, or names that are not there.
    """
    outcomes.check_comparable()
    tasks = list(family) if family is not None else outcomes.tasks
    pairs = list(pairs) if pairs is not None else _default_pairs(outcomes.arms, baseline)
    unknown = [name for pair in pairs for name in pair if name not in outcomes.arms]
    unknown += [name for name in tasks if name not in outcomes.tasks]
    if baseline not in outcomes.arms:
        unknown.insert(0, baseline)
    if unknown or not tasks:
        raise EvaluationError(
            "these outcomes do not hold what is to be compared",
            problems=[f"`{name}`" for name in dict.fromkeys(unknown)] or ["no task"],
            hint=f"arms: {', '.join(outcomes.arms)}; tasks: {', '.join(outcomes.tasks)}",
        )
    controls = [name for name in outcomes.tasks if name not in tasks]
    contrasts = []
    for a, b in pairs:
        compared = [
            *_compare_tasks(outcomes, a, b, tasks, True, alpha, margin, adjustment, seed),
            *_compare_tasks(outcomes, a, b, controls, False, alpha, margin, adjustment, seed),
        ]
        loss = _compare_loss(losses[a], losses[b], alpha, seed) if losses and a in losses and b in losses else None
        contrasts.append(_conclude(outcomes, a, b, compared, loss, alpha, margin, seed))
    accuracy = outcomes.accuracy().astype(object)
    return Comparison(
        seed=seed,
        inputs=dict(inputs or {}),
        baseline=baseline,
        family=tasks,
        controls=controls,
        alpha=alpha,
        margin=margin,
        adjustment=adjustment,
        accuracy=[
            {str(k): v for k, v in row.items()} for row in accuracy.where(accuracy.notna(), None).to_dict("records")
        ],
        contrasts=contrasts,
    )


def _default_pairs(arms: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    pairs = [(baseline, arm) for arm in arms if arm != baseline]
    edits = [arm for arm in arms if arm not in (baseline, "tuned")]
    if "tuned" in arms and baseline != "tuned":
        pairs += [("tuned", arm) for arm in edits]
    if "selected" in edits:
        pairs += [(arm, "selected") for arm in edits if arm != "selected"]
    return pairs


def _compare_tasks(
    outcomes: Outcomes,
    a: str,
    b: str,
    tasks: Sequence[str],
    in_family: bool,
    alpha: float,
    margin: float,
    adjustment: str,
    seed: int,
) -> list[TaskContrast]:
    found: list[dict[str, Any]] = []
    for task in tasks:
        metric = outcomes.metric_of(task)
        rows_a, rows_b = outcomes.rows(a, task), outcomes.rows(b, task)
        x, y = _results(rows_a, metric), _results(rows_b, metric)
        binary = bool(np.isin(np.concatenate([x, y]), (0, 1)).all())
        rng = np.random.default_rng(seed)
        mcnemar = mcnemar_exact(int((x > y).sum()), int((y > x).sum())) if binary else None
        n = len(x)
        discordance = float((x != y).mean())
        found.append(
            {
                "task": task,
                "metric": metric,
                "in_family": in_family,
                "n": n,
                "accuracy_a": float(x.mean()),
                "accuracy_b": float(y.mean()),
                "unpaired": unpaired_z(int(x.sum()), n, int(y.sum()), n) if binary else None,
                "mcnemar": mcnemar,
                "difference": paired_difference(
                    x, y, confidence=1 - alpha, method="score" if binary else "bootstrap", rng=rng
                ),
                "non_inferiority": non_inferiority(x, y, margin, confidence=1 - alpha, rng=rng),
                "smallest_detectable_gain": smallest_detectable_gain(n, discordance, alpha=alpha).gain
                if binary
                else None,
                "flips": _flips(rows_a, rows_b, x, y) if binary else None,
            }
        )
    adjusted = adjust([f["mcnemar"].p_value if f["mcnemar"] else None for f in found], adjustment)
    return [TaskContrast(**f, p_adjusted=p) for f, p in zip(found, adjusted, strict=True)]


def _results(rows: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    return rows[metric].to_numpy(dtype=np.float64)


def _flips(rows_a: pd.DataFrame, rows_b: pd.DataFrame, x: NDArray[np.float64], y: NDArray[np.float64]) -> Flips | None:
    if rows_a["extracted"].isna().any() or rows_b["extracted"].isna().any():
        return None

    def count(failed: pd.DataFrame) -> dict[str, int]:
        extracted = failed["extracted"].astype(bool)
        cut = failed["truncated"].fillna(False).astype(bool) & ~extracted
        return {
            "format": int((~extracted & ~cut).sum()),
            "truncation": int(cut.sum()),
            "correctness": int(extracted.sum()),
        }

    return Flips(gained=count(rows_a[y > x]), lost=count(rows_b[x > y]))


def _compare_loss(a: DocumentLosses, b: DocumentLosses, alpha: float, seed: int) -> PairedDifference:
    if not np.array_equal(a.tokens, b.tokens):
        raise EvaluationError("the control losses of two arms are not of the same documents", hint="measure them again")
    used = a.tokens > 0
    return ratio_difference(
        a.sums[used], b.sums[used], a.tokens[used], confidence=1 - alpha, rng=np.random.default_rng(seed)
    )


def _conclude(
    outcomes: Outcomes,
    a: str,
    b: str,
    tasks: list[TaskContrast],
    loss: PairedDifference | None,
    alpha: float,
    margin: float,
    seed: int,
) -> Contrast:
    family = [t for t in tasks if t.in_family]
    x, y = (np.concatenate([_results(outcomes.rows(arm, t.task), t.metric) for t in family]) for arm in (a, b))
    strata = np.repeat(np.arange(len(family)), [t.n for t in family])
    pooled = paired_difference(x, y, confidence=1 - alpha, strata=strata, rng=np.random.default_rng(seed))
    counted = [t.mcnemar for t in family if t.mcnemar]
    pooled_mcnemar = (
        mcnemar_exact(sum(m.b for m in counted), sum(m.c for m in counted)) if len(counted) == len(family) else None
    )
    significant = [t for t in tasks if t.p_adjusted is not None and t.p_adjusted < alpha]
    contrast: dict[str, Any] = {
        "a": a,
        "b": b,
        "tasks": tasks,
        "pooled": pooled,
        "pooled_mcnemar": pooled_mcnemar,
        "improved": [t.task for t in significant if t.difference.difference > 0],
        "worsened": [t.task for t in significant if t.difference.difference < 0],
        "not_degraded": [t.task for t in tasks if t.non_inferiority.shown],
        "loss": loss,
    }
    return Contrast(**contrast, verdict=_verdict(**contrast, margin=margin, alpha=alpha))


def _verdict(
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
    margin: float,
    alpha: float,
) -> str:
    family = [t.task for t in tasks if t.in_family]
    better = [name for name in improved if name in family]
    if pooled_mcnemar is not None:
        overall = pooled_mcnemar.p_value < alpha
    else:
        overall = pooled.low is not None and pooled.high is not None and not pooled.low <= 0 <= pooled.high
    gain = f"{100 * pooled.difference:+.1f} points"
    if pooled.low is not None and pooled.high is not None:
        gain += f" ({100 * pooled.low:+.1f} to {100 * pooled.high:+.1f})"
    if (better or (overall and pooled.difference > 0)) and worsened:
        words = f"Mixed: `{b}` against `{a}` gains {gain} over {len(family)} tasks, but is significantly worse"
        words += f" on {', '.join(worsened)}"
    elif better or (overall and pooled.difference > 0):
        words = f"`{b}` beats `{a}` by {gain} over {len(family)} tasks, "
        words += f"significantly in {len(better)} of them" if better else "though significantly in no single one"
    elif worsened or (overall and pooled.difference < 0):
        words = f"`{b}` is worse than `{a}`: {gain} over {len(family)} tasks"
        if worsened:
            words += f", significantly on {', '.join(worsened)}"
    else:
        words = f"No evidence of benefit: `{b}` against `{a}` gives {gain} over {len(family)} tasks"
    if len(not_degraded) == len(tasks):
        words += f"; a loss of {100 * margin:g} points or more is ruled out in every task"
    else:
        words += (
            f"; a loss of {100 * margin:g} points or more is ruled out in {len(not_degraded)} of {len(tasks)} tasks"
        )
    if loss is not None:
        words += f"; control loss {loss.difference:+.3f} nats per token"
        if loss.low is not None and loss.high is not None:
            words += f" ({loss.low:+.3f} to {loss.high:+.3f})"
    return words + "."


def _interval(difference: PairedDifference) -> dict[str, float | None]:
    return {"difference": difference.difference, "low": difference.low, "high": difference.high}


def _contrast(value: dict[str, Any]) -> Contrast:
    kinds: dict[str, Any] = {
        "unpaired": UnpairedZ,
        "mcnemar": McNemar,
        "difference": PairedDifference,
        "non_inferiority": NonInferiority,
        "flips": Flips,
        "pooled": PairedDifference,
        "pooled_mcnemar": McNemar,
        "loss": PairedDifference,
    }

    def build(entry: dict[str, Any]) -> dict[str, Any]:
        return {k: kinds[k](**v) if k in kinds and v is not None else v for k, v in entry.items()}

    tasks = [TaskContrast(**build(entry)) for entry in value.pop("tasks")]
    return Contrast(**build(value), tasks=tasks)
