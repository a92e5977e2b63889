"""Plans of the arms that project a task vector onto feature directions.

    plans = scalpel_plans(["projected", "complement"], task_vector, {12: 1.0}, directions, features=77)

Compared with the raw edit they show whether a projected edit is weak because it is small (`projected_energy_matched`),
because its directions are wrong (`random_subspace`), or because the part that works was removed (`complement`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.change import energy_along
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.residual_axis import residual_axes
from stethoscope.editing.subspace import FeatureProjection, nested_basis, random_basis
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import ScalpelArm


def scalpel_plans(
    arms: Collection[ScalpelArm],
    task_vector: TaskVector,
    coefficients: Mapping[int, float],
    directions: Callable[[int], Float[Tensor, "features d"]],
    *,
    features: int,
    layers: Iterable[int] = (),
    share: float = 0.5,
    seed: int = 0,
) -> dict[ScalpelArm, EditPlan]:
    """The plan of each arm that projects.

    Args:
        arms: ``projected`` onto the first features; ``projected_energy_matched``, that at the raw edit's norm per
            layer; ``complement``, what ``projected`` throws away; ``random_subspace`` of equal rank, and that at the
            raw edit's norm; ``fewest_features``, the fewest features that keep ``share`` of each layer's energy;
            ``hybrid``, raw in the selected layers and ``fewest_features`` in the others, at the selected ones' mean
            coefficient.
        coefficients: of the selected layers.
        directions: a layer's feature directions, most specific first; asked for once per layer.
        features: how many span the subspace.
        layers: those that have features; only ``hybrid`` uses them.
        share: of each layer's energy, for ``fewest_features`` and ``hybrid``.
        seed: of the random subspaces.

    Raises:
        CheckpointError: with every matrix whose role is not known or does not fit.
        StethoscopeError: a layer's projected change is zero, so that no factor gives it the raw norm.
    """
    others = [layer for layer in layers if layer not in coefficients] if "hybrid" in arms else []
    first: dict[int, Tensor] = {}
    fewest: dict[int, Tensor] = {}
    for layer in sorted({*coefficients, *others} if set(arms) - {"hybrid"} else others):
        rows = directions(layer)
        if layer in coefficients and set(arms) - {"hybrid", "fewest_features"}:
            first[layer] = nested_basis(rows[:features])[0]
        if layer in others or "fewest_features" in arms:
            fewest[layer] = _smallest_basis(task_vector, layer, rows, share)
    if first:
        residual_axes(task_vector, first, len(next(iter(first.values()))))
    mean = sum(coefficients.values()) / len(coefficients)
    plans: dict[ScalpelArm, EditPlan] = {}
    for arm in arms:
        if arm == "hybrid":
            transform = FeatureProjection(bases={layer: fewest[layer] for layer in others}, raw=frozenset(coefficients))
            plans[arm] = EditPlan.for_layers({**dict.fromkeys(others, mean), **coefficients}, transform=transform)
            continue
        bases = {layer: (fewest if arm == "fewest_features" else first)[layer] for layer in coefficients}
        if arm.startswith("random_subspace"):
            generator = torch.Generator().manual_seed(seed)
            bases = {layer: random_basis(len(Q), Q.shape[1], generator) for layer, Q in sorted(bases.items())}
        transform = FeatureProjection(bases=bases, complement=arm == "complement")
        if arm.endswith("_energy_matched"):
            transform = _energy_matched(task_vector, transform)
        plans[arm] = EditPlan.for_layers(coefficients, transform=transform)
    return plans


def _energies(task_vector: TaskVector, layer: int, Q: Tensor) -> Iterator[tuple[float, Tensor | None]]:
    """The energy of each tensor's change, and of its component along each column of Q; None for norms and biases."""
    for name, axis in residual_axes(task_vector, [layer], len(Q)).items():
        yield energy_along(task_vector, name, axis, Q) if axis else (task_vector.energy(name), None)


def _smallest_basis(
    task_vector: TaskVector, layer: int, directions: Float[Tensor, "features d"], share: float
) -> Float64[Tensor, "d rank"]:
    """A basis of the fewest directions, from the top, that keep a share of a layer's energy; of all if none do."""
    Q = nested_basis(directions)[0]
    before, along = 0.0, torch.zeros(Q.shape[1], dtype=torch.float64)
    for energy, found in _energies(task_vector, layer, Q):
        if found is not None:
            before, along = before + energy, along + found
    short = int((along.cumsum(0) < share * before).sum())
    return Q[:, : short + 1].contiguous()


def _energy_matched(task_vector: TaskVector, projection: FeatureProjection) -> FeatureProjection:
    """The same projection, rescaled per layer to the norm of the layer's raw change, norms and biases included."""
    scale = {}
    for layer, Q in sorted(projection.bases.items()):
        raw = after = 0.0
        for energy, along in _energies(task_vector, layer, Q):
            raw, after = raw + energy, after + (0.0 if along is None else float(along.sum()))
        scale[layer] = (raw / after) ** 0.5 if after > 1e-12 * raw else float(raw == 0)
    if empty := [layer for layer, factor in scale.items() if not factor]:
        raise StethoscopeError(
            f"the projected change is zero in layers {', '.join(map(str, empty))}: no factor gives it the raw norm",
            hint="leave out the energy-matched arms, or project onto more features",
        )
    return replace(projection, scale=scale)
