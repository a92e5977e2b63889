"""Edits that a selection of layers has to beat: as much change put elsewhere, or everywhere.

plan = control_plan("scaled", chosen, energy=task_vector.energy_by_layer(), excess=excess, seed=0)
"""

from collections.abc import Mapping
from math import comb, sqrt
from typing import Literal, get_args

import numpy as np

from stethoscope.editing.plan import EditPlan
from stethoscope.errors import StethoscopeError
from stethoscope.selection.validate import matched_sets


class NoOthersError(StethoscopeError):
    """There is no such arm beside this selection: it would be the selected edit, or there are no layers for it."""


ControlArm = Literal["scaled", "norm_ranked", "bottom_layers", "random_matched"]
CONTROL_ARMS: tuple[ControlArm, ...] = get_args(ControlArm)


def control_plan(
    arm: ControlArm,
    chosen: Mapping[int, float],
    *,
    energy: Mapping[int, float],
    excess: Mapping[int, float],
    seed: int = 0,
) -> EditPlan:
    """A control's plan.

    Args:
        arm: ``scaled``, every layer, at the one coefficient that gives the selected edit's total energy;
            ``norm_ranked``, as many layers, those of most energy; ``bottom_layers``, those that stand out least;
            ``random_matched``, as many, drawn among the sets of about the selection's energy. The last three are put
            in at the selected layers' mean coefficient.
        chosen: the selected layers' coefficients.
        energy: of every layer's task vector, its squared Frobenius norm.
        excess: of the layers that may be chosen.

    Raises:
        NoOthersError: it would be the selected edit, or there is no other set of layers.
        StethoscopeError: the task vector is zero.
    """
    size, mean = len(chosen), mean_coefficient(chosen)
    if arm == "scaled":
        whole = sum(energy.values())
        if not whole:
            raise StethoscopeError("the task vector changes no layer: no coefficient gives it an edit's energy")
        if {layer for layer, value in energy.items() if value} <= set(chosen) and len(set(chosen.values())) == 1:
            raise NoOthersError("every layer is selected, so it would be the selected edit itself")
        selected = sum(coefficient**2 * energy[layer] for layer, coefficient in chosen.items())
        return EditPlan.for_layers(list(energy), coefficient=sqrt(selected / whole))
    if arm == "random_matched":
        found = matched_sets(tuple(sorted(chosen)), energy, 1, np.random.default_rng(seed))
        if not found:
            raise NoOthersError(f"there is no other set of {size} layers")
        return EditPlan.for_layers(found[0], coefficient=mean)
    rank = {layer: -value for layer, value in energy.items()} if arm == "norm_ranked" else excess
    if size >= len(rank):
        raise NoOthersError(f"there are no other {size} layers to take")
    layers = sorted(rank, key=lambda layer: (rank[layer], layer))[:size]
    return EditPlan.for_layers(sorted(layers), coefficient=mean)


def mean_coefficient(chosen: Mapping[int, float]) -> float:
    """The selected layers' mean coefficient, to the bit where they have but one."""
    values = list(chosen.values())
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)


def random_layers(chosen: Mapping[int, float], depth: int, count: int, *, seed: int) -> list[list[int]]:
    """Random sets of as many layers as are chosen, different from these and from each other; at most all there are.

    Raises:
        NoOthersError: there is none.
    """
    size, own = len(chosen), tuple(sorted(chosen))
    if not (others := comb(depth, size) - 1):
        raise NoOthersError("every layer is selected, so there are no others to draw")
    rng = np.random.default_rng(seed)
    seen = {own}
    while len(seen) <= min(count, others):
        seen.add(tuple(sorted(int(n) for n in rng.choice(depth, size, replace=False))))
    return [list(layers) for layers in sorted(seen - {own})]
