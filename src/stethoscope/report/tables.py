"""The report's tables as rows of text, column by column, so that the template only lays them out."""

from typing import Any

from stethoscope.report.words import MINUS, short_names, signed
from stethoscope.results.comparison import Comparison, McNemar, PairedDifference
from stethoscope.results.diagnosis import Diagnosis, FeatureDifference, LayerDiagnosis
from stethoscope.results.edits import Edits
from stethoscope.results.evidence import Evidence
from stethoscope.results.geometry import Geometry
from stethoscope.results.selection import Selection

NONE = "\N{EN DASH}"
Row = dict[str, str]
PAGES = "https://www.neuronpedia.org/"  # a saved link that leads elsewhere is not shown


def results(comparison: Comparison) -> list[dict[str, Any]]:
    """Groups of rows: target tasks with their pool, controls; a cell per arm with value, difference and mark."""
    accuracy = {(row["task"], row["arm"]): row for row in comparison.accuracy}
    contrasts = {arm: comparison.find(arm) for arm in comparison.arms}
    names = short_names([*comparison.family, *comparison.controls])

    def of_task(task: str) -> dict[str, Any]:
        sizes = {row["n"] for (name, _), row in accuracy.items() if name == task}
        cells = []
        for arm in comparison.arms:
            row, contrast = accuracy.get((task, arm)), contrasts[arm]
            found = contrast.task(task) if contrast else None
            cells.append(
                _cell(
                    percent(row["accuracy"]) if row else NONE,
                    found.difference if found else None,
                    found.p_adjusted if found else None,
                    comparison.alpha,
                )
            )
        return {"name": names[task], "n": "/".join(map(str, sorted(sizes))), "cells": cells, "kind": ""}

    def pooled() -> dict[str, Any]:
        cells, total = [], 0
        for arm in comparison.arms:
            rows = [accuracy[task, arm] for task in comparison.family if (task, arm) in accuracy]
            total = sum(row["n"] for row in rows)
            mean = sum(row["n"] * row["accuracy"] for row in rows) / total if total else None
            contrast = contrasts[arm]
            p = contrast.pooled_mcnemar.p_value if contrast and contrast.pooled_mcnemar else None
            difference = contrast.pooled if contrast else None
            cells.append(_cell(NONE if mean is None else percent(mean), difference, p, comparison.alpha))
        return {"name": "all target items", "n": str(total), "cells": cells, "kind": "total"}

    groups = [{"title": "Target: accuracy, %", "rows": [*map(of_task, comparison.family), pooled()]}]
    if comparison.controls:
        groups.append({"title": "Control: accuracy, %", "rows": list(map(of_task, comparison.controls))})
    measured = {
        "Target: change of loss, nats per token": ("loss on held-out text", "target_loss"),
        "Control: change of loss, nats per token": ("loss on control text", "loss"),
    }
    for heading, (name, field) in measured.items():
        losses = {arm: getattr(contrast, field) if contrast else None for arm, contrast in contrasts.items()}
        if any(losses.values()):
            documents = {str(loss.n) for loss in losses.values() if loss}
            cells = [_loss(arm == comparison.baseline, loss) for arm, loss in losses.items()]
            row = {"name": name, "n": "/".join(sorted(documents)), "cells": cells, "kind": "loss"}
            groups.append({"title": heading, "rows": [row]})
    return groups


def _cell(value: str, difference: PairedDifference | None, p: float | None, alpha: float) -> dict[str, Any]:
    mark = "" if p is None else "*" * sum(p < level for level in (0.05, 0.01, 0.001))
    sign = 0 if difference is None else (difference.difference > 0) - (difference.difference < 0)
    return {
        "value": value,
        "change": signed(100 * difference.difference) if difference else "",
        "interval": _interval(difference, 100, 1) if difference else "",
        "mark": mark,
        "kind": {1: "better", -1: "worse"}.get(sign, "") if p is not None and p < alpha else "",
    }


