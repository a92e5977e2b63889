"""Scores that know chance: a planted layer is found, and two halves of one corpus are not called different."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from world import random_sae

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.collect import CollectedActivations, collect_activations
from stethoscope.diagnosis.diagnose import diagnose
from stethoscope.diagnosis.scores import SCORES, Blocks, mass_shift, positive_difference
from stethoscope.diagnosis.statistics import FeatureStatistics, LayerStatistics
from stethoscope.diagnosis.uncertainty import assess
from stethoscope.errors import StethoscopeError
from stethoscope.results.diagnosis import SAEHealth


def corpus(rng, *, blocks=12, width=200, layers=5, planted=None, tokens=200) -> FeatureStatistics:
    """Blocks in which most features fire rarely; in the planted layer a tenth of them, silent elsewhere, fire often."""
    made = {}
    rates = np.geomspace(0.0005, 0.3, width)
    for layer in range(layers):
        p = rates * rng.gamma(20.0, 1 / 20, (blocks, width))
        p[:, ::10] = 0.15 if layer == planted else 0.002
        fired = rng.binomial(tokens, np.minimum(p, 1))
        sums = fired * rng.gamma(20.0, 1 / 20, (blocks, width))
        made[layer] = LayerStatistics(
            sums=sums, fired=fired, tokens=np.full(blocks, tokens), sinks=np.zeros(blocks, dtype=np.int64)
        )
    return FeatureStatistics(layers=made)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("seed", range(20))
def test_every_score_finds_the_planted_layer(name, seed):
    rng = np.random.default_rng(seed)
    found = assess(corpus(rng, planted=3), corpus(rng), SCORES[name], rng=rng, permutations=99, resamples=50)
    assert found.rank[3] == 1
    assert (found.p_familywise >= found.p).all()  # z ranks a layer's draws exactly as the score does
    assert found.stability[3] > 0.95
    assert found.p_familywise[3] == pytest.approx(1 / 100)
    low, high = found.interval()
    assert low[3] > 0
    assert (low <= found.excess).all()
    assert (found.excess <= high).all()


@pytest.mark.parametrize("name", SCORES)
def test_a_relabelling_that_is_the_one_seen_counts_as_equal(name):
    """Of five blocks and five, the labelling seen, or its mirror image, is drawn again and again."""
    rng, sizes = np.random.default_rng(0), {"blocks": 5, "width": 500, "tokens": 2000}
    target = FeatureStatistics(layers={n: corpus(rng, planted=n, **sizes).layers[n] for n in range(5)})
    found = assess(target, corpus(rng, **sizes), SCORES[name], permutations=2000, resamples=2, rng=rng)
    again = np.isclose(found.null, found.score, rtol=1e-12, atol=0).sum(0)
    assert (again > 1).all()
    assert (found.p >= (1 + again) / 2001).all()
    assert (found.p_familywise >= found.p).all()


def test_increments_find_where_a_cumulative_site_changes():
    rng = np.random.default_rng(1)
    layers = {n: corpus(rng, planted=3 if n >= 2 else None).layers[3] for n in range(5)}  # seen from layer 2 on
    target, control = FeatureStatistics(layers=layers), corpus(rng)
    plain = assess(target, control, SCORES["mass_shift"], rng=rng)
    added = plain.increments()
    assert (plain.z[2:] > 6).all()
    assert added.rank[2] == 1
    assert (added.z[[0, 1, 3, 4]] < 4).all()
    np.testing.assert_allclose(added.score.cumsum(), plain.score)


@pytest.fixture(scope="module")
def by_document(llama, tokenizer) -> FeatureStatistics:
    """A small model's statistics on documents of very unequal length, a block each."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), size=n)) for n in rng.integers(5, 120, size=90)]
    saes = {layer: random_sae(seed=layer) for layer in range(4)}
    return collect_activations(llama(layers=4), tokenizer, saes, {"all": texts}, block_size=1, health_tokens=0)[
        "all"
    ].statistics


@pytest.mark.parametrize("name", SCORES)
def test_null_pairs_are_significant_no_more_often_than_the_level_says(name, by_document):
    """One corpus split in two at random, a third and two thirds, is no finding more often than in 5 % of splits."""
    alarms = single = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        order = rng.permutation(90)
        target, control = (
            by_document.regroup(np.array_split(part, blocks)) for part, blocks in ((order[:30], 10), (order[30:], 20))
        )
        found = assess(target, control, SCORES[name], permutations=39, resamples=2, rng=rng)
        alarms += bool((found.p_familywise <= 0.05).any())
        single += int((found.p <= 0.05).sum())
    assert alarms <= 19  # the 0.999 quantile of Binomial(200, 0.05)
    assert single / 800 < 0.09  # layers of one model go together, so fewer than 800 independent draws


def blocks(sums, fired=None, tokens=100.0) -> Blocks:
    sums = np.array(sums, dtype=float)
    fired = np.zeros_like(sums) if fired is None else np.array(fired, dtype=float)
    return Blocks(sums=sums, fired=fired, tokens=np.full(len(sums), tokens))


FIRST, SECOND = np.array([1.0, 0.0]), np.array([0.0, 1.0])


def test_mass_shift_is_total_variation():
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(30)
    expected = np.abs(a / a.sum() - b / b.sum()).sum() / 2
    assert mass_shift(blocks([a, b]), FIRST, SECOND) == pytest.approx(expected)
    assert mass_shift(blocks([a, 17 * a]), FIRST, SECOND) == pytest.approx(0)
    assert mass_shift(blocks([[1, 0], [0, 2]]), FIRST, SECOND) == 1
    assert mass_shift(blocks(np.zeros((2, 3))), FIRST, SECOND) == 0


