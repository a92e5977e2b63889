"""Which layers: a policy turns a diagnosis into a selection that says why each layer is in or out."""

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise

import numpy as np

from stethoscope.artifacts import Provenance
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import Select
from stethoscope.results.calibration import Calibration
from stethoscope.results.diagnosis import ALPHA, Diagnosis, LayerDiagnosis
from stethoscope.results.selection import LayerChoice, Selection

STEADY = 0.5  # of the resamples: a chosen layer that holds its rank in fewer is warned of

Ranked = Sequence[LayerDiagnosis]
Policy = Callable[[Ranked, Select], Ranked]


def top_k(ranked: Ranked, options: Select) -> Ranked:
    """The k layers of largest excess."""
    return ranked[: _enough(ranked, options)]


def spread(ranked: Ranked, options: Select) -> Ranked:
    """The layer of largest excess in each of k depth segments: the gains of neighbours repeat."""
    best = set(_ahead(ranked, options).values())
    return [layer for layer in ranked if layer.layer in best]


def depth_segments(layers: Collection[int], k: int) -> list[list[int]]:
    """Layers in order of depth, cut into k runs as equal as can be."""
    return [run.tolist() for run in np.array_split(sorted(layers), k)]


def _ahead(ranked: Ranked, options: Select) -> dict[int, int]:
    """For each layer the best of its depth segment."""
    places = {layer.layer: place for place, layer in enumerate(ranked)}
    runs = depth_segments(places, _enough(ranked, options))
    return {layer: min(run, key=places.__getitem__) for run in runs for layer in run}


def _enough(ranked: Ranked, options: Select) -> int:
    assert options.k is not None
    if len(ranked) < options.k:
        raise StethoscopeError(f"cannot choose {options.k} layers: only {len(ranked)} are not excluded")
    return options.k


def threshold(ranked: Ranked, options: Select) -> Ranked:
    """Every layer whose excess is at least ``z`` standard deviations of its null: a scale that no model changes."""
    return [layer for layer in ranked if layer.z >= options.z]


def significant(ranked: Ranked, options: Select) -> Ranked:
    """Every layer whose excess is significant at ``alpha``, adjusted for the number of layers."""
    return [layer for layer in ranked if layer.p_familywise <= options.alpha]


def budget(ranked: Ranked, options: Select) -> Ranked:
    """The smallest set that holds a ``share`` of all positive excess."""
    excess = [max(0.0, layer.excess) for layer in ranked]
    # rounding must not ask for one layer more than a share that is met exactly
    wanted = options.share * sum(excess) * (1 - 1e-12)
    count = next((i for i, held in enumerate(accumulate(excess), 1) if held >= wanted), len(ranked))
    return ranked[: count if sum(excess) > 0 else 0]


def gap(ranked: Ranked, options: Select) -> Ranked:
    """The layers above the largest drop of excess from one rank to the next."""
    drops = [one.excess - other.excess for one, other in pairwise(ranked)]
    return ranked[: drops.index(max(drops)) + 1] if drops else ranked


POLICIES: dict[str, Policy] = {
    "top_k": top_k, "spread": spread, "threshold": threshold, "significant": significant, "budget": budget, "gap": gap,
}  # fmt: skip


