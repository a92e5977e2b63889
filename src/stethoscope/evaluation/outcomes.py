"""Outcomes: one row per arm, task and item, as `evaluate` writes and `compare` reads them; no model needed.

Columns: ``arm``, ``task``, ``item`` (number in the task), ``item_hash``, ``prompt_hash``, a column per metric,
``extracted`` (an answer was found in the response), ``truncated`` (cut off by the token limit),
``generated_tokens``, ``response``, ``answer`` (as extracted), ``target``. Where items share sources (one passage, one
template), a column ``source`` may say which.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from stethoscope.artifacts import new_file
from stethoscope.display import Display, Rows, first_of, table_of
from stethoscope.errors import EvaluationError
from stethoscope.results.scale import Scale, scale_of

SCHEMA = 1
KEYS = ("arm", "task", "item", "item_hash", "prompt_hash")
DETAILS = ("extracted", "truncated", "generated_tokens", "response", "answer", "target")
SOURCE = "source"
DIRECTIONS = "higher_is_better"
_PREFERRED = ("exact_match", "math_verify", "acc", "bits_per_byte")


@dataclass(frozen=True, kw_only=True)
class PerDocument:
    """A cost of one arm in nats, its loss or its divergence from the base, document by document.

    Attributes:
        sums: total over each document's predicted tokens, shape [documents].
        tokens: predicted tokens of each document, shape [documents]; 0 for a document too short to predict.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, repr=False)
