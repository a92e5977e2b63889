"""A run's folder with the stages' own results, and one with hostile text wherever text can come in."""

from pathlib import Path

import pytest
from made_results import Results, make_comparison, make_diagnosis, make_selection

from stethoscope.evaluation.comparison import Comparison

HOSTILE = "</script><script>window.planted=1</script><img src=x onerror=window.planted=1>"


@pytest.fixture(scope="session")
def comparison() -> Comparison:
    return make_comparison()


@pytest.fixture(scope="session")
def results(comparison) -> Results:
    diagnosis = make_diagnosis()
    recipe = "base: smollm2\ntuned: smollm2-math\nselect: {policy: top_k, k: 5}\nseed: 0\n"
    return Results(diagnosis, make_selection(diagnosis), comparison, recipe)


@pytest.fixture(scope="session")
def hostile(results) -> Results:
    """The same results with markup in a task's name, an arm's name, a layer's flag and the recipe."""
    subjects = {f"algebra{HOSTILE}": 0.3, "geometry": 0.2}
    arms = {"base": (0.0, 0.0), "selected": (0.1, 0.02), f"random{HOSTILE}": (0.02, 0.02)}
    layers = results.diagnosis.layers
    flagged = layers[-1].model_copy(update={"flag": HOSTILE})
    diagnosis = results.diagnosis.model_copy(update={"layers": (*layers[:-1], flagged), "warnings": (HOSTILE,)})
    recipe = f"base: '{HOSTILE}'\ntuned: '{HOSTILE}'\n"
    return Results(diagnosis, results.selection, make_comparison(arms=arms, subjects=subjects, items=60), recipe)


@pytest.fixture
def run_folder(tmp_path, results) -> Path:
    return results.save(tmp_path / "run")
