"""Edits that a selection of layers has to beat: as much change put elsewhere, or everywhere.

plan = control_plan("scaled", chosen, energy=task_vector.energy_by_layer(), excess=excess, seed=0)
"""

from collections.abc import Mapping
from math import sqrt
from typing import Literal, get_args

import numpy as np

from stethoscope.editing.plan import EditPlan
from stethoscope.errors import StethoscopeError
from stethoscope.selection.hearing import matched_sets

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
        StethoscopeError: the task vector is zero, or there is no other set of layers of about that energy.
    """
    size, mean = len(chosen), sum(chosen.values()) / len(chosen)
    if arm == "scaled":
        whole = sum(energy.values())
        if not whole:
            raise StethoscopeError("the task vector changes no layer: no coefficient gives it an edit's energy")
        selected = sum(coefficient**2 * energy[layer] for layer, coefficient in chosen.items())
        return EditPlan.for_layers(list(energy), coefficient=sqrt(selected / whole))
    if arm == "random_matched":
        found = matched_sets(tuple(sorted(chosen)), energy, 1, np.random.default_rng(seed))
        if not found:
            raise StethoscopeError(
                f"no other {size} layers have about the energy of the selected ones",
                hint="leave out the arm `random_matched`, or select another number of layers",
            )
        return EditPlan.for_layers(found[0], coefficient=mean)
    rank = {layer: -value for layer, value in energy.items()} if arm == "norm_ranked" else excess
    layers = sorted(rank, key=lambda layer: (rank[layer], layer))[:size]
    return EditPlan.for_layers(sorted(layers), coefficient=mean)
