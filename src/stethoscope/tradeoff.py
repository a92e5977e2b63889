"""The trade-off as curves: target gain against damage on protected text, of the filter and its rivals.

    found = measure_tradeoff(model, task_vector, methods, {"target": rows, "general": other}, provenance=provenance)
    found.methods["filter"].damage["general"]

Losses are paired with the base's document by document. Intervals come from a bootstrap that draws documents and reads
each figure off the whole curve again.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from stethoscope.artifacts import Provenance, scratch_folder
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import applied
from stethoscope.editing.filter import FilteredChange, write_filters
from stethoscope.editing.moments import Progress
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.rivals import WHOLE, Method, channel_importance, projected, rivals
from stethoscope.evaluation.outcomes import PerDocument
from stethoscope.evaluation.text_loss import document_losses
from stethoscope.filtering import broken
from stethoscope.recipe import GENERAL, HELD_OUT
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.results.filtering import Filtering
from stethoscope.results.keeping import Measured
from stethoscope.results.selection import Selection
from stethoscope.results.tradeoff import BUDGET, FILTER, SHARE, TARGET, Curve, Figure, Point, TradeOff

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stethoscope.context import Context

RESAMPLES = 2000
Tokens = tuple[list[list[int]], list[int] | None]  # ids of each document, and the first that counts if not all do
Drawn = Float64[ndarray, " draws"]  # of the documents as they are, then of each resample of them
Curves = Float64[ndarray, "draws points"]
Key = TypeVar("Key", bound=Hashable)


def recipe_tradeoff(
    context: "Context",
    diagnosis: Diagnosis,
    selection: Selection,
    directions: Mapping[int, Callable[[], Float[Tensor, "features d"]]],
    provenance: Provenance,
    *,
    progress: Progress,
) -> TradeOff:
    """Measure every method on a recipe's texts of ``evaluate``; the filter is made from its target and protected texts.

    Args:
        directions: layer -> what loads its feature directions, most specific first.
    """
    recipe, model, task_vector = context.recipe, context.model, context.task_vector
    measured = {TARGET: HELD_OUT, GENERAL: GENERAL}
    weights = recipe.protected
    texts = {
        name: context.batches(name, without=broken(diagnosis, name), most=recipe.edit.tokens)
        for name in (TARGET, *weights)
    }
    others = [batch for name, text in texts.items() if name != TARGET for batch in text]
    importance = channel_importance(model, others, list(coefficients(task_vector, WHOLE)))
    selected = selection.amounts(recipe.edit.coefficient)
    by_score = sorted(diagnosis.layers, key=lambda one: (one.flag is not None, -one.excess, one.layer))
    best = [one.layer for one in by_score]
    raw = {float(k): EditPlan.for_layers(best[:k]) for k in range(len(best), -1, -1)}
    rows = {name: context.rows(text, recipe.tradeoff.documents) for name, text in measured.items()}
    with scratch_folder(context.folder / "filters") as folder:
        filters, strengths = folder / FILTER, sorted(recipe.tradeoff.strengths)
        write_filters(
            model,
            task_vector,
            texts,
            filters,
            provenance=provenance,
            strengths=strengths,
            weights=weights,
            progress=lambda done, total: progress(done, 2 * total),
        )
        methods = [
            *filters_over(filters, task_vector, EditPlan.for_layers(selected)),
            Method("raw, best layers", "layers", raw),
            *rivals(context.base.layers, importance, seed=recipe.seed),
            projected(task_vector, directions),
        ]
        return measure_tradeoff(
            model,
            task_vector,
            methods,
            rows,
            provenance=provenance,
            progress=lambda done, total: progress(total + done, 2 * total),
        )


def filters_over(folder: Path, task_vector: TaskVector, selected: EditPlan) -> list[Method]:
    """What `write_filters` wrote, in all layers and in a plan's, over the strength; 0 is without a filter."""
    transforms = {s: FilteredChange(folder, s, task_vector) for s in Filtering.load(folder).strengths}
    return [
        Method(name, "strength", {0.0: raw} | {s: replace(raw, transform=found) for s, found in transforms.items()})
        for name, raw in ((FILTER, WHOLE), (f"{FILTER}, selected layers", selected))
    ]


