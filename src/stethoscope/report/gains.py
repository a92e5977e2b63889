"""Where a change of accuracy comes from: items mended and broken, by what was wrong with the failed response."""

from collections.abc import Iterable
from typing import NamedTuple

import altair as alt

from stethoscope.report.look import COLOURS, axis, configured, title
from stethoscope.report.tables import NONE, Row
from stethoscope.report.words import MINUS, signed
from stethoscope.results.comparison import Comparison, TaskContrast

_CAUSES = {
    "correctness": ("wrong answer", "selected"),
    "format": ("no answer found", "tuned"),
    "truncation": ("cut off by the limit", "projected"),
}


class _Change(NamedTuple):
    gained: int
    lost: int
    items: int

    @property
    def points(self) -> float:
        return 100 * (self.gained - self.lost) / self.items


def gain_split(comparison: Comparison, *, width: int = 640) -> alt.LayerChart | None:
    """Each arm's change over the baseline on all target items, by cause of failure; None where causes are not known."""
    rows = [
        {
            "arm": arm,
            "cause": words,
            "points": change.points,
            "mended": change.gained,
            "broken": change.lost,
        }
        for arm, found in _split(comparison).items()
        for cause, (words, _) in _CAUSES.items()
        if (change := _sum(found, cause)) is not None
    ]
    if not rows:
        return None
    there = [look for look in _CAUSES.values() if any(row["cause"] == look[0] for row in rows)]
    colours = alt.Scale(domain=[look[0] for look in there], range=[COLOURS[look[1]] for look in there])
    bars = (
        alt.Chart(alt.NamedData(name="gains"))
        .mark_bar(height=12)
        .encode(
            x=alt.X("points:Q", title="points", axis=axis("+.3~f"), stack=True),
            y=alt.Y("arm:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color("cause:N", scale=colours, sort=None, legend=alt.Legend(orient="top", title=None)),
            tooltip=[
                alt.Tooltip("arm:N"),
                alt.Tooltip("cause:N"),
                alt.Tooltip("mended:Q"),
                alt.Tooltip("broken:Q"),
                alt.Tooltip("points:Q", format="+.1f"),
            ],
        )
    )
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=COLOURS["muted"]).encode(x="zero:Q")
    height = 24 * len({row["arm"] for row in rows}) + 12
    heading = title("items mended less items broken, in points")
    return configured(
        alt.layer(bars, zero).properties(width=width, height=height, title=heading, datasets={"gains": rows})
    )


def gain_rows(comparison: Comparison) -> list[Row]:
    """A row per arm and task, and one for all target items: mended and broken by cause, and the net in points."""
    rows = []
    for arm, found in _split(comparison).items():
        parts = {t.task: [t] for t in found}
        if sum(t.in_family for t in found) > 1:
            parts["all target items"] = [t for t in found if t.in_family]
        for task, several in parts.items():
            counted = {cause: _sum(several, cause, family=False) for cause in _CAUSES}
            net = sum(change.points for change in counted.values() if change)
            rows.append(
                {
                    "arm": arm,
                    "task": task,
                    **{
                        words: f"+{change.gained} {MINUS}{change.lost}" if (change := counted[cause]) else NONE
                        for cause, (words, _) in _CAUSES.items()
                    },
                    "net, points": signed(net),
                }
            )
    return rows


def _split(comparison: Comparison) -> dict[str, list[TaskContrast]]:
    """The tasks of which causes are known, by arm, against the baseline."""
    found = {arm: comparison.find(arm) for arm in comparison.arms}
    split = {arm: [t for t in contrast.tasks if t.flips] for arm, contrast in found.items() if contrast}
    return {arm: tasks for arm, tasks in split.items() if tasks}


def _sum(tasks: Iterable[TaskContrast], cause: str, *, family: bool = True) -> _Change | None:
    """Counts of one cause over tasks; None where no task knows it."""
    chosen = [t for t in tasks if t.in_family or not family]
    known = [t.flips for t in chosen if t.flips and cause in t.flips.gained]
    if not known:
        return None
    gained, lost = (sum(getattr(flips, side)[cause] for flips in known) for side in ("gained", "lost"))
    return _Change(gained, lost, sum(t.n for t in chosen))