def select(diagnosis: Diagnosis, options: Select, *, provenance: Provenance | None = None) -> Selection:
    """Apply a policy to the layers that are not excluded and explain every layer's fate; ties go to the lower layer.

    Args:
        provenance: what the result is saved with.

    Raises:
        StethoscopeError: the policy cannot be satisfied, or it chooses no layer.
    """
    if options.policy not in POLICIES:
        raise StethoscopeError(f"the policy `{options.policy}` takes a calibration", hint="`select_calibrated` chooses")
    able = [layer for layer in diagnosis.layers if options.include_flagged or layer.flag is None]
    ranked = sorted(able, key=lambda layer: (-layer.excess, layer.layer))
    flags = [f"layer {layer.layer}: {layer.flag}" for layer in diagnosis.layers if layer.flag]
    try:
        chosen = {layer.layer for layer in POLICIES[options.policy](ranked, options)}
    except StethoscopeError as error:
        raise StethoscopeError(
            error.message, problems=flags, hint="choose a smaller `k`, better SAEs, or set `include_flagged: true`"
        ) from error
    if not chosen:
        best = ranked[0] if ranked else None
        shown = f"the best, layer {best.layer}, has {_figures(best)}" if best else "every layer is excluded"
        raise StethoscopeError(
            f"the policy `{options.policy}` chooses no layer: {shown}",
            problems=flags,
            hint="no evidence of a layer specific to the target is a result, too; `top_k` chooses all the same",
        )
    places = {layer.layer: place for place, layer in enumerate(ranked, 1)}
    ahead = _ahead(ranked, options) if options.policy == "spread" else {}
    warnings = []
    if not (specific := beyond_chance(diagnosis, chosen)):
        warnings.append(f"no chosen layer stands out from chance by `{diagnosis.score}`: others may do as well")
    # a layer that is chosen for its depth segment may lose its rank among all
    if (shaky := unsteady(diagnosis, chosen)) and not ahead:
        warnings.append(
            f"fewer than half of the resamples leave these layers their rank: {', '.join(map(str, shaky))}; other"
            " documents of the same kind may choose others, and more of them would settle it"
        )
    return Selection(
        provenance=provenance or Provenance(),
        policy=options.policy,
        layers=tuple(sorted(chosen)),
        specific=specific,
        warnings=tuple(warnings),
        choices=tuple(_choice(layer, layer.layer in chosen, places, ahead) for layer in diagnosis.layers),
    )


def unsteady(diagnosis: Diagnosis, layers: Collection[int]) -> list[int]:
    """Those of some layers that hold their rank in fewer than half of the resamples."""
    return [layer.layer for layer in diagnosis.layers if layer.layer in layers and layer.stability < STEADY]


def beyond_chance(diagnosis: Diagnosis, layers: Collection[int]) -> int:
    """How many of some layers stand out from chance."""
    return sum(layer.layer in layers and layer.p_familywise <= ALPHA for layer in diagnosis.layers)


def select_calibrated(diagnosis: Diagnosis, calibration: Calibration, *, provenance: Provenance) -> Selection:
    """The layers and coefficients that a calibration chose.

    Raises:
        StethoscopeError: no edit gains more than it costs.
    """
    chosen = calibration.coefficients
    if not chosen:
        raise StethoscopeError(f"calibration chooses no edit: {calibration.reason}", hint=calibration.rule)

    def choice(layer: LayerDiagnosis) -> LayerChoice:
        if layer.layer in chosen:
            reason = f"chosen: z {layer.z:.1f}, coefficient {chosen[layer.layer]:g} by calibration"
        else:
            reason = f"left out: {layer.flag or f'z {layer.z:.1f}, gains less than it costs in calibration'}"
        return LayerChoice(layer=layer.layer, chosen=layer.layer in chosen, reason=reason)

    return Selection(
        provenance=provenance,
        policy="calibrated",
        layers=tuple(sorted(chosen)),
        coefficients=chosen,
        specific=beyond_chance(diagnosis, chosen),
        choices=tuple(choice(layer) for layer in diagnosis.layers),
    )


def _choice(layer: LayerDiagnosis, chosen: bool, places: dict[int, int], ahead: dict[int, int]) -> LayerChoice:
    if layer.layer not in places:
        reason = f"left out: {layer.flag}"
    elif chosen:
        stability = f"rank {layer.rank} or better in {100 * layer.stability:.0f} % of resamples"
        reason = f"chosen: {_figures(layer)}, {'the best of its depth segment' if ahead else stability}"
    else:
        behind = f", behind layer {ahead[layer.layer]} of its depth segment" if layer.layer in ahead else ""
        reason = f"left out: {_figures(layer)}, rank {places[layer.layer]} of {len(places)}{behind}"
    return LayerChoice(layer=layer.layer, chosen=chosen, reason=reason)


def _figures(layer: LayerDiagnosis) -> str:
    return f"excess {layer.excess:.3f}, z {layer.z:.1f}, p {layer.p_familywise:.3f}"
