"""Outcomes and comparisons as rows of text, the first one the header, for a terminal."""

from statistics import fmean
from typing import Any

from stethoscope.results.comparison import Comparison, Contrast, PairedDifference

_NONE = "-"  # not defined, or not known

Rows = list[list[str]]


def accuracy_rows(comparison: Comparison) -> Rows:
    """A row per task and arm: every metric, and what tells format and length from correctness, in percent."""
    metrics = list(dict.fromkeys(name for row in comparison.accuracy for name in row["metrics"]))
    shares = ("extracted", "truncated", "accuracy_extracted")
    order = [*comparison.family, *comparison.controls]
    header = ["%", "arm", "items", *metrics, "extracted", "cut off", "right of extracted", "tokens"]
    body = [
        [
            str(row["task"]),
            str(row["arm"]),
            str(row["n"]),
            *[_percent(row["metrics"].get(name)) for name in metrics],
            *[_percent(row[name]) for name in shares],
            _NONE if row["generated_tokens"] is None else f"{row['generated_tokens']:.0f}",
        ]
        for row in sorted(comparison.accuracy, key=lambda row: order.index(row["task"]))
    ]
    return [header, *body]


def accuracy_table(comparison: Comparison) -> Rows:
    """Tasks by arms, in percent, with a header row; ``*`` marks a significant difference from the base."""
    found = {(row["arm"], row["task"]): row["accuracy"] for row in comparison.accuracy}
    arms = list(dict.fromkeys(row["arm"] for row in comparison.accuracy))
    contrasts = {contrast.b: contrast for contrast in comparison.contrasts if contrast.a == comparison.baseline}
    marked = {(arm, task) for arm, c in contrasts.items() for task in (*c.improved, *c.worsened)}

    def percent(task: str) -> list[str]:
        return [f"{100 * found[arm, task]:.1f}{'*' if (arm, task) in marked else ' '}" for arm in arms]

    means = [100 * fmean(found[arm, task] for task in comparison.family) for arm in arms]
    found_losses = {
        "target loss, change": [contrasts[arm].target_loss if arm in contrasts else None for arm in arms],
        "general loss, change": [contrasts[arm].loss if arm in contrasts else None for arm in arms],
    }
    return [
        ["accuracy, %", *arms],
        *[[task, *percent(task)] for task in comparison.family],
        ["mean of these", *[f"{mean:.1f} " for mean in means]],
        *[[task, *percent(task)] for task in comparison.controls],
        *[
            [name, *[f"{loss.difference:+.3f}" if loss else "" for loss in losses]]
            for name, losses in found_losses.items()
            if any(losses)
        ],
    ]


def contrast_rows(contrast: Contrast) -> Rows:
    """A row per task and one for all of the family: how much changed, and whether chance explains it."""
    pooled, test = contrast.pooled, contrast.pooled_mcnemar
    header = [
        f"{contrast.a} to {contrast.b}", "metric", "items", "from %", "to %", "change",
        f"{100 * pooled.confidence:g} % interval", "lost : gained", "p exact", "p adjusted",
    ]  # fmt: skip
    body = [
        [
            t.task,
            t.metric,
            str(t.n),
            _percent(t.accuracy_a),
            _percent(t.accuracy_b),
            _points(t.difference.difference),
            _range(t.difference),
            f"{t.mcnemar.b} : {t.mcnemar.c}" if t.mcnemar else _NONE,
            _p(t.mcnemar.p_value if t.mcnemar else None),
            _p(t.p_adjusted),
        ]
        for t in contrast.tasks
    ]
    last = [
        "all of the family", "", str(pooled.n), "", "", _points(pooled.difference), _range(pooled),
        f"{test.b} : {test.c}" if test else _NONE, _p(test.p_value if test else None), "",
    ]  # fmt: skip
    return [header, *body, *([last] if len(body) > 1 else [])]


def bound_rows(contrast: Contrast) -> Rows:
    """A row per task: the unpaired test, and what the items could and did rule out, in points."""
    header = [
        "task",
        "z unpaired",
        "p of z",
        "margin",
        "ruled out",
        "smallest provable margin",
        "smallest visible gain",
    ]
    body = []
    for t in contrast.tasks:
        bound, z = t.non_inferiority, t.unpaired
        body.append(
            [
                t.task,
                _NONE if z is None or z.statistic is None else f"{z.statistic:+.2f}",
                _p(z.p_value if z else None),
                f"{100 * bound.margin:g}",
                _NONE if bound.shown is None else "yes" if bound.shown else "no",
                _NONE if bound.smallest_margin is None else f"{100 * bound.smallest_margin:.1f}",
                _NONE if t.smallest_detectable_gain is None else f"{100 * t.smallest_detectable_gain:.1f}",
            ]
        )
    return [header, *body]


def gain_rows(comparison: Comparison, contrast: Contrast) -> Rows:
    """Where the change comes from: a row per task and one for all, items that b mended (+) and broke (-) by what was
    wrong with the failed response, and the net in points."""
    frame = comparison.gains()
    chosen = frame[(frame["a"] == contrast.a) & (frame["b"] == contrast.b)]
    words = {"format": "no answer found", "truncation": "cut off by the limit", "correctness": "wrong answer"}
    header = [f"mended and broken by {contrast.b}", *words.values(), "net items", "points"]
    sizes = {t.task: t.n for t in contrast.tasks}
    groups = {str(task): rows for task, rows in chosen.groupby("task", sort=False)}
    family = [t.task for t in contrast.tasks if t.in_family and t.flips]
    if len(family) > 1:
        whole = "all of the family"
        groups[whole], sizes[whole] = chosen[chosen["task"].isin(family)], sum(sizes[task] for task in family)
    body = []
    for task, rows in groups.items():
        cells = []
        for cause in words:
            counted = rows[rows["cause"] == cause].dropna(subset="net")
            cells.append(f"+{counted['gained'].sum()} -{counted['lost'].sum()}" if len(counted) else _NONE)
        net = int(rows["net"].sum())
        body.append([task, *cells, f"{net:+d}", _points(net / sizes[task])])
    return [header, *body]


def noise(comparison: Comparison) -> list[str]:
    """What an arm that was evaluated twice shows of noise, by task."""
    return [
        f"{floor.task}: {floor.changed} of {floor.n} items of `{floor.arm}` changed their result when it was"
        f" evaluated again ({100 * floor.share:.1f} %, {100 * floor.low:.1f} to {100 * floor.high:.1f} %)"
        for floor in comparison.noise
    ]


def notes(contrast: Contrast) -> list[str]:
    """Why what is missing in the tables is missing, once for each reason."""
    found: dict[str, list[str]] = {}
    for t in contrast.tasks:
        reasons: dict[str, Any] = dict(t.reasons)
        for name, result in (("z", t.unpaired), ("interval", t.difference), ("flips", t.flips)):
            if result is not None and result.reason:
                reasons[name] = result.reason
        for name, reason in reasons.items():
            found.setdefault(f"{name.replace('_', ' ')}: {reason}", []).append(t.task)
    everywhere = len(contrast.tasks)
    lines = [
        f"{'every task' if len(tasks) == everywhere > 1 else ', '.join(tasks)}: {reason}"
        for reason, tasks in found.items()
    ]
    if contrast.pooled.reason:
        lines.append(f"all of the family: interval: {contrast.pooled.reason}")
    return lines


def _percent(value: Any) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _range(difference: PairedDifference) -> str:
    if difference.low is None or difference.high is None:
        return _NONE
    return f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"


def _p(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"
