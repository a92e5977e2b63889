"""Every arm's plan: made once, kept in the run folder, and read from there when the run goes on.

plans = plan_arms(recipe, task_vector, chosen, excess, directions, features=77)
save_plans(folder, plans, task_vector.energy_by_layer(), provenance=provenance)
plans = load_plans(folder, provenance)         # None where they were made from anything else
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stethoscope.artifacts import Artifact, Frozen, Provenance
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.projection import FeatureProjection
from stethoscope.editing.scalpel import scalpel_plans
from stethoscope.editing.sides import SCALPEL_ARMS
from stethoscope.errors import CheckpointError, RecipeError
from stethoscope.recipe import Recipe
from stethoscope.selection.controls import CONTROL_ARMS, control_plan

Plans = Mapping[str, EditPlan | None]
BASES = "bases.safetensors"


class LayerEnergy(Frozen):
    """One layer's task vector: squared Frobenius norm, and its share of the whole."""

    layer: int
    energy: float
    share: float


class Edits(Artifact):
    """The arms' plans and where the task vector's energy lies; the bases that plans cut along lie beside it."""

    FILE: ClassVar[str] = "edits.json"

    plans: dict[str, dict[str, Any] | None]
    energy: tuple[LayerEnergy, ...]


def save_plans(folder: Path, plans: Plans, energy: Mapping[int, float], *, provenance: Provenance) -> Edits:
    """Write ``edits.json``, and each different basis once in ``bases.safetensors``, by its hash."""
    bases: dict[str, Tensor] = {}
    for plan in plans.values():
        if plan and isinstance(plan.transform, FeatureProjection):
            bases |= plan.transform.tensors()
    (folder / BASES).unlink(missing_ok=True)
    if bases:
        save_file(bases, folder / BASES)
        (folder / BASES).chmod(0o644)  # safetensors lets nobody but the user read what it writes
    whole = sum(energy.values())
    made = Edits(
        provenance=provenance,
        plans={name: plan.to_json() if plan else None for name, plan in plans.items()},
        energy=tuple(LayerEnergy(layer=n, energy=e, share=e / whole if whole else 0.0) for n, e in energy.items()),
    )
    made.save(folder)  # last: what it names is there
    return made


def load_plans(folder: Path, provenance: Provenance) -> dict[str, EditPlan | None] | None:
    """The plans that `save_plans` wrote, if they were made from exactly these inputs and are whole; else None."""
    saved = Edits.load_if_current(folder, provenance)
    if saved is None:
        return None
    try:
        bases = load_file(folder / BASES) if (folder / BASES).exists() else {}
        return {name: _plan(described, bases) if described else None for name, described in saved.plans.items()}
    except (OSError, SafetensorError, KeyError, CheckpointError):
        return None  # what is damaged is made again


def _plan(described: Mapping[str, Any], bases: Mapping[str, Tensor]) -> EditPlan:
    """A plan as it was; its bases are hashed again."""
    cut = described["transform"]
    return EditPlan.from_json(described, transform=FeatureProjection.from_description(cut, bases) if cut else None)


def plan_arms(
    recipe: Recipe,
    task_vector: TaskVector,
    chosen: Mapping[int, float],
    excess: Mapping[int, float],
    directions: Mapping[int, Callable[[], Float[Tensor, "features d"]]],
    *,
    features: int,
) -> dict[str, EditPlan | None]:
    """A plan for every arm of a recipe; None leaves the base as it is.

    Args:
        chosen: the selected layers' coefficients.
        excess: of the layers that may be chosen.
        directions: layer -> what loads its feature directions, most specific first.
        features: how many span the subspace of the arms that cut.
    """
    cut = scalpel_plans(
        [arm for arm in recipe.arms if arm in SCALPEL_ARMS],
        task_vector,
        chosen,
        lambda layer: directions[layer](),
        features=features,
        layers=directions,
        share=recipe.project.share,
        seed=recipe.seed,
    )
    coefficient = sum(chosen.values()) / len(chosen)
    plans: dict[str, EditPlan | None] = {}
    for arm in recipe.arms:
        if arm == "base":
            plans[arm] = None
        elif arm == "tuned":
            plans[arm] = EditPlan.everything()
        elif arm == "selected":
            plans[arm] = EditPlan.for_layers(chosen)
        elif arm == "random_layers":
            drawn = random_layers(chosen, task_vector.base.layers, recipe.random_sets, seed=recipe.seed)
            for number, layers in enumerate(drawn, 1):
                plans[f"random_layers_{number}"] = EditPlan.for_layers(layers, coefficient=coefficient)
        elif arm in CONTROL_ARMS:
            energy = task_vector.energy_by_layer()
            plans[arm] = control_plan(arm, chosen, energy=energy, excess=excess, seed=recipe.seed)
        elif arm in SCALPEL_ARMS:
            plans[arm] = cut[arm]
    return plans


def random_layers(chosen: Mapping[int, float], depth: int, count: int, *, seed: int) -> list[list[int]]:
    """Sets of as many layers as are chosen, all different from these and from each other."""
    rng = np.random.default_rng(seed)
    size, own = len(chosen), tuple(sorted(chosen))
    seen = {own}
    for _ in range(1000):
        seen.add(tuple(sorted(int(n) for n in rng.choice(depth, size, replace=False))))
        if len(seen) > count:
            break
    else:
        raise RecipeError(
            f"there are no {count} other sets of {size} of {depth} layers",
            hint="choose a smaller `random_sets` or another `k`",
        )
    return [list(layers) for layers in sorted(seen - {own})]