def _loss(baseline: bool, loss: PairedDifference | None) -> dict[str, Any]:
    if loss is None:
        return {"value": "0" if baseline else NONE, "change": "", "interval": "", "mark": "", "kind": ""}
    kind = ("worse" if loss.difference > 0 else "better") if loss.clear else ""
    interval = _interval(loss, 1, 3)
    return {"value": signed(loss.difference, 3), "change": "", "interval": interval, "mark": "", "kind": kind}


def tests(comparison: Comparison) -> list[Row]:
    """Every contrast and task with the numbers that the summary leaves out; a row per contrast for all target items."""
    rows = []
    for contrast in comparison.contrasts:
        arms = {"against": contrast.a, "arm": contrast.b}
        for t in contrast.tasks:
            shown = {None: NONE, True: "shown", False: "not shown"}[t.non_inferiority.shown]
            rows.append(
                {
                    **arms,
                    "task": t.task,
                    "items": str(t.n),
                    "from, %": percent(t.accuracy_a),
                    "to, %": percent(t.accuracy_b),
                    **_difference(t.difference),
                    "z": number(t.unpaired.statistic, "+.2f") if t.unpaired else NONE,
                    "p of z": p_value(t.unpaired.p_value if t.unpaired else None),
                    **_mcnemar(t.mcnemar),
                    "p adjusted": p_value(t.p_adjusted),
                    "not worse by margin": shown,
                    "smallest gain seen": number(t.smallest_detectable_gain, ".1%"),
                }
            )
        rest = dict.fromkeys(("p adjusted", "not worse by margin", "smallest gain seen"), "")
        rows.append(
            {
                **arms,
                "task": "all target items",
                "items": str(contrast.pooled.n),
                "from, %": "",
                "to, %": "",
                **_difference(contrast.pooled),
                "z": "",
                "p of z": "",
                **_mcnemar(contrast.pooled_mcnemar),
                **rest,
            }
        )
    return rows


def _difference(found: PairedDifference) -> Row:
    return {"difference": signed(100 * found.difference), "interval": _interval(found, 100, 1)}


def _mcnemar(found: McNemar | None) -> Row:
    return {
        "only first right": str(found.b) if found else NONE,
        "only second right": str(found.c) if found else NONE,
        "McNemar p": p_value(found.p_value if found else None),
    }


def layers(diagnosis: Diagnosis, selection: Selection, edits: Edits | None) -> list[Row]:
    """A row per layer; several numbers are one per corpus, and those in brackets are chance."""
    reasons = {choice.layer: choice.reason for choice in selection.choices}
    energy = {e.layer: percent(e.share) for e in edits.energy} if edits else {}
    rows = []
    for layer in diagnosis.layers:
        healths = [layer.health[name] for name in diagnosis.corpora if name in layer.health]
        row = {
            "layer": str(layer.layer),
            "score": f"{layer.score:.3f}",
            "null": f"{layer.null:.3f}",
            "excess": signed(layer.excess, 3),
            "interval": " to ".join(signed(end, 3) for end in layer.interval),
            "rank": str(layer.rank),
            "as high in resamples": number(layer.stability, ".0%"),
            **({"against": layer.against} if len(diagnosis.controls) > 1 else {}),
            "increment": signed(layer.increment, 3),
            "z of increment": number(layer.increment_z, ".1f"),
            "z": number(layer.z, ".1f"),
            "p": p_value(layer.p),
            "p, all layers": p_value(layer.p_familywise),
            "variance explained": " / ".join(number(h.variance_explained, ".2f") for h in healths),
            "L0": " / ".join(number(h.l0, ".0f") for h in healths),
            "dead": " / ".join(number(h.dead, ".1%") for h in healths),
            "dense": " / ".join(number(h.dense, ".1%") for h in healths),
        }
        if edits:
            row["energy of the change, %"] = energy.get(layer.layer, NONE)
        rows.append({**row, "fate": reasons.get(layer.layer, "")})
    return rows


