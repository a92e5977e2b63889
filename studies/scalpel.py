"""Study 2: the scalpel. Every arm that cuts along features, and its controls, by loss, for every vector.

    python studies/scalpel.py [--vectors runs/studies] [--only math_0 ...]

Vectors done before are kept; the diagnosis and selection of `choice.py` are used, or made. Writes
`outcomes/scalpel.parquet`, a row per vector, arm, text and document, and `outcomes/geometry.parquet`, a row per vector
and layer: the share of its energy that features keep, and what chance keeps.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from common import NAMES, Bench, arguments, recipe_of, resume

from stethoscope.cli.console import ConsoleReporter
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.scalpel import scalpel_plans
from stethoscope.editing.subspace import FeatureProjection, random_basis
from stethoscope.recipe import SCALPEL_ARMS
from stethoscope.run import run_recipe
from stethoscope.selection.arms import control_plan

FEATURES = 17  # 3 % of the width of 576, the published share
FRACTIONS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the whole task vector, for a curve that every arm can be set beside


def plans(bench: Bench) -> Mapping[str, EditPlan | None]:
    """All arms."""
    layers, chosen = range(bench.base.layers), bench.chosen
    cut = scalpel_plans(SCALPEL_ARMS, bench.task_vector, chosen, bench.directions, features=FEATURES, layers=layers)
    hybrid = cut["hybrid"].transform
    assert isinstance(hybrid, FeatureProjection)
    generator = torch.Generator().manual_seed(0)
    at_random = FeatureProjection(
        bases={n: random_basis(len(Q), Q.shape[1], generator) for n, Q in sorted(hybrid.bases.items())},
        raw=frozenset(chosen),
    )
    return {
        "base": None,
        "tuned": EditPlan.everything(),
        "selected": EditPlan.for_layers(chosen),
        "scaled": control_plan("scaled", chosen, energy=bench.task_vector.energy_by_layer(), excess={}),
        **{str(arm): plan for arm, plan in cut.items()},
        "hybrid, random of equal rank": EditPlan.for_layers(layers, transform=at_random),
        **{f"all at {part:g}": EditPlan.for_layers(layers, coefficient=part) for part in FRACTIONS},
    }


def losses(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row per arm, text and document."""
    return bench.rows(plans(bench))


def geometry(vector: str, vectors: Path) -> Iterator[dict[str, Any]]:
    """A row per layer."""
    recipe, folder = recipe_of(vector, vectors), vectors / vector / "run"
    found = run_recipe(recipe, folder, until="geometry", reporter=ConsoleReporter())
    for one in found.results["geometry"].layers:
        yield {"vector": vector, "layer": one.layer, "kept": one.kept.share, "chance": one.kept.chance}


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    resume("geometry", "vector", NAMES, options.only, lambda vector: geometry(vector, options.vectors))
    resume("scalpel", "vector", NAMES, options.only, lambda vector: losses(Bench(vector, options.vectors)))