def test_scores_by_hand():
    #      specific, common, too rare on target, only on control
    made = blocks([[6, 3, 1, 0], [1, 5, 1, 3]], [[20, 50, 0, 0], [1, 50, 0, 40]])
    assert SCORES["specific_mass"](made, FIRST, SECOND) == pytest.approx(0.6)
    separated = [0.2 - 0.01, 0.0, 0.0, 0.0]  # features that fire on less than 2 % of control tokens
    assert SCORES["top_separation"](made, FIRST, SECOND) == pytest.approx(np.mean(separated))
    e = 1 / 102
    lifted = [0.2 * np.log((0.2 + e) / (0.01 + e)), 0.0, 0.0, 0.0]
    assert SCORES["lift"](made, FIRST, SECOND) == pytest.approx(sum(lifted) / 0.7)
    signed = blocks([[5, -2], [1, 3]])
    assert positive_difference(signed, FIRST, SECOND) == pytest.approx(0.04)


def test_probe_auroc_is_scipys_and_judges_by_held_out_blocks():
    rng = np.random.default_rng(3)
    fired = rng.integers(0, 30, size=(40, 16)).astype(float)
    made = Blocks(sums=fired, fired=fired, tokens=np.full(40, 100.0))
    target = np.repeat([1.0, 0.0], [15, 25])
    even = np.arange(40) % 2 == 0
    areas = []
    for held_out in (~even, even):  # all 16 features are taken, so only the held-out blocks decide
        t, c = (fired[held_out & (target == side)].sum(1) for side in (1, 0))
        areas.append(mannwhitneyu(t, c).statistic / (len(t) * len(c)))
    assert SCORES["probe_auroc"](made, target, 1 - target) == pytest.approx(np.mean(areas))


def test_too_few_blocks_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(StethoscopeError, match="3 blocks"):
        assess(corpus(rng), corpus(rng, blocks=3), mass_shift, rng=rng)


HEALTHY = dict.fromkeys(range(5), 0.9)


def diagnosed(target, *controls, explained=HEALTHY, seed=0, **options):
    """The diagnosis of a target against controls, whose SAEs are healthy but for the target's as given."""
    collected = {}
    for name, statistics in {"target": target, "control": controls[0], "same form": controls[-1]}.items():
        values = explained if name == "target" else HEALTHY
        health = {
            layer: SAEHealth(tokens=100, variance_explained=value, l0=10.0, dead=0.0, dense=0.0)
            for layer, value in values.items()
        }
        if name != "same form" or len(controls) > 1:
            collected[name] = CollectedActivations(statistics=statistics, documents=40, health=health)
    return diagnose(collected, provenance=Provenance(seed=seed), **options)


def test_diagnosis_flags_bad_saes_and_is_identical_on_a_second_run(tmp_path):
    rng = np.random.default_rng(7)
    target, control = corpus(rng, planted=2), corpus(rng)
    options = {"explained": {0: 0.9, 1: 0.31, 2: 0.8, 3: None, 4: 0.95}, "seed": 3}
    made = diagnosed(target, control, **options)
    flags = {1: "SAE variance explained 0.31 on target text", 3: "SAE variance explained not measured on target text"}
    assert {layer.layer: layer.flag for layer in made.layers if layer.flag} == flags
    for layer, warning in zip(flags, made.warnings, strict=True):
        assert warning.startswith(f"1 of 5 layers are excluded, layer {layer} ({flags[layer]}): ")
    assert "include_flagged" in made.warnings[1]
    assert max(made.layers, key=lambda layer: layer.excess).layer == 2
    assert {f.feature for f in made.layers[2].features[:20]} == set(range(0, 200, 10))
    assert sum(layer.increment for layer in made.layers) == pytest.approx(made.layers[-1].excess)
    assert diagnosed(target, control, **options, attribution={"target": control, "control": control}) == made
    made.save(tmp_path)
    assert type(made).load(tmp_path) == made
    assert type(made).load_if_current(tmp_path, Provenance(seed=4)) is None


def test_a_difference_in_length_is_said():
    rng = np.random.default_rng(7)
    target, control = corpus(rng, tokens=900), corpus(rng, tokens=300)
    (warning,) = diagnosed(target, control).warnings
    assert "270 tokens" in warning
    with pytest.raises(StethoscopeError, match="did you mean `mass_shift`"):
        diagnosed(target, control, score="mass_shif")


def test_a_layer_has_to_stand_out_against_every_control():
    """Layer 1 differs from one control only, layer 3 from both."""
    rng = np.random.default_rng(2)
    plain, one, three = corpus(rng), corpus(rng, planted=1), corpus(rng, planted=3)
    target = FeatureStatistics(layers=plain.layers | {1: one.layers[1], 3: three.layers[3]})
    control, same_form = corpus(rng), corpus(rng, planted=1)
    made = diagnosed(target, control, same_form)
    assert [layer.p_familywise < 0.05 for layer in made.layers] == [False, False, False, True, False]
    assert made.layers[1].against == "same form"
    assert diagnosed(target, control).layers[1].p_familywise < 0.05
    with pytest.raises(StethoscopeError, match="no control"):
        diagnose({"target": CollectedActivations(statistics=target, documents=40)})
