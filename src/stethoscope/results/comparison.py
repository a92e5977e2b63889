"""What a comparison found: arm against arm by task, pooled, and what it cost; as frames, and as `comparison.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter

from stethoscope.artifacts import Artifact, read_versioned, write_json
from stethoscope.errors import EvaluationError
from stethoscope.shown import Rows, Shown, text_rows

SCHEMA = 1
# Of the frame, those that a table of all contrasts shows, by heading and with their formats.
_COLUMNS = {
    "from": ("a", "s"),
    "to": ("b", "s"),
    "items": ("n", "d"),
    "gain, points": ("difference", "+.1f"),
    "at least": ("low", "+.1f"),
    "at most": ("high", "+.1f"),
    "p exact": ("p_mcnemar", ".2g"),
}
CAUSES = ("format", "truncation", "correctness")


@dataclass(frozen=True, kw_only=True)
class UnpairedZ:
    """Two proportions compared as if their items were unrelated."""

    share_a: float
    share_b: float
    difference: float
    statistic: float | None
    p_value: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Exact McNemar test: ``b`` items that only arm a got right, ``c`` that only arm b did."""

    b: int
    c: int
    p_value: float
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of b - a over ``n`` items, with an interval; ``clusters`` counts the units resampled."""

    n: int
    clusters: int
    difference: float
    low: float | None
    high: float | None
    standard_error: float | None
    confidence: float
    method: str
    reason: str | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval exists and leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class NonInferiority:
    """Whether b is shown not to be worse than a by ``margin`` or more; ``shown`` is None where undefined.

    ``smallest_margin`` is the smallest margin for which these data would have shown it.
    """

    n: int
    margin: float
    difference: float
    low: float | None
    p_value: float | None
    shown: bool | None
    smallest_margin: float | None
    confidence: float
    reason: str | None = None


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
    """One arm against another on one task; ``p_adjusted`` is McNemar's p-value corrected over the family.

    ``reasons`` says of each value that is ``None`` why it is not defined, by field.
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


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Arm ``b`` against arm ``a`` on every task, pooled over the family, and on control text.

    ``pooled`` weighs items equally and resamples within tasks; ``improved``, ``worsened`` and ``not_degraded`` name
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

    def task(self, name: str) -> TaskContrast | None:
        """The contrast on one task, if there is one."""
        return next((t for t in self.tasks if t.task == name), None)

    def summary(self) -> dict[str, Any]:
        """The verdict and each task's accuracies in plain values, as a model's card has them."""
        tasks = [
            {
                "task": t.task,
                "metric": t.metric,
                "items": t.n,
                "baseline": t.accuracy_a,
                "accuracy": t.accuracy_b,
                "p_adjusted": t.p_adjusted,
            }
            for t in self.tasks
        ]
        return {"verdict": self.verdict, "baseline": self.a, "tasks": tasks}


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """One arm evaluated twice: items whose result changed though nothing else did.

    Attributes:
        n: items that both runs answered.
        changed: items whose result differs between the runs.
        share: changed / n, with an exact (Clopper-Pearson) interval from ``low`` to ``high``.
        responses: items whose response differs, right or wrong; ``None`` where responses were not kept.
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
class Comparison(Shown):
    """Every contrast that was asked for, with the settings and the inputs (hashes by name) that it rests on.

    ``accuracy`` has a row per task and arm; its ``metrics`` are the means of all the task's metrics, not only of the
    one that decides. ``noise`` is empty unless an arm was evaluated twice.
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

    @property
    def arms(self) -> list[str]:
        """Every arm: the baseline, the selected layers, then the others in the order in which they were run."""
        run = list(dict.fromkeys(row["arm"] for row in self.accuracy))
        first = [arm for arm in (self.baseline, "selected") if arm in run]
        return list(dict.fromkeys([*first, *run]))

    def find(self, b: str, a: str | None = None) -> Contrast | None:
        """Arm ``b`` against arm ``a`` (the baseline if not given), None if they were not compared."""
        wanted = (a or self.baseline, b)
        return next((found for found in self.contrasts if (found.a, found.b) == wanted), None)

    def contrast(self, b: str, a: str | None = None) -> Contrast:
        """As `find`; an EvaluationError if they were not compared."""
        if found := self.find(b, a):
            return found
        raise EvaluationError(f"`{b}` was not compared with `{a or self.baseline}`")

    def to_frame(self) -> Any:
        """A pandas frame with a row per contrast and task, and one with task ``pooled`` per contrast."""
        import pandas as pd

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

    def gains(self) -> Any:
        """Where each difference comes from: a row per contrast, task and cause of failure (see `Flips`).

        Returns:
            columns a, b, task, cause, gained (items that only b got right, by what was wrong with a's response), lost
            (items that only a got right, by what was wrong with b's), net, and points (net as share of the items, in
            percent). A task's rows sum to its whole difference. What is not known is missing.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for contrast in self.contrasts:
            for t in contrast.tasks:
                for cause in CAUSES if t.flips else ():
                    gained, lost = (side.get(cause) for side in (t.flips.gained, t.flips.lost))  # type: ignore[union-attr]
                    net = None if gained is None or lost is None else gained - lost
                    rows.append(
                        {
                            "a": contrast.a,
                            "b": contrast.b,
                            "task": t.task,
                            "cause": cause,
                            "gained": gained,
                            "lost": lost,
                            "net": net,
                            "points": None if net is None else 100 * net / t.n,
                        }
                    )
        columns = ["a", "b", "task", "cause", "gained", "lost", "net", "points"]
        counts = {"gained": "Int64", "lost": "Int64", "net": "Int64", "points": "Float64"}
        return pd.DataFrame(rows, columns=columns).astype(counts)

    @property
    def verdict(self) -> str:
        """The sentence on the ``selected`` arm against the baseline, or on the first contrast if there is none."""
        chosen = [c for c in self.contrasts if (c.a, c.b) == (self.baseline, "selected")] or self.contrasts
        return chosen[0].verdict if chosen else "Nothing was compared."

    def plot(self, *, without: Sequence[str] = (), width: int = 640) -> Any:
        """The trade-off, an Altair chart: what each arm gains on the target tasks against what it costs.

        Args:
            without: arms to leave out: the whole fine-tune is often so far away that the edits cannot be told apart.
            width: of the plotting area in pixels.
        """
        from stethoscope.report.trade import trade_off

        return trade_off(self, without=without, width=width)

    def _shown(self) -> tuple[str, Rows]:
        frame = self.to_frame().query("task == 'pooled'") if self.contrasts else self.to_frame()
        points = {name: 100 * frame[name].astype(float) for name in ("difference", "low", "high") if len(frame)}
        return self.verdict, text_rows(frame.assign(**points).to_dict("records"), _COLUMNS)

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
