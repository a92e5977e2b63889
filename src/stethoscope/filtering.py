"""Makes a run's filter, its recommended edit and what they let through, from the results of earlier stages.

Where a recipe has no calibration text, every fifth document of each text is held back: it judges the edits and makes no
filter. The diagnosis may have read it: that ranks layers by what SAEs read and never by a loss, and no claim rests
on these documents but on test items that occur in none of the texts.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stethoscope.artifacts import Provenance
from stethoscope.errors import CheckpointError
from stethoscope.recipe import Recipe

if TYPE_CHECKING:
    from stethoscope.context import Context
    from stethoscope.editing.plan import EditPlan
    from stethoscope.results.calibration import Calibration
    from stethoscope.results.diagnosis import Diagnosis
    from stethoscope.results.evidence import Evidence
    from stethoscope.results.filtering import Filtering

KEPT = 0.95  # of the largest gain within the budget: the recommended edit is that of least damage with it
COEFFICIENTS = (0.5, 0.75, 1.0, 1.25, 1.5)
STRENGTH = 1.0  # of filtered arms where no strength is fixed or recommended
RATE = 0.001  # share of a text's tokens on which a feature must fire to be judged by what the filter passes
SHARE = 0.1  # of those features are judged: the change is largest along them. A share of next to nothing is noise
MOST = 5  # features of a layer that are shown of those that the filter passes, and of those that it mutes

Results = Mapping[str, Any]
Progress = Callable[[int, int], None]


def strengths(recipe: Recipe) -> tuple[float, ...]:
    """Of the filters to make."""
    from stethoscope.editing.filter import STRENGTHS

    return STRENGTHS if recipe.edit.filter == "auto" else (float(recipe.edit.filter),)


def make_filter(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "Filtering":
    """Filter every layer's change at several strengths by the target and the protected texts."""
    from stethoscope.editing.filter import write_filters

    recipe, diagnosis = context.recipe, results["diagnose"]
    without = {name: {*broken(diagnosis, name), *context.held_back(name)} for name in ("target", *recipe.protected)}
    return write_filters(
        context.model,
        context.task_vector,
        {name: context.batches(name, without=some, most=recipe.edit.tokens) for name, some in without.items()},
        context.filters,
        provenance=provenance,
        strengths=strengths(recipe),
        weights=recipe.protected,
        layers=range(context.base.layers),
        separable=True,
        progress=progress,
    )


