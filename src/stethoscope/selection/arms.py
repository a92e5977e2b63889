"""Every arm's plan: made once, kept in the run folder, and read from there when the run goes on.

plans = plan_arms(recipe, task_vector, chosen, excess, directions, features=77)
save_plans(folder, plans, task_vector.energy_by_layer(), provenance=provenance)
plans = load_plans(folder, provenance)         # None where they were made from anything else
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb, sqrt
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stethoscope.artifacts import Provenance, new_file
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.filter import FilteredChange
from stethoscope.editing.plan import EditPlan, Transform
from stethoscope.editing.scalpel import scalpel_plans
from stethoscope.editing.subspace import FeatureProjection
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import SCALPEL_ARMS, Recipe
from stethoscope.results.edits import Edits, LayerEnergy
from stethoscope.selection.validate import matched_sets

BASES, FILTERS = "bases.safetensors", "filter"  # a file and a folder
ControlArm = Literal["scaled", "norm_ranked", "bottom_layers", "random_matched"]
CONTROL_ARMS: tuple[ControlArm, ...] = get_args(ControlArm)


class NoOthersError(StethoscopeError):
    """There is no such arm beside this selection: it would be the selected edit, or there are no layers for it."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan for every arm, None for the base, and why arms are left out."""

    plans: dict[str, EditPlan | None]
    warnings: tuple[str, ...] = ()


def plan_arms(
    recipe: Recipe,
    task_vector: TaskVector,
    chosen: Mapping[int, float],
    excess: Mapping[int, float],
    directions: Mapping[int, Callable[[], Float[Tensor, "features d"]]],
    *,
    features: int,
) -> Planned:
    """A plan for every arm of a recipe but the filtered; what makes no sense beside the selection is left out and said.

    Args:
        chosen: the selected layers' coefficients.
        excess: of the layers that may be chosen.
        directions: layer -> what loads its feature directions, most specific first.
        features: how many span the subspace of the arms that cut.
    """
    plans: dict[str, EditPlan | None] = {}
    warnings: list[str] = []
    wanted = [arm for arm in recipe.arms if arm in SCALPEL_ARMS]
    if "hybrid" in wanted and not set(directions) - set(chosen):
        wanted.remove("hybrid")
        warnings.append(
            "`hybrid` is left out: every layer that has an SAE is selected, so there are no others to filter"
        )
    plain = {"base": None, "tuned": EditPlan.everything(), "selected": EditPlan.for_layers(chosen)}
    cut = scalpel_plans(
        wanted,
        task_vector,
        chosen,
        lambda layer: directions[layer](),
        features=features,
        layers=directions,
        share=recipe.project.share,
        seed=recipe.seed,
    )
    depth, mean = task_vector.base.layers, mean_coefficient(chosen)
    for arm in recipe.evaluated:
        try:
            if arm in plain:
                plans[arm] = plain[arm]
            elif arm in cut:
                plans[arm] = cut[arm]
            elif arm in CONTROL_ARMS:
                energy = task_vector.energy_by_layer()
                plans[arm] = control_plan(arm, chosen, energy=energy, excess=excess, seed=recipe.seed)
            elif arm == "random_layers":
                drawn = random_layers(chosen, depth, recipe.random_sets, seed=recipe.seed)
                for number, layers in enumerate(drawn, 1):
                    plans[f"random_layers_{number}"] = EditPlan.for_layers(layers, coefficient=mean)
                if len(drawn) < recipe.random_sets:
                    warnings.append(
                        f"`random_layers` has {len(drawn)} sets, not {recipe.random_sets}: there are no more of"
                        f" {len(chosen)} of {depth} layers"
                    )
        except NoOthersError as error:
            warnings.append(f"`{arm}` is left out: {error.message}")
    return Planned(plans=plans, warnings=tuple(warnings))


def control_plan(
    arm: ControlArm,
    chosen: Mapping[int, float],
    *,
    energy: Mapping[int, float],
    excess: Mapping[int, float],
    seed: int = 0,
) -> EditPlan:
    """An edit that the selected one has to beat: as much change put elsewhere, or everywhere.

    Args:
        arm: ``scaled``, every layer, at the one coefficient that gives the selected edit's total energy;
            ``norm_ranked``, as many layers, those of most energy; ``bottom_layers``, those that stand out least;
            ``random_matched``, as many, drawn among the sets of about the selection's energy. The last three are put
            in at the selected layers' mean coefficient.
        chosen: the selected layers' coefficients.
        energy: of every layer's task vector, its squared Frobenius norm.
        excess: of the layers that may be chosen.

    Raises:
        NoOthersError: it would be the selected edit, which may change nothing, or there is no other set of layers.
    """
    size, mean = len(chosen), mean_coefficient(chosen)
    if arm == "scaled":
        selected = sum(coefficient**2 * energy[layer] for layer, coefficient in chosen.items())
        if not selected:
            raise NoOthersError("the selected edit changes nothing, so nothing has its energy")
        if {layer for layer, value in energy.items() if value} <= set(chosen) and len(set(chosen.values())) == 1:
            raise NoOthersError("every layer is selected, so it would be the selected edit itself")
        return EditPlan.for_layers(list(energy), coefficient=sqrt(selected / sum(energy.values())))
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


def save_plans(folder: Path, planned: Planned, energy: Mapping[int, float], *, provenance: Provenance) -> Edits:
    """Write ``edits.json``, and each different basis once in ``bases.safetensors``, by its hash."""
    bases: dict[str, Tensor] = {}
    for plan in planned.plans.values():
        if plan and isinstance(plan.transform, FeatureProjection):
            bases |= plan.transform.tensors()
    (folder / BASES).unlink(missing_ok=True)
    if bases:
        with new_file(folder / BASES) as temporary:
            save_file(bases, temporary)
    whole = sum(energy.values())
    made = Edits(
        provenance=provenance,
        plans={name: plan.to_json() if plan else None for name, plan in planned.plans.items()},
        warnings=planned.warnings,
        energy=tuple(LayerEnergy(layer=n, energy=e, share=e / whole if whole else 0.0) for n, e in energy.items()),
    )
    made.save(folder)  # last: the file that it names exists
    return made


def load_plans(folder: Path, provenance: Provenance, task_vector: TaskVector) -> Planned | None:
    """The plans that `save_plans` wrote, if they were made from exactly these inputs and are whole; else None."""
    saved = Edits.load_if_current(folder, provenance)
    if saved is None:
        return None
    plans: dict[str, EditPlan | None] = {}
    try:
        bases = load_file(folder / BASES) if (folder / BASES).exists() else {}
        for name, described in saved.plans.items():
            cut = described and described["transform"]
            transform: Transform | None = None
            if cut and cut["kind"] == "filter":
                transform = FilteredChange((folder / FILTERS).absolute(), cut["strength"], task_vector)
            elif cut:
                transform = FeatureProjection.from_description(cut, bases)  # hashes its bases again
            plans[name] = EditPlan.from_json(described, transform=transform) if described else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, StethoscopeError):
        return None  # what is damaged is made again
    return Planned(plans=plans, warnings=saved.warnings)
