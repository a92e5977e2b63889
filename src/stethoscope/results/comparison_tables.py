"""The tables of a comparison, for the command line and the report: accuracy, tests, and where a change comes from."""

from dataclasses import dataclass
from typing import Any

from stethoscope.display import NONE, Rows, number, p_value, percent, short_names, table_of
from stethoscope.results.comparison import CAUSES, Comparison, Contrast, flipped
from stethoscope.results.paired import PairedDifference
from stethoscope.results.scale import Scale

WHOLE = "all target items"


def _whole(of: Comparison | Contrast, scale: Scale) -> str:
    """What the items that are pooled are called: those of one unit."""
    return WHOLE if len(of.together) == len(of.family) else f"{WHOLE} in {scale.unit}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value of one arm, and what it gains over the baseline's.

    Attributes:
        change: the gain, above 0 where the arm is better, in points for shares; ``interval`` is its interval.
        stars: one each for an adjusted p below 0.05, 0.01 and 0.001.
        kind: ``better`` or ``worse`` where the difference is significant, else empty.
    """

    value: str
    change: str = ""
    interval: str = ""
    stars: str = ""
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of `by_task`, with a cell per arm."""

    name: str
    items: str
    cells: list[Cell]
    kind: str = ""


def by_task(comparison: Comparison) -> dict[str, list[Line]]:
    """What was measured -> its rows: accuracy on target tasks and on all their items, on controls, change of loss."""
    rows = {(row["task"], row["arm"]): row for row in comparison.accuracy}
    names = short_names([*comparison.family, *comparison.controls])
    contrasts = {arm: comparison.find(arm) for arm in comparison.arms}

    def accuracy(name: str, tasks: list[str], whole: bool = False) -> Line:
        cells, sizes, scales = [], set(), {comparison.scale(task) for task in tasks}
        scale = comparison.scale(tasks[0]) if len(scales) == 1 else Scale(unit=comparison.scale(tasks[0]).unit)
        for arm, contrast in contrasts.items():
            mine = [rows[task, arm] for task in tasks if (task, arm) in rows]
            total = sum(row["n"] for row in mine)
            sizes |= {total} if total else set()
            known = total and len(scales) == 1
            value = scale.text(sum(row["n"] * row["accuracy"] for row in mine) / total if known else None)
            tested = contrast.task(tasks[0]) if contrast and not whole else None
            if contrast and whole:
                p = (contrast.pooled_mcnemar or contrast.pooled).p_value
                cells.append(_cell(value, contrast.pooled, p, comparison.alpha, scale))
            elif tested:
                cells.append(_cell(value, tested.difference, tested.p_adjusted, comparison.alpha, scale))
            else:
                cells.append(Cell(value=value))
        items = "/".join(map(str, sorted(sizes)))
        return Line(name=scale.named(name), items=items, cells=cells, kind="total" if whole else "")

    def loss(name: str, losses: list[PairedDifference | None]) -> Line:
        cells = [
            Cell(
                value=number(loss.difference, "+.3f"),
                interval=loss.text("+.3f"),
                kind="worse" if loss.above else "better" if loss.below else "",
            )
            if loss
            else Cell(value="0" if arm == comparison.baseline else NONE)
            for arm, loss in zip(contrasts, losses, strict=True)
        ]
        documents = sorted({str(loss.n) for loss in losses if loss})
        return Line(name=name, items="/".join(documents), cells=cells, kind="loss")

    losses = {
        "loss on held-out target text": [c.target_loss if c else None for c in contrasts.values()],
        "loss on control text": [c.loss if c else None for c in contrasts.values()],
    }
    whole = accuracy(_whole(comparison, comparison.scale(comparison.together[0])), comparison.together, whole=True)

    def title(group: str, tasks: list[str]) -> str:
        return group + ("" if any(comparison.scale(task).label for task in tasks) else ": accuracy, %")

    groups = {
        title("Target", comparison.family): [*(accuracy(names[task], [task]) for task in comparison.family), whole],
        title("Control", comparison.controls): [accuracy(names[task], [task]) for task in comparison.controls],
        "Change of loss, nats per token": [loss(name, found) for name, found in losses.items() if any(found)],
    }
    return {title: lines for title, lines in groups.items() if lines}


def _cell(value: str, difference: PairedDifference, p: float | None, alpha: float, scale: Scale) -> Cell:
    clear = p is not None and p < alpha
    return Cell(
        value=value,
        change=scale.gain(difference.difference),
        interval=difference.text(scale.form, scale.factor),
        stars="" if p is None else "*" * sum(p < level for level in (0.05, 0.01, 0.001)),
        kind=("better" if difference.difference > 0 else "worse") if clear else "",
    )


def accuracy_table(comparison: Comparison) -> Rows:
    """`by_task` without intervals; ``*`` marks a significant difference from the baseline."""
    lines = [line for lines in by_task(comparison).values() for line in lines]
    body = [[line.name, *(f"{cell.value}{'*' if cell.kind else ' '}" for cell in line.cells)] for line in lines]
    labels = [comparison.scale(task).label for task in (*comparison.family, *comparison.controls)]
    return [["result" if any(labels) else "accuracy, %", *comparison.arms], *body]