def costs(comparison: Comparison) -> list[Row]:
    """What the trade-off picture draws: arm, gain and cost with their intervals."""
    rows = []
    for arm in comparison.arms:
        if contrast := comparison.find(arm):
            gain, loss = contrast.pooled, contrast.loss
            rows.append(
                {
                    "arm": arm,
                    "gain, points": signed(100 * gain.difference),
                    "gain, interval": _interval(gain, 100, 1),
                    "control loss, nats per token": signed(loss.difference, 4) if loss else NONE,
                    "loss, interval": _interval(loss, 1, 4) if loss else NONE,
                }
            )
    return rows


def feature_row(feature: FeatureDifference) -> list[str]:
    """Feature, firing rates and shares of activation mass in %, and the difference of the shares in points."""
    return [
        str(feature.feature),
        f"{100 * feature.target_rate:.2f}",
        f"{100 * feature.control_rate:.2f}",
        f"{100 * feature.target_mass:.2f}",
        f"{100 * feature.control_mass:.2f}",
        signed(100 * (feature.target_mass - feature.control_mass), 2),
    ]


def health(layer: LayerDiagnosis) -> list[Row]:
    """An SAE's health, a row per corpus."""
    return [
        {
            "SAE on": name,
            "variance explained": number(found.variance_explained, ".2f"),
            "L0": number(found.l0, ".0f"),
            "dead": number(found.dead, ".1%"),
            "dense": number(found.dense, ".1%"),
            "encoding error": number(found.encoding_error, ".2%"),
        }
        for name, found in layer.health.items()
    ]


def evidence(found: Evidence, diagnosis: Diagnosis) -> dict[int, list[dict[str, Any]]]:
    """By layer, what each feature shown fires on: contexts by corpus, rates, promoted tokens and a page about it."""
    rates = {
        layer.layer: {f.feature: (percent(f.target_rate), percent(f.control_rate)) for f in layer.features}
        for layer in diagnosis.layers
    }
    return {
        part.layer: [
            {
                "feature": feature.feature,
                "rates": rates.get(part.layer, {}).get(feature.feature),
                "contexts": {
                    name: [
                        {
                            "before": _one_line(context.before).lstrip(),
                            "token": _visible(context.token),
                            "after": _one_line(context.after).rstrip(),
                            "activation": f"{context.activation:.{1 if context.activation >= 1 else 3}f}",
                        }
                        for context in contexts
                    ]
                    for name, contexts in feature.contexts.items()
                },
                "promotes": [_visible(token) for token in feature.promotes or ()],
                "link": feature.link if (feature.link or "").startswith(PAGES) else None,
            }
            for feature in part.features
        ]
        for part in found.layers
    }


def _visible(token: str) -> str:
    """A token that is there to be seen, even one of spaces alone."""
    return _one_line(token) if token.strip(" ") else token.replace(" ", "\N{OPEN BOX}")


def _one_line(text: str) -> str:
    """Text with its line ends made visible."""
    return text.replace("\r", "").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")


def provenance(*results: Diagnosis | Evidence | Selection | Geometry | Edits | None) -> list[Row]:
    """What each result says of where it comes from."""
    rows = []
    for result in results:
        if result is None:
            continue
        found = result.provenance
        entries = {"stethoscope": found.stethoscope, "seed": str(found.seed), **dict(sorted(found.inputs.items()))}
        rows += [{"result": result.FILE, "what": what, "value": value} for what, value in entries.items()]
    return rows


def scalars(value: Any) -> list[Row]:
    """The entries of a mapping that are text or numbers, in its order."""
    entries = value.items() if isinstance(value, dict) else ()
    return [{"entry": str(k), "value": str(v)} for k, v in entries if isinstance(v, str | int | float)]


def percent(share: float) -> str:
    """A share in percent, one digit."""
    return f"{100 * share:.1f}"


def p_value(p: float | None) -> str:
    """A p-value with three digits, or that it is smaller."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float | None, form: str) -> str:
    """A number that may be undefined."""
    return NONE if value is None else format(value, form).replace("-", MINUS)


def _interval(difference: PairedDifference, factor: int, digits: int) -> str:
    if difference.low is None or difference.high is None:
        return "no interval" if difference.reason else ""
    return f"{signed(factor * difference.low, digits)} to {signed(factor * difference.high, digits)}"