def passed_evidence(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "Evidence":
    """Find what those features fire on along which the filter of middle strength passes most and mutes most.

    Of the selected layers and the one that tells the texts apart best; their inputs are read by the SAEs of the layers
    before them. Without SAEs at `resid_post` nothing is shown.
    """
    from stethoscope.diagnosis.evidence import gather_evidence
    from stethoscope.diagnosis.peaks import Peaks
    from stethoscope.diagnosis.statistics import load_layers

    diagnosis, filtering, saes = results["diagnose"], results["filter"], context.found.saes
    read = {layer + 1 for layer, sae in saes.items() if sae.site == "resid_post"}
    apart = {n: one.separability or 0.0 for one in filtering.layers if (n := one.layer) is not None and n in read}
    layers = apart.keys() & {*results["select"].layers, *sorted(apart, key=apart.__getitem__)[-1:]}
    return gather_evidence(
        context.model,
        context.tokenizer,
        saes,
        context.found.texts,
        diagnosis,
        load_layers(context.folder / "peaks.safetensors", Peaks),
        passed=_extremes(context, filtering, sorted(layers)),
        max_tokens=context.recipe.diagnose.max_tokens,
        progress=progress,
        provenance=provenance,
    )


def _extremes(context: "Context", filtering: "Filtering", layers: list[int]) -> dict[int, dict[int, float]]:
    """By the layer of the SAE before each of the layers, features with their shares, from passed most to muted most."""
    import numpy as np

    from stethoscope.diagnosis.statistics import load_statistics
    from stethoscope.editing.filter import FilteredChange
    from stethoscope.editing.passage import passed_shares
    from stethoscope.saes.open import load_directions

    transform = FilteredChange(context.filters, filtering.middle, context.task_vector)
    statistics = load_statistics(context.folder / "statistics.safetensors").values()
    found: dict[int, dict[int, float]] = {}
    for layer in layers:
        rates = np.max([corpus.layers[layer - 1].rate for corpus in statistics], axis=0)
        fires = np.flatnonzero(rates >= RATE).tolist()
        directions, _ = load_directions(context.found.saes[layer - 1], fires)
        with suppress(CheckpointError):  # of a matrix of unknown role nobody knows whether it reads the features
            shares, lengths = passed_shares(context.model, context.task_vector, transform, layer, directions)
            judged = lengths.argsort(descending=True, stable=True)[: max(round(SHARE * len(fires)), 4 * MOST)].tolist()
            ranked = sorted((-float(shares[n]), fires[n]) for n in judged if lengths[n] > 0)
            few = min(MOST, len(ranked) // 2)
            found[layer - 1] = {feature: -share for share, feature in (*ranked[:few], *ranked[len(ranked) - few :])}
    return found


def recommendation(context: "Context", results: Results, provenance: Provenance, progress: Progress) -> "Calibration":
    """Find layers, coefficient and strength together, on calibration text or the documents that were held back."""
    from stethoscope.selection.calibrate import calibrate

    recipe, diagnosis = context.recipe, results["diagnose"]
    texts = {}
    for name, text in recipe.judged.items():
        held = context.held_back(text)
        without = {n for n in range(len(context.found.texts[text])) if held and n not in held}
        texts[name] = context.batches(text, without={*without, *broken(diagnosis, text)}, most=recipe.edit.tokens // 5)
    share = recipe.calibrate and recipe.calibrate.budget
    raw = (None,) if recipe.edit.filter == "auto" else ()
    return calibrate(
        context.model,
        context.layer_edits(),
        texts,
        dict.fromkeys(range(context.base.layers), 0.0) | {layer.layer: layer.z for layer in diagnosis.layers},
        seen={name: context.hashes[text] for name, text in recipe.judged.items()},
        provenance=provenance,
        coefficients=COEFFICIENTS,
        budget=share or recipe.edit.budget,
        in_nats=not share,
        keep=KEPT,
        strengths=(*sorted(strengths(recipe), reverse=True), *raw),
        others=[results["select"].amounts(recipe.edit.coefficient)] if raw else [],
        most_forwards=float(recipe.edit.forwards),
        executor=context.executor,
        progress=progress,
    )


def filtered_plans(context: "Context", results: Results, chosen: Mapping[int, float]) -> dict[str, "EditPlan"]:
    """The plans of the arms that are filtered, without ``recommended`` where no edit is.

    Args:
        chosen: the selected layers' coefficients.
    """
    from stethoscope.editing.filter import FilteredChange
    from stethoscope.editing.plan import EditPlan

    recipe, found = context.recipe, results["recommend"].edit
    strength = found.strength if found else None
    if strength is None:  # the best edit is raw, or none
        strength = STRENGTH if recipe.edit.filter == "auto" else strengths(recipe)[0]
    transform = FilteredChange(context.filters, strength, context.task_vector)
    every = dict.fromkeys(range(context.base.layers), recipe.edit.coefficient)
    plans = {
        "filtered": EditPlan.for_layers(every, transform=transform),
        "selected_filtered": EditPlan.for_layers(chosen, transform=transform),
    }
    if found:
        own = None if found.strength is None else transform
        plans["recommended"] = EditPlan.for_layers(found.coefficients, transform=own)
    return {arm: plan for arm, plan in plans.items() if arm in recipe.evaluated}


def broken(diagnosis: "Diagnosis", name: str) -> tuple[int, ...]:
    """Places of a text's documents that the model cannot process, as far as the diagnosis read it."""
    return tuple(diagnosis.corpora[name].broken) if name in diagnosis.corpora else ()
