"""What the studies share: the vectors' recipes, and where outcomes go."""

from pathlib import Path

from stethoscope.checkpoints.checkpoint import open_checkpoint
from stethoscope.checkpoints.task_vector import open_task_vector
from stethoscope.recipe import Recipe

OUTCOMES = Path(__file__).parent / "outcomes"
NAMES = ("math_0", "math_1", "code", "words")  # the task vectors; the first is the demo's own


def recipe_of(vector: str, vectors: Path) -> Recipe:
    """A vector's recipe, which `vectors.py` wrote."""
    return Recipe.from_yaml(vectors / vector / "recipe.yaml")


def energies(recipe: Recipe) -> dict[int, float]:
    """Each layer's task vector energy."""
    return open_task_vector(open_checkpoint(recipe.base), recipe.tuned).energy_by_layer()
