"""Scores that know chance: a planted layer is found, and two halves of one corpus are not called different."""

import numpy as np
import pytest

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.diagnose import diagnose
from stethoscope.diagnosis.listen import Listening
from stethoscope.diagnosis.scores import mass_shift
from stethoscope.diagnosis.statistics import FeatureStatistics, LayerStatistics
from stethoscope.diagnosis.uncertainty import assess
from stethoscope.errors import StethoscopeError


def corpus(rng, *, blocks=12, width=40, layers=5, planted=None, tokens=200) -> FeatureStatistics:
    """Blocks of gamma-distributed sums; in the planted layer a tenth of the features act five times as much."""
    made = {}
    for layer in range(layers):
        sums = rng.gamma(2.0, 1.0, (blocks, width)) * np.linspace(0.1, 3, width)
        if layer == planted:
            sums[:, -width // 10 :] *= 5
        made[layer] = LayerStatistics(
            sums=sums,
            fired=rng.integers(0, tokens, (blocks, width)),
            maxima=sums.astype(np.float32),
            tokens=np.full(blocks, tokens),
            sinks=np.zeros(blocks, dtype=np.int64),
        )
    return FeatureStatistics(layers=made)


def test_mass_shift_is_total_variation():
    rng = np.random.default_rng(0)
    a, b = rng.random((7, 30)), rng.random((7, 30))
    expected = [np.abs(x / x.sum() - y / y.sum()).sum() / 2 for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(mass_shift(a, b), expected)
    np.testing.assert_allclose(mass_shift(a, 17.0 * a), 0, atol=1e-12)
    assert mass_shift(np.array([1.0, 0.0]), np.array([0.0, 2.0])) == 1
    assert mass_shift(np.zeros(3), np.zeros(3)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_planted_layer_is_found(seed):
    rng = np.random.default_rng(seed)
    found = assess(corpus(rng, planted=3), corpus(rng), mass_shift, rng=rng)
    assert np.argmax(found.excess) == 3
    assert found.p_familywise[3] == pytest.approx(1 / 201)
    assert found.top_share(1)[3] > 0.95
    low, high = found.interval()
    assert low[3] > 0
    assert (low <= found.excess).all()
    assert (found.excess <= high).all()


def test_null_pairs_are_significant_no_more_often_than_the_level_says():
    false_alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        found = assess(
            corpus(rng, blocks=8), corpus(rng, blocks=11), mass_shift, permutations=99, resamples=19, rng=rng
        )
        false_alarms += bool((found.p_familywise <= 0.05).any())
    assert false_alarms <= 19  # the 0.999 quantile of Binomial(200, 0.05)


def test_familywise_p_is_never_below_the_layer_p():
    rng = np.random.default_rng(5)
    found = assess(corpus(rng, planted=1), corpus(rng), mass_shift, rng=rng)
    # both count null draws at least as extreme; z ranks a layer's draws exactly as the score does
    assert (found.p_familywise >= found.p).all()


def test_too_few_blocks_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(StethoscopeError, match="3 blocks"):
        assess(corpus(rng), corpus(rng, blocks=3), mass_shift, rng=rng)


def listening(statistics: FeatureStatistics, explained: dict[int, float | None]) -> Listening:
    return Listening(statistics=statistics, variance_explained=explained)


def test_diagnosis_flags_bad_saes_and_is_identical_on_a_second_run(tmp_path):
    rng = np.random.default_rng(7)
    target, control = corpus(rng, planted=2), corpus(rng)
    explained = {0: 0.9, 1: 0.31, 2: 0.8, 3: None, 4: 0.95}
    heard = {
        "target": listening(target, explained),
        "control": listening(control, dict.fromkeys(range(5), 0.9)),
    }
    documents = {"target": 40, "control": 40}
    made = diagnose(heard, documents=documents, provenance=Provenance(seed=3))
    assert [layer.flag for layer in made.layers] == [
        None,
        "SAE variance explained 0.31 on target text",
        None,
        "SAE variance explained undefined on target text",
        None,
    ]
    assert max(made.layers, key=lambda layer: layer.excess).layer == 2
    assert {f.feature for f in made.layers[2].features[:4]} == {36, 37, 38, 39}
    assert sum(layer.increment for layer in made.layers) == pytest.approx(made.layers[-1].excess)
    assert diagnose(heard, documents=documents, provenance=Provenance(seed=3)) == made
    made.save(tmp_path)
    assert type(made).load(tmp_path) == made
    assert type(made).load_if_current(tmp_path, Provenance(seed=4)) is None


def test_a_difference_in_length_is_said():
    rng = np.random.default_rng(7)
    target, control = corpus(rng, tokens=900), corpus(rng, tokens=300)
    explained = dict.fromkeys(range(5), 0.9)
    heard = {"target": listening(target, explained), "control": listening(control, explained)}
    made = diagnose(heard, documents={"target": 10, "control": 10}, provenance=Provenance())
    assert len(made.warnings) == 1
    assert "1080 tokens" in made.warnings[0]
    with pytest.raises(StethoscopeError, match="unknown score `loudness`"):
        diagnose(heard, documents={"target": 10, "control": 10}, provenance=Provenance(), score="loudness")
