"""How many layers and how much of the change, found on calibration text: target loss gained per control loss paid.

    found = calibrate(model, edits, texts, z, seen=hashes, provenance=provenance, budget=0.01)
    EditPlan.for_layers(found.coefficients)

Sets are nested: the layers whose score's z, relative to its null, reaches a threshold. So a threshold means the same
in a model of any size. Sets and coefficients are searched from coarse to fine, in memory, on the loss itself.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.executor import Executor
from stethoscope.models.load import decoder_layers
from stethoscope.results.calibration import Calibration, CalibrationPoint
from stethoscope.selection.rivals import Progress, Texts
from stethoscope.selection.search import Key, Search, search_layers, search_nested

COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_FORWARDS = 60.0


def calibrate(
    model: PreTrainedModel,
    edits: LayerEdits,
    texts: Texts,
    z: Mapping[int, float],
    *,
    seen: Mapping[str, str],
    provenance: Provenance,
    coefficients: Sequence[float] = COEFFICIENTS,
    budget: float | None = None,
    per_layer: bool = False,
    most_forwards: float = MOST_FORWARDS,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find the threshold and the coefficient.

    The choice follows the one-standard-error rule: of the edits within the budget, the one with the fewest layers, then
    the least control cost, whose worth is within one standard error (paired over documents) of the best's. The base
    itself is among them, so an edit that gains nothing certain is not made.

    Args:
        texts: ``target`` and ``control`` calibration text.
        z: per layer that may be chosen, its score in standard deviations of its null; ties go to the lower layer.
        seen: corpus -> `documents_hash` of its documents.
        coefficients: those tried.
        budget: the share by which control loss may rise, with a standard error to spare (0.01: 1 % worse). The best is
            then the largest gain within it; without one it is the largest gain less cost.
        per_layer: go on from the choice by coordinate search, one layer's coefficient at a time.
        most_forwards: of the whole text; see `stethoscope.selection.rivals.forwards`.
        executor: runs the work; here if None.
        progress: called with forwards spent and ``most_forwards``, both rounded.

    Raises:
        StethoscopeError: a corpus is missing or has one document, or layers, coefficients or budget make no sense.
    """
    depth = len(decoder_layers(model))
    _check(texts, z, seen, coefficients, budget, depth)
    if most_forwards < 2:
        raise StethoscopeError(f"`{most_forwards}` forwards are too few to try any edit", hint="allow 60")
    order = sorted(z, key=lambda layer: (-z[layer], layer))
    search = Search(
        model, edits, texts, depth=depth, budget=budget, most=most_forwards, executor=executor, progress=progress
    )
    grid = sorted(set(coefficients))
    search_nested(search, order, grid)
    choice = search.choice()
    if per_layer:
        choice = search_layers(search, choice, grid)
    return _freeze(search, choice, z=z, seen=seen, provenance=provenance, moved=per_layer)


def _freeze(
    search: Search,
    choice: Key,
    *,
    z: Mapping[int, float],
    seen: Mapping[str, str],
    provenance: Provenance,
    moved: bool,
) -> Calibration:
    keys = sorted(search.gains, key=lambda key: (len(key), key))
    plane = np.array([[search.mean(key, "target"), -search.mean(key, "control")] for key in keys])
    points = tuple(
        CalibrationPoint(
            coefficients=dict(key),
            threshold=min((float(z[layer]) for layer, _ in key), default=None),
            target_gain=gain,
            target_error=search.error(key, "target"),
            control_cost=cost,
            control_error=search.error(key, "control"),
            control_increase=cost / search.base["control"],
            on_front=not (
                (plane[:, 0] >= gain) & (plane[:, 1] <= cost) & ((plane[:, 0] > gain) | (plane[:, 1] < cost))
            ).any(),
        )
        for key, (gain, cost) in zip(keys, plane.tolist(), strict=True)
    )
    if search.budget is None:
        rule = "largest target gain less control cost"
    else:
        rule = f"largest target gain with control loss at most {100 * search.budget:g} % worse"
    rule += ", then the fewest layers and least cost within one standard error"
    if moved:
        rule += ", then one layer's coefficient at a time while that gains more than a standard error"
    return Calibration(
        provenance=provenance,
        z={layer: float(value) for layer, value in sorted(z.items())},
        budget=search.budget,
        base_loss=search.base,
        points=points,
        best=keys.index(search.best()),
        choice=keys.index(choice),
        rule=rule,
        reason=_reason(points[keys.index(choice)], points[keys.index(search.best())]),
        forwards=search.spent,
        seen=dict(seen),
    )


def _reason(choice: CalibrationPoint, best: CalibrationPoint) -> str:
    def said(point: CalibrationPoint) -> str:
        if not point.coefficients:
            return "no edit"
        amounts = sorted(set(point.coefficients.values()))
        amount = f"{amounts[0]:g}" if len(amounts) == 1 else f"{amounts[0]:g} to {amounts[-1]:g}"
        return f"{len(point.coefficients)} layers of z >= {point.threshold:.1f} at {amount}"

    figures = (
        f"target loss falls by {choice.target_gain:.4f} ± {choice.target_error:.4f} nats per token,"
        f" control loss rises by {choice.control_cost:.4f} ± {choice.control_error:.4f}"
        f" ({100 * choice.control_increase:+.2f} %)"
    )
    if choice == best:
        return f"{said(choice)} is the best found: {figures}"
    return (
        f"{said(choice)}: {figures}; not clearly worse than the best found, {said(best)} (gain {best.target_gain:.4f})"
    )


def _check(
    texts: Texts,
    z: Mapping[int, float],
    seen: Mapping[str, str],
    coefficients: Sequence[float],
    budget: float | None,
    depth: int,
) -> None:
    problems = []
    for name in ("target", "control"):
        if sum(len(batch.documents) for batch in texts.get(name, ())) < 2:
            problems.append(f"the {name} text has fewer than two documents")
        if name not in seen:
            problems.append(f"the {name} text has no hash")
    problems += [f"`{name}` is neither target nor control" for name in texts if name not in ("target", "control")]
    problems += [f"layer {layer} is not one of the model's {depth}" for layer in z if not 0 <= layer < depth]
    problems += [f"z of layer {layer} is {value}" for layer, value in z.items() if not math.isfinite(value)]
    problems += [f"the coefficient {c} is not a positive number" for c in coefficients if not 0 < c < math.inf]
    if not z or not coefficients:
        problems.append("there are no layers or no coefficients to choose from")
    if budget is not None and not 0 <= budget < math.inf:
        problems.append(f"the budget on control loss is {budget}, not a share such as 0.01")
    if problems:
        raise StethoscopeError("cannot calibrate", problems=problems, hint="calibration needs target and control text")
