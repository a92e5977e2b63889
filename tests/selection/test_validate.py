"""A score that knows the planted layers is told from one that does not, by what the layers truly do."""

import numpy as np
import pytest
from world import random_sae

from stethoscope.artifacts import Provenance
from stethoscope.check import VALIDATED
from stethoscope.diagnosis.collect import collect_activations
from stethoscope.diagnosis.scores import SCORES
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import ATTRIBUTION
from stethoscope.results.validation import ScoreValidation
from stethoscope.selection.baselines import edit_scores, text_scores
from stethoscope.selection.injection import measure
from stethoscope.selection.validate import validate_scores


@pytest.fixture(scope="module")
def judged(planted, edits) -> ScoreValidation:
    scores = {
        "mass_shift": ("sae", {0: 0.1, 1: 0.9, 2: 0.3, 3: 0.2, 4: 0.8, 5: 0.0}),
        "deaf": ("sae", {0: 0.9, 1: 0.1, 2: 0.7, 3: 0.8, 4: 0.2, 5: 0.6}),
        "constant": ("rival", dict.fromkeys(range(6), 1.0)),
    }
    steps: list[tuple[int, int]] = []
    found = validate_scores(
        planted.model, edits, scores, planted.texts, provenance=Provenance(seed=1), ks=(1, 2, 9),
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps[-1][0] == steps[-1][1]
    return found


def test_a_score_that_knows_beats_every_random_set(judged, tmp_path):
    knows = judged.scores["mass_shift"].sets[2]
    assert knows.effect.layers == (1, 4)
    assert knows.overlap == 1
    assert knows.beaten.share == pytest.approx(14 / 15)  # all pairs but itself
    assert knows.beaten_matched.share == 1
    assert len(judged.random[2].equal_size) == 15
    assert (1, 4) not in {effect.layers for effect in judged.random[2].matched["mass_shift"]}
    deaf = judged.scores["deaf"].sets[2]
    assert deaf.overlap == 0
    assert deaf.beaten.share < 0.6
    assert judged.scores["mass_shift"].trade_off.rho > 0.5 > 0 > judged.scores["deaf"].trade_off.rho
    assert "`mass_shift` chooses better than chance" in judged.verdict("mass_shift", 2)
    assert "`deaf` does not choose clearly better than chance" in judged.verdict("deaf", 2)
    judged.save(tmp_path)
    assert ScoreValidation.load(tmp_path) == judged


def test_what_is_undefined_is_none_and_ties_go_to_the_lower_layer(judged):
    constant = judged.scores["constant"]
    assert constant.gain.rho is None
    assert constant.sets[2].effect.layers == (0, 1)
    assert "undefined" in judged.table(2)[[row[0] for row in judged.table(2)].index("constant")]
    assert set(constant.sets) == {1, 2, 3}  # half of the layers is added, more than there are is left out


def test_effects_are_those_of_the_sets_injected(judged, planted, edits):
    truth = measure(planted.model, edits, planted.texts, [{1: 1.0, 4: 1.0}])
    effect = judged.scores["mass_shift"].sets[2].effect
    assert effect.target_gain == pytest.approx(truth.mean("target")[0])
    assert effect.control_cost == pytest.approx(-truth.mean("control")[0])
    alone = measure(planted.model, edits, planted.texts, [{layer: 1.0} for layer in range(6)])
    np.testing.assert_allclose([layer.target_gain for layer in judged.injected], alone.mean("target"))
    assert judged.scores["injection"].trade_off.rho == pytest.approx(1)


def test_scores_of_other_layers_are_refused(planted, edits):
    scores = {"one": ("sae", dict.fromkeys(range(6), 1.0)), "two": ("sae", dict.fromkeys(range(5), 1.0))}
    with pytest.raises(StethoscopeError, match="different layers"):
        validate_scores(planted.model, edits, scores, planted.texts, provenance=Provenance())
    with pytest.raises(StethoscopeError, match="three layers"):
        validate_scores(planted.model, edits, {}, planted.texts, provenance=Provenance())


def test_every_score_is_there_for_every_layer(planted, edits, tokenizer):
    saes = {layer: random_sae(seed=layer) for layer in range(6)}
    corpora = {"target": ["1+2=3;4+4=8;"] * 4 + ["2+2=4;" * 3] * 4, "control": ["river stone cloud"] * 8}
    collected = collect_activations(planted.model, tokenizer, saes, corpora, block_size=2)
    statistics = {name: found.statistics for name, found in collected.items()}
    found = text_scores(statistics) | edit_scores(planted.model, edits, saes, statistics, planted.texts)
    assert {name for name, (kind, _) in found.items() if kind == "rival"} == {
        "norm", "residual_shift", "gradient", "local_effect", "functional_specificity",
    }  # fmt: skip
    for _, values in found.values():
        assert sorted(values) == list(range(6))
        assert np.isfinite(list(values.values())).all()
    assert set(found) == {*SCORES, *(f"{score} increment" for score in SCORES), ATTRIBUTION, *VALIDATED} - {"injection"}
    little = edit_scores(planted.model, edits, saes, statistics, planted.texts, coefficient=1e-3)
    slopes, local, attributed, whole = (
        np.array([*scores[name][1].values()])
        for scores, name in ((found, "gradient"), (little, "local_effect"), (little, ATTRIBUTION), (found, ATTRIBUTION))
    )  # effects of the edit that is validated
    assert [*little["gradient"][1].values()] == pytest.approx(1e-3 * slopes)
    np.testing.assert_allclose(local, 1e-3 * slopes, rtol=0.01, atol=5e-6)
    assert 0 < attributed.sum() < 0.01 * whole.sum()
    best = sorted(found["gradient"][1], key=found["gradient"][1].get)[-2:]
    assert sorted(best) == list(planted.layers)