def accuracy_rows(comparison: Comparison) -> Rows:
    """A row per task and arm: every metric, and what tells format and length from correctness; shares in percent."""
    metrics = list(dict.fromkeys(name for row in comparison.accuracy for name in row["metrics"]))
    order = [*comparison.family, *comparison.controls]
    scales = {name: scale for task in reversed(order) for name, scale in comparison.scales.get(task, {}).items()}
    return table_of(
        {
            "%": str(row["task"]),
            "arm": str(row["arm"]),
            "items": str(row["n"]),
            **{
                scales.get(name, Scale()).named(name): comparison.scale(row["task"], name).text(
                    row["metrics"].get(name)
                )
                for name in metrics
            },
            "extracted": percent(row["extracted"]),
            "cut off": percent(row["truncated"]),
            "right of extracted": comparison.scale(row["task"], row["metric"]).text(row["accuracy_extracted"]),
            "tokens": number(row["generated_tokens"], ".0f"),
        }
        for row in sorted(comparison.accuracy, key=lambda row: order.index(row["task"]))
    )


def contrast_rows(contrast: Contrast) -> Rows:
    """A row per task and one for all of the family: what changed, and whether chance explains it; shares in percent.

    A gain is above 0 where the arm under test is better, be that more of the metric or less. The last four columns
    say what so many items could and did rule out.
    """
    pooled, rows = contrast.pooled, []
    for t in contrast.tasks:
        bound, z, scale = t.non_inferiority, t.unpaired, t.scale
        rows.append(
            {
                f"{contrast.a} to {contrast.b}": t.task,
                "metric": scale.named(t.metric),
                "items": str(t.n),
                "from": scale.text(t.accuracy_a),
                "to": scale.text(t.accuracy_b),
                **_change(t.difference, t.mcnemar, scale),
                "p adjusted": p_value(t.p_adjusted),
                "z unpaired": number(z.statistic if z else None, "+.2f"),
                "p of z": p_value(z.p_value if z else None),
                "margin": NONE if bound.margin is None else f"{scale.factor * bound.margin:g}",
                "loss of it ruled out": {None: NONE, True: "yes", False: "no"}[bound.shown],
                "smallest provable margin": scale.text(bound.smallest_margin),
                "smallest visible gain": percent(t.smallest_detectable_gain),
            }
        )
    whole = dict.fromkeys(rows[0], "") | _change(pooled, contrast.pooled_mcnemar, contrast.scale)
    whole |= {"items": str(pooled.n), "metric": contrast.scale.unit}
    whole[next(iter(whole))] = _whole(contrast, contrast.scale)
    return table_of([*rows, whole] if len(rows) > 1 else rows)


def _change(difference: PairedDifference, test: Any, scale: Scale) -> dict[str, str]:
    return {
        "gain": scale.gain(difference.difference),
        f"{100 * difference.confidence:g} % interval": difference.text(scale.form, scale.factor),
        "lost : gained": f"{test.b} : {test.c}" if test else NONE,
        "p exact": p_value(test.p_value if test else None),
    }


def gain_rows(contrast: Contrast) -> Rows:
    """Where the change comes from: a row per task and one for all, items that b mended (+) and broke (-) by what was
    wrong with the failed response, and the net; empty where no cause is known."""
    known = [t for t in contrast.tasks if t.flips]
    parts = {t.task: [t] for t in known}
    if len(family := [t for t in known if t.in_family]) > 1:
        parts[WHOLE if len(family) == len(contrast.family) else f"{WHOLE} of these"] = family
    rows = []
    for name, tasks in parts.items():
        changes = {words: flipped(tasks, cause) for cause, words in CAUSES.items()}
        counted = [change for change in changes.values() if change]
        rows.append(
            {f"mended and broken by {contrast.b}": name}
            | {words: f"+{change.gained} -{change.lost}" if change else NONE for words, change in changes.items()}
            | {"net items": f"{sum(c.net for c in counted):+d}", "points": f"{sum(c.points for c in counted):+.1f}"}
        )
    return table_of(rows)


def noise(comparison: Comparison) -> list[str]:
    """By task, the items whose result changed when an arm was evaluated again."""
    return [
        f"{floor.task}: {floor.changed} of {floor.n} items of `{floor.arm}` changed their result when it was"
        f" evaluated again ({percent(floor.share)} %, {percent(floor.low)} to {percent(floor.high)} %)"
        for floor in comparison.noise
    ]


def notes(contrast: Contrast) -> list[str]:
    """Why what is missing in the tables is missing, once for each reason."""
    found: dict[str, list[str]] = {}
    for t in contrast.tasks:
        results = {"z": t.unpaired, "interval": t.difference, "flips": t.flips}
        reasons = t.reasons | {name: result.reason for name, result in results.items() if result and result.reason}
        for name, reason in reasons.items():
            found.setdefault(f"{name.replace('_', ' ')}: {reason}", []).append(t.task)
    count, whole = len(contrast.tasks), _whole(contrast, contrast.scale)
    lines = [f"{'every task' if len(tasks) == count > 1 else ', '.join(tasks)}: {why}" for why, tasks in found.items()]
    return [*lines, *([f"{whole}: interval: {contrast.pooled.reason}"] if contrast.pooled.reason else [])]
