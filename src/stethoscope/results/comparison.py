"""What a comparison found: arm against arm by task, pooled, and what it cost; as frames, and as `comparison.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter

from stethoscope.artifacts import Artifact, read_versioned, write_json
from stethoscope.display import NONE, Display, Rows, number, p_value, table_of
from stethoscope.errors import EvaluationError
from stethoscope.results.paired import McNemar, NonInferiority, PairedDifference, UnpairedZ
from stethoscope.results.scale import Scale

SCHEMA = 1
CAUSES = {"format": "no answer found", "truncation": "cut off by the limit", "correctness": "wrong answer"}


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Items that changed between right and wrong, by what was wrong with the failed response: paired counts.

    ``format``: no answer could be extracted; ``truncation``: none, and the token limit cut the response off;
    ``correctness``: an answer was given and was wrong. A count that is not known is left out, for the ``reason`` given.
    """

    gained: dict[str, int]
    lost: dict[str, int]
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskContrast:
    """One arm against another on one task; ``p_adjusted`` is corrected over the family.

    ``accuracy_a`` and ``accuracy_b`` are means of the metric, whose unit and direction ``scale`` has. All else is of
    gains: a positive ``difference`` means that b is better, even if less is better. The p-value is McNemar's, or a
    paired t-test's where results are not 0 or 1, or items share sources. ``reasons`` says of each value that is
    ``None`` why it is not defined.
    """

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
    verdict: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    scale: Scale = field(default_factory=Scale)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of ``items``, those that only the arm under test got right, and those that only the other did."""

    gained: int
    lost: int
    items: int

    @property
    def net(self) -> int:
        """Items gained less items lost."""
        return self.gained - self.lost

    @property
    def points(self) -> float:
        """The net as a share of the items, in percent."""
        return 100 * self.net / self.items


def flipped(tasks: Sequence[TaskContrast], cause: str) -> Change | None:
    """The items of tasks that changed, where the failed response had one cause; None where that is not known."""
    known = [t.flips for t in tasks if t.flips and cause in t.flips.gained]
    if not known:
        return None
    gained, lost = sum(flips.gained[cause] for flips in known), sum(flips.lost[cause] for flips in known)
    return Change(gained=gained, lost=lost, items=sum(t.n for t in tasks))


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Arm ``b`` against arm ``a`` on every task, pooled over the family, and on control text.

    ``pooled`` is the gain over the family's tasks of one unit, in ``scale``: shares if there are any; it weighs items
    equally and resamples within tasks. ``improved``, ``worsened`` and ``not_degraded`` name
    tasks. On control text, in nats per token, positive where b is worse: ``loss`` is the change of loss,
    ``divergence`` how much further from the base b is than a (Kullback-Leibler; from zero where a is the base).
    ``target_loss`` is the change of loss on held-out target text, negative where b is better.
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
    divergence: PairedDifference | None = None
    target_loss: PairedDifference | None = None
    scale: Scale = field(default_factory=Scale)

    def task(self, name: str) -> TaskContrast | None:
        """The contrast on one task, if there is one."""
        return next((t for t in self.tasks if t.task == name), None)

    @property
    def family(self) -> list[TaskContrast]:
        """The tasks whose gain is claimed."""
        return [t for t in self.tasks if t.in_family]

    @property
    def together(self) -> list[TaskContrast]:
        """Those of one unit, which ``pooled`` is over."""
        return [t for t in self.family if t.scale.unit == self.scale.unit]

    @property
    def gain(self) -> str:
        """The pooled gain in words, with its interval where it has one."""
        text, pooled = self.scale.words(self.pooled.difference), self.pooled
        return text if pooled.low is None else f"{text} ({pooled.text(self.scale.form, self.scale.factor)})"

    def significant(self, alpha: float) -> bool:
        """Whether the arms differ over the family: by McNemar's test, or by the t-test where there is none."""
        p = (self.pooled_mcnemar or self.pooled).p_value
        return p is not None and p < alpha

    def is_better(self, alpha: float) -> bool:
        """Whether the arm is better over the family."""
        return self.significant(alpha) and self.pooled.difference > 0

    def summary(self) -> dict[str, Any]:
        """The verdict and each task's accuracies in plain values, as a model's card has them."""
        tasks = [
            {"task": t.task, "metric": t.metric, "items": t.n, "baseline": t.accuracy_a, "accuracy": t.accuracy_b}
            | {"p_adjusted": t.p_adjusted, "scale": t.scale.label}
            | {"shown": [t.scale.text(t.accuracy_a), t.scale.text(t.accuracy_b), t.scale.gain(t.difference.difference)]}
            for t in self.tasks
        ]
        return {"verdict": self.verdict, "baseline": self.a, "tasks": tasks}


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """One arm evaluated twice: of ``n`` items, those whose result ``changed`` though nothing else did.

    The share has an exact (Clopper-Pearson) interval from ``low`` to ``high``. ``responses`` counts the items whose
    response differs, right or wrong; ``None`` where responses were not kept.
    """

    task: str
    arm: str
    again: str
    n: int
    changed: int
    share: float
    low: float
    high: float
    responses: int | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Display):
    """Every contrast that was asked for, with the settings and the inputs (hashes by name) that it rests on.

    ``accuracy`` has a row per task and arm; its ``metrics`` are the means of all the task's metrics, not only of the
    one that decides, and ``scales`` has their units and directions by task. ``noise`` is empty unless an arm was
    evaluated twice.
    """

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
    noise: list[NoiseFloor] = field(default_factory=list)
    scales: dict[str, dict[str, Scale]] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Every arm: the baseline, the edit, the selected layers, then the others as they were run."""
        run = list(dict.fromkeys(row["arm"] for row in self.accuracy))
        first = [arm for arm in (self.baseline, "recommended", "selected") if arm in run]
        return list(dict.fromkeys([*first, *run]))

    def scale(self, task: str, metric: str | None = None) -> Scale:
        """Unit and direction of a metric on a task, of the deciding one if not given."""
        name = metric or next((str(row["metric"]) for row in self.accuracy if row["task"] == task), "")
        return self.scales.get(task, {}).get(name, Scale())

    @property
    def together(self) -> list[str]:
        """The tasks of the family that are pooled, see `Contrast`."""
        return [t.task for t in self.contrasts[0].together] if self.contrasts else self.family

    @property
    def edit(self) -> str:
        """The arm that a run's edit is: the ``recommended`` one, or ``selected`` where there is none."""
        return "recommended" if any(row["arm"] == "recommended" for row in self.accuracy) else "selected"

    def find(self, b: str, a: str | None = None) -> Contrast | None:
        """Arm ``b`` against arm ``a`` (the baseline if not given), None if they were not compared."""
        return next((c for c in self.contrasts if (c.a, c.b) == (a or self.baseline, b)), None)

    def contrast(self, b: str, a: str | None = None) -> Contrast:
        """As `find`; an EvaluationError if they were not compared."""
        if found := self.find(b, a):
            return found
        raise EvaluationError(f"`{b}` was not compared with `{a or self.baseline}`")

    def to_frame(self) -> Any:
        """A pandas frame with a row per contrast and task, and one with task ``pooled`` per contrast."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for contrast in self.contrasts:
            arms, pooled, whole = {"a": contrast.a, "b": contrast.b}, contrast.pooled, contrast.pooled_mcnemar
            for t in contrast.tasks:
                z, test, bound = t.unpaired, t.mcnemar, t.non_inferiority
                rows.append({
                    **arms, "task": t.task, "in_family": t.in_family, "n": t.n,
                    "metric": t.metric, "unit": t.scale.unit, "higher_is_better": t.scale.higher_is_better,
                    "accuracy_a": t.accuracy_a, "accuracy_b": t.accuracy_b, **_interval(t.difference),
                    "z": z.statistic if z else None, "p_unpaired": z.p_value if z else None,
                    "only_a": test.b if test else None, "only_b": test.c if test else None,
                    "p_mcnemar": test.p_value if test else None, "p_adjusted": t.p_adjusted,
                    "non_inferior": bound.shown, "smallest_margin": bound.smallest_margin,
                    "smallest_detectable_gain": t.smallest_detectable_gain,
                })  # fmt: skip
            p = {"p_mcnemar": whole.p_value if whole else None}
            rows.append({**arms, "task": "pooled", "in_family": True, "n": pooled.n, **_interval(pooled), **p})
        return pd.DataFrame(rows)

    def gains(self) -> Any:
        """Where each difference comes from: a row per contrast, task and cause of failure (see `Flips`).

        Returns:
            columns a, b, task, cause, gained (items that only b got right, by what was wrong with a's response), lost
            (items that only a got right, by what was wrong with b's), net, and points (net as share of the items, in
            percent). A task's rows sum to its whole difference. What is not known is missing.
        """
        import pandas as pd

        rows = [
            {"a": contrast.a, "b": contrast.b, "task": t.task, "cause": cause}
            | ({"gained": c.gained, "lost": c.lost, "net": c.net, "points": c.points} if c else {})
            for contrast in self.contrasts
            for t in contrast.tasks
            if t.flips
            for cause in CAUSES
            for c in [flipped([t], cause)]
        ]
        counts = {"gained": "Int64", "lost": "Int64", "net": "Int64", "points": "Float64"}
        return pd.DataFrame(rows, columns=["a", "b", "task", "cause", *counts]).astype(counts)

    @property
    def verdict(self) -> str:
        """The sentence on the edit against the baseline, or on the first contrast if there is none."""
        chosen = self.find(self.edit) or next(iter(self.contrasts), None)
        return chosen.verdict if chosen else "Nothing was compared."

    def plot(self, *, without: Sequence[str] = (), width: int = 640) -> Any:
        """The trade-off, an Altair chart: what each arm gains on the target tasks against what it costs.

        Args:
            without: arms to leave out: the whole fine-tune is often so far away that the edits cannot be told apart.
            width: of the plotting area in pixels.
        """
        from stethoscope.charts.trade import trade_off

        rows = []
        for contrast in (c for arm in self.arms if arm not in without and (c := self.find(arm))):
            gain, cost, factor = contrast.pooled, contrast.loss, contrast.scale.factor
            rows.append({
                "arm": contrast.b,
                "gain": factor * gain.difference,
                "gain_low": None if gain.low is None else factor * gain.low,
                "gain_high": None if gain.high is None else factor * gain.high,
                "cost": cost.difference if cost else None,
                "cost_low": cost.low if cost else None,
                "cost_high": cost.high if cost else None,
            })  # fmt: skip
        unit = next((contrast.scale.of_gains for contrast in self.contrasts), "points")
        return trade_off(rows, self.baseline, unit=unit, width=width)

    def table(self) -> Rows:
        """A row per contrast: the gain over all tasks of the family, and what it costs on control text."""
        return table_of(
            {"from": c.a, "to": c.b, "items": str(c.pooled.n)}
            | {
                f"gain, {c.scale.of_gains}": c.scale.gain(c.pooled.difference),
                "interval": c.pooled.text(c.scale.form, c.scale.factor),
                "p exact": p_value(c.pooled_mcnemar.p_value if c.pooled_mcnemar else None),
                "control loss, nats per token": number(c.loss.difference if c.loss else None, "+.4f"),
                "interval of the loss": c.loss.text("+.4f") if c.loss else NONE,
            }
            for c in self.contrasts
        ) or [["from", "to"]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as in ``comparison.json``."""
        return {"schema": SCHEMA, "stethoscope": version("sae-stethoscope"), **asdict(self)}

    def save(self, path: Path) -> None:
        """Write ``comparison.json``, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            StethoscopeError: the file is missing, damaged, or of another schema version.
        """
        return read_versioned(path, SCHEMA, TypeAdapter(cls).validate_python, field="schema")


def _interval(difference: PairedDifference) -> dict[str, float | None]:
    return {"difference": difference.difference, "low": difference.low, "high": difference.high}


class Claim(Artifact):
    """What kind of claim a run's evaluation supports.

    Attributes:
        kind: ``confirmatory`` if no item was seen when layers and coefficients were chosen, else ``exploratory``.
        seen_items: task -> numbers of the items that were.
        seen_texts: what the choice was made on -> its content hash.
    """

    FILE: ClassVar[str] = "claim.json"

    kind: Literal["confirmatory", "exploratory"]
    seen_items: dict[str, tuple[int, ...]]
    seen_texts: dict[str, str]


def is_random(arm: str) -> bool:
    """Whether an arm is one of the random layer sets."""
    return arm.startswith("random_layers")