class Outcomes(Display):
    """Results of several arms on the same items: a row each in ``frame``, and the settings that all arms share.

    ``provenance`` may tell under ``higher_is_better`` by task and metric which direction is better.
    """

    frame: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.frame):
            raise EvaluationError("these outcomes hold no item", hint="evaluate again")
        if missing := [name for name in (*KEYS, *DETAILS) if name not in self.frame]:
            raise EvaluationError(
                "these outcomes lack columns", problems=missing, hint="were they written by `stethoscope evaluate`?"
            )
        doubled = self.frame[self.frame.duplicated(["arm", "task", "item"])]
        if len(doubled):
            first = doubled.iloc[0]
            raise EvaluationError(f"arm `{first.arm}` has item `{first['item']}` of task `{first.task}` twice")

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the order in which they were run."""
        return list(dict.fromkeys(self.frame["arm"]))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they were run."""
        return list(dict.fromkeys(self.frame["task"]))

    @property
    def metrics(self) -> list[str]:
        """Names of the metric columns."""
        return [str(name) for name in self.frame if name not in (*KEYS, *DETAILS, SOURCE)]

    def renamed(self, arm: str) -> "Outcomes":
        """The same outcomes with their only arm under another name."""
        return replace(self, frame=self.frame.assign(arm=arm))

    def metric_of(self, task: str) -> str:
        """The metric that decides a task: exact_match, math_verify, acc or bits_per_byte, else its first."""
        scored = self.frame.loc[self.frame["task"] == task, self.metrics].notna().any()
        present = [name for name in (*_PREFERRED, *self.metrics) if scored.get(name)]
        if not present:
            raise EvaluationError(f"task `{task}` has no metric per item", hint="choose a task that scores each item")
        return present[0]

    def scale(self, task: str, metric: str | None = None) -> Scale:
        """Unit and direction of a metric on a task; of the deciding one if not given."""
        name = metric or self.metric_of(task)
        values = self.frame.loc[self.frame["task"] == task, name].dropna()
        return scale_of(name, values.tolist(), self.provenance.get(DIRECTIONS, {}).get(task))

    def scales(self, task: str) -> dict[str, Scale]:
        """Those of every metric that the task has."""
        scored = self.frame.loc[self.frame["task"] == task, self.metrics].notna().any()
        return {name: self.scale(task, name) for name in self.metrics if scored[name]}

    def rows(self, arm: str, task: str) -> pd.DataFrame:
        """One arm's rows of one task, by item.

        Raises:
            EvaluationError: there are none.
        """
        rows = self.frame[(self.frame["arm"] == arm) & (self.frame["task"] == task)]
        if not len(rows):
            raise EvaluationError(
                f"arm `{arm}` has no outcomes on task `{task}`",
                hint=f"arms: {', '.join(self.arms)}; tasks: {', '.join(self.tasks)}",
            )
        return rows.sort_values("item").reset_index(drop=True)

    def check_comparable(self) -> None:
        """Make sure that every arm met the same items with the same prompts.

        Raises:
            EvaluationError: naming every arm and task that differs from the first arm, and how.
        """
        problems = []
        first, *others = self.arms
        for task in self.tasks:
            rows = self.frame[self.frame["task"] == task].set_index("item")
            a = rows[rows["arm"] == first]
            for arm in others:
                b = rows[rows["arm"] == arm]
                if len(only := a.index.symmetric_difference(b.index)):
                    problems.append(f"task `{task}`: only one of `{first}` and `{arm}` has {_items(only)}")
                both = a.index.intersection(b.index).sort_values()
                for what, column in {"content": "item_hash", "prompt": "prompt_hash"}.items():
                    if len(other := both[a.loc[both, column] != b.loc[both, column]]):
                        problems.append(f"task `{task}`: `{first}` and `{arm}` have another {what} at {_items(other)}")
        if problems:
            raise EvaluationError(
                "the arms were not given the same items",
                problems=problems,
                hint="evaluate all arms again with one task definition, seed, limit and tokenizer",
            )

    def accuracy(self, metric: str | None = None) -> pd.DataFrame:
        """A row per task and arm; what is not known is missing.

        Args:
            metric: a metric column; each task's own deciding one (`metric_of`) if not given.

        Returns:
            columns task, arm, metric, n, correct, accuracy, extracted and truncated (shares), accuracy_extracted (among
            the extracted, of the first filter's metrics), generated_tokens (mean).
        """
        table = []
        for (task, arm), rows in self.frame.groupby(["task", "arm"], sort=False):
            name = metric or self.metric_of(str(task))
            values = rows[name].astype("float64")
            found = rows["extracted"].fillna(False).astype(bool)
            table.append({
                "task": task, "arm": arm, "metric": name, "n": len(rows),
                "correct": values.sum(), "accuracy": values.mean(),
                "extracted": rows["extracted"].mean(), "truncated": rows["truncated"].mean(),
                "accuracy_extracted": values[found].mean() if found.any() and "," not in name else None,
                "generated_tokens": rows["generated_tokens"].mean(),
            })  # fmt: skip
        return pd.DataFrame(table)

    def to_frame(self) -> pd.DataFrame:
        """A row per arm, task and item: a copy of ``frame``."""
        return self.frame.copy()

    def plot(self, *, metric: str | None = None, width: int = 480) -> Any:
        """Every arm on each task, shares of items with an exact 95 % interval, an Altair chart ``width`` pixels wide.

        Args:
            metric: as for `accuracy`; tasks without it are left out.
        """
        import altair as alt

        from stethoscope.charts.style import COLOURS, configured, tips, title

        table = self.accuracy(metric).dropna(subset="accuracy", ignore_index=True)
        scales = {task: self.scale(task, metric) for task in self.tasks}
        found = [scales[task] for task in table["task"]]
        table[["low", "high"]] = [
            _exact_interval(self.rows(arm, task)[name])
            for arm, task, name in zip(table["arm"], table["task"], table["metric"], strict=True)
        ]
        values = ["accuracy", "low", "high"]
        table[values] = table[values].mul([scale.factor for scale in found], axis=0)
        table["task"] = [scales[task].named(task) for task in table["task"]]
        shares = all(scale.is_share for scale in found)
        x = {"title": "percent", "scale": alt.Scale(domain=[0, 100])} if shares else {"title": None}
        known = [next((k for k in COLOURS if arm.startswith(k)), "other") for arm in self.arms]
        scale = alt.Scale(domain=self.arms, range=[COLOURS[name] for name in known])
        base = alt.Chart(table).encode(
            y=alt.Y("arm:N", sort=None, title=None), color=alt.Color("arm:N", scale=scale, legend=None)
        )
        rule = base.mark_rule(strokeWidth=1.5, opacity=0.55).encode(x=alt.X("low:Q", **x), x2="high:Q")
        tooltip = tips("task:N", "arm:N", "metric:N", "n:Q", *((f"{name}:Q", ".3~r") for name in values))
        point = base.mark_point(filled=True, size=70, opacity=1).encode(x=alt.X("accuracy:Q", **x), tooltip=tooltip)
        rows = alt.Row(
            "task:N",
            sort=[*dict.fromkeys(table["task"])],
            title=None,
            header=alt.Header(labelAngle=0, labelAlign="left"),
        )
        chart = alt.layer(rule, point).properties(width=width).facet(row=rows)
        chart = chart.resolve_scale(x="shared" if shares else "independent")
        return configured(chart.properties(title=title("result, of shares with an exact 95 % interval")))

    @property
    def verdict(self) -> str:
        """How many arms, tasks and results there are."""
        counts = {"arm": len(self.arms), "task": len(self.tasks), "result": len(self.frame)}
        return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items()) + "."

    def table(self) -> Rows:
        """Every task's deciding metric: a row per task, a column per arm; shares in percent."""
        means = self.accuracy().set_index(["task", "arm"])["accuracy"]
        scales = {task: self.scale(task) for task in self.tasks}
        title = "result" if any(scale.label for scale in scales.values()) else "accuracy, %"
        return table_of(
            {title: scales[task].named(task), **{arm: scales[task].text(means.get((task, arm))) for arm in self.arms}}
            for task in self.tasks
        )

    def save(self, path: Path) -> None:
        """Write one parquet file, whole or not at all."""
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        note = json.dumps({"schema": SCHEMA, **self.provenance}, sort_keys=True)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"stethoscope": note.encode()})
        with new_file(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    @classmethod
    def load(cls, path: Path) -> "Outcomes":
        """Read what `save` wrote.

        Raises:
            EvaluationError: the file is missing, is something else, or has a newer schema.
        """
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            note = json.loads((table.schema.metadata or {})[b"stethoscope"])
            schema, frame = note.pop("schema"), table.to_pandas()
        except Exception as error:  # a damaged file makes its readers raise almost anything
            hint = "give the `outcomes.parquet` of a run"
            raise EvaluationError(f"`{path}` does not hold outcomes: {error}", hint=hint) from error
        if schema != SCHEMA:
            raise EvaluationError(f"`{path}` was written by another version of stethoscope", hint="evaluate again")
        return cls(frame=frame, provenance=note)


def _items(numbers: Any) -> str:
    return f"{len(numbers)} items ({first_of(list(numbers), 5)})"


def _exact_interval(results: pd.Series) -> tuple[float, float]:
    """Clopper and Pearson's; the mean itself twice where results are not all 0 or 1."""
    if not results.isin((0, 1)).all():
        return results.mean(), results.mean()
    found = stats.binomtest(int(results.sum()), len(results)).proportion_ci()
    return float(found.low), float(found.high)
