"""A run's folder with the stages' own results, and one with hostile text wherever text can come in."""

from pathlib import Path

import pytest
from made_results import Results, make_comparison, make_diagnosis, make_evidence, make_selection

from stethoscope.artifacts import Provenance
from stethoscope.results.comparison import Comparison
from stethoscope.results.evidence import Context, Evidence, FeatureEvidence, LayerEvidence

HOSTILE = "</script><script>window.planted=1</script><img src=x onerror=window.planted=1>"


@pytest.fixture(scope="session")
def comparison() -> Comparison:
    return make_comparison()


@pytest.fixture(scope="session")
def results(comparison) -> Results:
    diagnosis = make_diagnosis()
    recipe = "base: smollm2\ntuned: smollm2-math\nselect: {policy: top_k, k: 5}\nseed: 0\n"
    return Results(diagnosis, make_selection(diagnosis), comparison, recipe, make_evidence(diagnosis))


@pytest.fixture(scope="session")
def hostile(results) -> Results:
    """The same results with markup in names of a task, an arm and a corpus, a layer's flag, contexts and the recipe."""
    subjects = {f"algebra{HOSTILE}": 0.3, "geometry": 0.2}
    arms = {"base": (0.0, 0.0), "selected": (0.1, 0.02), f"random{HOSTILE}": (0.02, 0.02)}
    layers = results.diagnosis.layers
    flagged = layers[-1].model_copy(update={"flag": HOSTILE})
    diagnosis = results.diagnosis.model_copy(update={"layers": (*layers[:-1], flagged), "warnings": (HOSTILE,)})
    text = HOSTILE.replace("planted", "planted_context")
    context = Context(document=0, before=text, token=text, after=text, activation=1.0)
    feature = FeatureEvidence(
        feature=1700, contexts={"target": (context,), HOSTILE: ()}, promotes=(text,), link="javascript:window.planted=1"
    )
    parts = tuple(LayerEvidence(layer=layer.layer, features=(feature,)) for layer in layers)
    evidence = Evidence(provenance=Provenance(), documents={"target": 1, HOSTILE: 1}, layers=parts)
    recipe = f"base: '{HOSTILE}'\ntuned: '{HOSTILE}'\n"
    comparison = make_comparison(arms=arms, subjects=subjects, items=60)
    return Results(diagnosis, results.selection, comparison, recipe, evidence)


@pytest.fixture
def run_folder(tmp_path, results) -> Path:
    return results.save(tmp_path / "run")
