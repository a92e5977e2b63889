"""Every arm's plan: made once, kept in the run folder, and read from there when the run goes on.

plans = plan_arms(recipe, task_vector, chosen, excess, directions, features=77)
save_plans(folder, plans, task_vector.energy_by_layer(), provenance=provenance)
plans = load_plans(folder, provenance)         # None where they were made from anything else
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.scalpel import scalpel_plans
from stethoscope.editing.subspace import FeatureProjection
from stethoscope.errors import CheckpointError
from stethoscope.recipe import SCALPEL_ARMS, Recipe
from stethoscope.results.edits import Edits, LayerEnergy
from stethoscope.selection.controls import CONTROL_ARMS, NoOthersError, control_plan, mean_coefficient, random_layers

BASES = "bases.safetensors"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan for every arm, None for the base, and what a reader should know of arms that there are not."""

    plans: dict[str, EditPlan | None]
    warnings: tuple[str, ...] = ()


def save_plans(folder: Path, planned: Planned, energy: Mapping[int, float], *, provenance: Provenance) -> Edits:
    """Write ``edits.json``, and each different basis once in ``bases.safetensors``, by its hash."""
    bases: dict[str, Tensor] = {}
    for plan in planned.plans.values():
        if plan and isinstance(plan.transform, FeatureProjection):
            bases |= plan.transform.tensors()
    (folder / BASES).unlink(missing_ok=True)
    if bases:
        save_file(bases, folder / BASES)
        (folder / BASES).chmod(0o644)  # safetensors lets nobody but the user read what it writes
    whole = sum(energy.values())
    made = Edits(
        provenance=provenance,
        plans={name: plan.to_json() if plan else None for name, plan in planned.plans.items()},
        warnings=planned.warnings,
        energy=tuple(LayerEnergy(layer=n, energy=e, share=e / whole if whole else 0.0) for n, e in energy.items()),
    )
    made.save(folder)  # last: what it names is there
    return made


def load_plans(folder: Path, provenance: Provenance) -> Planned | None:
    """The plans that `save_plans` wrote, if they were made from exactly these inputs and are whole; else None."""
    saved = Edits.load_if_current(folder, provenance)
    if saved is None:
        return None
    try:
        bases = load_file(folder / BASES) if (folder / BASES).exists() else {}
        plans = {name: _plan(described, bases) if described else None for name, described in saved.plans.items()}
    except (OSError, SafetensorError, KeyError, CheckpointError):
        return None  # what is damaged is made again
    return Planned(plans=plans, warnings=saved.warnings)


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
) -> Planned:
    """A plan for every arm of a recipe; those that make no sense beside this selection are left out, and it says so.

    Args:
        chosen: the selected layers' coefficients.
        excess: of the layers that may be chosen.
        directions: layer -> what loads its feature directions, most specific first.
        features: how many span the subspace of the arms that cut.
    """
    plans: dict[str, EditPlan | None] = {}
    warnings: list[str] = []

    def draw() -> None:
        drawn = random_layers(chosen, task_vector.base.layers, recipe.random_sets, seed=recipe.seed)
        for number, layers in enumerate(drawn, 1):
            plans[f"random_layers_{number}"] = EditPlan.for_layers(layers, coefficient=mean_coefficient(chosen))
        if len(drawn) < recipe.random_sets:
            warnings.append(
                f"`random_layers` has {len(drawn)} sets, not {recipe.random_sets}: there are no more of {len(chosen)}"
                f" of {task_vector.base.layers} layers"
            )

    wanted = [arm for arm in recipe.arms if arm in SCALPEL_ARMS]
    if "hybrid" in wanted and not set(directions) - set(chosen):
        wanted.remove("hybrid")
        warnings.append(
            "`hybrid` is left out: every layer that has an SAE is selected, so there are no others to filter"
        )
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
    for arm in recipe.arms:
        try:
            if arm == "base":
                plans[arm] = None
            elif arm == "tuned":
                plans[arm] = EditPlan.everything()
            elif arm == "selected":
                plans[arm] = EditPlan.for_layers(chosen)
            elif arm == "random_layers":
                draw()
            elif arm in CONTROL_ARMS:
                energy = task_vector.energy_by_layer()
                plans[arm] = control_plan(arm, chosen, energy=energy, excess=excess, seed=recipe.seed)
            elif arm in cut:
                plans[arm] = cut[arm]
        except NoOthersError as error:
            warnings.append(f"`{arm}` is left out: {error.message}")
    return Planned(plans=plans, warnings=tuple(warnings))
