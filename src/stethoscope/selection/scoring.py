"""Every score of a layer that this package knows, on the same text: those that listen and those that need no SAE."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from sae_lens import SAE
from transformers import PreTrainedModel

from stethoscope.diagnosis.attribution import attribute, attribution_scores
from stethoscope.diagnosis.scores import SCORES
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.diagnosis.uncertainty import assess
from stethoscope.editing.layers import LayerEdits
from stethoscope.results.validation import Kind
from stethoscope.selection.gradient import gradient
from stethoscope.selection.rivals import Texts, local_effect
from stethoscope.selection.shifts import residual_shift, tuned_shift

Scores = dict[str, tuple[Kind, dict[int, float]]]
PERMUTATIONS = 50  # enough for a null's mean
FEATURES = 64


def text_scores(statistics: Mapping[str, FeatureStatistics], *, control: str = "control", seed: int = 0) -> Scores:
    """The scores that need text alone, as excess over chance: of each layer, and what it adds to the one before."""
    found: Scores = {}
    for name, score in SCORES.items():
        for suffix, increments in (("", False), (" increment", True)):
            judged = assess(
                statistics["target"],
                statistics[control],
                score,
                increments=increments,
                permutations=PERMUTATIONS,
                resamples=2,
                rng=np.random.default_rng(seed),
            )
            found[name + suffix] = ("sae", dict(zip(judged.layers, judged.excess.tolist(), strict=True)))
    return found


def edit_scores(
    model: PreTrainedModel,
    edits: LayerEdits,
    saes: Mapping[int, SAE],
    statistics: Mapping[str, FeatureStatistics],
    texts: Texts,
    *,
    control: str = "control",
    site: str = "resid_post",
    tap: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """The scores that look at the fine-tune too, through SAEs and without them.

    Args:
        saes: by layer, reading ``site``.
        statistics: feature statistics of target and control, of which the target-specific features are taken.
        texts: ``target`` and the control, as batches.
        progress: called with scores done and in all.
    """
    layers, task_vector = sorted(saes), edits.task_vector
    both = {"target": texts["target"], control: texts[control]}

    def by_layer(values: Float64[ndarray, " depth"]) -> dict[int, float]:
        return {layer: float(values[layer]) for layer in layers}

    def attribution() -> Scores:
        found = {name: attribute(model, edits, saes, text, site=site, tap=tap) for name, text in both.items()}
        by_layer = attribution_scores(found["target"], found[control])
        return {
            "attribution": ("sae", {layer: by_layer[layer].score for layer in layers}),
            "attribution net": ("sae", {layer: by_layer[layer].explained for layer in layers}),
        }

    def shift_of_features() -> Scores:
        features = {layer: _specific(statistics["target"], statistics[control], layer) for layer in layers}
        moved = tuned_shift(model, task_vector, saes, features, both["target"], site=site, tap=tap)
        return {"tuned_shift": ("sae", dict(zip(moved.layers, moved.mean().tolist(), strict=True)))}

    steps: tuple[Callable[[], Scores], ...] = (
        attribution,
        shift_of_features,
        lambda: {"norm": ("rival", {n: e for n, e in task_vector.energy_by_layer().items() if n in layers})},
        lambda: {
            "residual_shift": (
                "rival",
                by_layer(residual_shift(model, task_vector, {"target": both["target"]})["target"]),
            )
        },
        lambda: {"gradient": ("rival", by_layer(gradient(model, task_vector, both).gains.score(control)))},
        lambda: {"local_effect": ("rival", by_layer(local_effect(model, edits, both).score(control)))},
    )
    found: Scores = {}
    for done, step in enumerate(steps, 1):
        found |= step()
        if progress:
            progress(done, len(steps))
    return found


def _specific(target: FeatureStatistics, control: FeatureStatistics, layer: int) -> dict[int, float]:
    """The features whose share of mass is largest on target against control, weighed by that difference."""
    ours, theirs = target.layers[layer], control.layers[layer]
    difference = ours.mass - theirs.mass
    return {int(i): float(difference[i]) for i in ours.toward(theirs)[:FEATURES] if difference[i] > 0}