def measure_tradeoff(
    model: "PreTrainedModel",
    task_vector: TaskVector,
    methods: Sequence[Method],
    texts: Mapping[str, Tokens],
    *,
    provenance: Provenance,
    progress: Progress | None = None,
) -> TradeOff:
    """Measure every plan of every method in memory.

    Args:
        model: the base, live.
        methods: `FILTER` among them.
        texts: ``target`` and protected texts, of documents that no edit was made from.
        provenance: its seed draws the documents.
        progress: called with plans done and in all.
    """
    plans = {id(plan): plan for plan in (None, WHOLE, *(plan for one in methods for plan in one.plans.values()))}
    losses: dict[int, dict[str, PerDocument]] = {}
    for done, (key, plan) in enumerate(plans.items(), 1):
        losses[key] = losses_under(model, task_vector, plan, texts)
        if progress:
            progress(done, len(plans))
    drawn = falls(losses, losses[id(None)], seed=provenance.seed)
    whole = drawn[id(WHOLE)][TARGET]
    kept = {key: share_kept(found[TARGET], whole) for key, found in drawn.items()}

    def curve(method: Method) -> Curve:
        keys = {value: id(plan) for value, plan in method.plans.items()}
        shares = np.stack([kept[key] for key in keys.values()], axis=1)
        damage = {t: -np.stack([drawn[key][t] for key in keys.values()], axis=1) for t in texts if t != TARGET}
        points = (
            Point(value=value, kept=interval(kept[key]), damage={t: interval(-drawn[key][t]) for t in damage})
            for value, key in keys.items()
        )
        found = {text: figures(shares, damages) for text, damages in damage.items()}
        return Curve(
            parameter=method.parameter,
            points=tuple(points),
            damage={text: least for text, (least, _) in found.items()},
            kept={text: most for text, (_, most) in found.items()},
        )

    return TradeOff(
        provenance=provenance,
        documents={text: len(rows) for text, (rows, _) in texts.items()},
        gain=interval(whole),
        methods={method.name: curve(method) for method in methods},
    )


def losses_under(
    model: "PreTrainedModel", task_vector: TaskVector, plan: EditPlan | None, texts: Mapping[str, Tokens]
) -> dict[str, PerDocument]:
    """Each text's losses by document under a plan; None is the base."""
    with applied(model, task_vector, plan) if plan else nullcontext():
        return {text: document_losses(model, rows, starts=starts) for text, (rows, starts) in texts.items()}


def falls(
    losses: Mapping[Key, Mapping[str, PerDocument]], base: Mapping[str, PerDocument], *, seed: int = 0
) -> dict[Key, dict[str, Drawn]]:
    """Nats per token by which each text's loss falls against the base's."""
    rng, drawn = np.random.default_rng(seed), {}
    for text, before in base.items():
        n = len(before.tokens)
        drawn[text] = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)])
    return {
        key: {t: (drawn[t] @ (base[t].sums - after.sums)) / (drawn[t] @ after.tokens) for t, after in found.items()}
        for key, found in losses.items()
    }


def share_kept(gain: Drawn, whole: Drawn) -> Drawn:
    """The share of the whole gain; NaN where there is none."""
    return np.divide(gain, whole, out=np.full(len(gain), np.nan), where=whole > 0)


def interval(values: Drawn) -> Measured:
    """The value, and its 95 % interval; None for what is not finite."""
    ends = [values[0], *np.quantile(values[1:], [0.025, 0.975], method="nearest")]
    value, low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return Measured(value=value, low=low, high=high)


def figures(kept: Curves, damage: Curves) -> tuple[Figure, Figure]:
    """The least damage on a curve with `SHARE` of the gain kept, and the most of it kept with `BUDGET` of damage."""
    least, most = interval(least_at(damage, kept, SHARE)), interval(-least_at(-kept, -damage, -BUDGET))
    none = "the fine-tune gains nothing on the target text" if np.isnan(kept[0]).all() else ""
    short = none or f"no setting keeps {100 * SHARE:g} % of the gain" if least.value is None else ""
    over = none or f"every setting damages more than {BUDGET:g} nats per token" if most.value is None else ""
    return Figure(**least.model_dump(), reason=short), Figure(**most.model_dump(), reason=over)


def least_at(y: Curves, x: Curves, level: float) -> Drawn:
    """The least y where x is at least ``level``, along the lines that join neighbours; infinite where x never is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (level - x[:, :-1]) / np.diff(x)  # of the way to the next point, where x crosses the level
        crossed = np.where((part > 0) & (part < 1), y[:, :-1] + part * np.diff(y), np.inf)
    return np.concatenate([np.where(x >= level, y, np.inf), crossed], axis=1).min(axis=1)
