"""Every test statistic against an independent implementation, a published value or brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.inference import (
    adjust,
    mcnemar_exact,
    non_inferiority,
    paired_difference,
    ratio_difference,
    score_statistic,
    smallest_detectable_gain,
    unpaired_z,
)


def pair(both, only_a, only_b, neither):
    counts = [both, only_a, only_b, neither]
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


def test_unpaired_z_is_the_papers():
    result = unpaired_z(160, 540, 213, 540)
    assert (round(result.statistic, 2), round(result.p_value, 4)) == (3.41, 0.0007)
    a, b = np.repeat([1, 0], [160, 380]), np.repeat([1, 0], [213, 327])
    assert result.statistic == pytest.approx((b.mean() - a.mean()) / np.hypot(stats.sem(a), stats.sem(b)))


@pytest.mark.parametrize(
    ("counts", "why"), [((0, 9, 0, 9), "same result"), ((9, 9, 0, 9), "same"), ((1, 1, 0, 5), "single")]
)
def test_unpaired_z_without_variance_is_undefined(counts, why):
    result = unpaired_z(*counts)
    assert (result.statistic, result.p_value) == (None, None)
    assert why in result.reason


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_statsmodels(b, c):
    result = mcnemar_exact(b, c)
    if b + c == 0:
        assert (result.p_value, result.reason is not None) == (1.0, True)
    else:
        assert result.p_value == pytest.approx(statsmodels_mcnemar([[0, b], [c, 0]], exact=True).pvalue)


def test_score_statistic_maximises_the_likelihood_under_the_constraint():
    for worse, better, n, d in [(3, 9, 40, 0.1), (0, 0, 25, -0.02), (5, 0, 12, -0.3), (10, 30, 540, -0.02)]:

        def deviance(share, worse=worse, better=better, n=n, d=d):
            p = np.array([share, share + d, 1 - 2 * share - d])
            counts = np.array([worse, better, n - worse - better])
            if (p < 0).any() or ((p == 0) & (counts > 0)).any():
                return np.inf
            return -float((counts[counts > 0] * np.log(p[counts > 0])).sum())

        low, high = max(0.0, -d), (1 - d) / 2
        share = optimize.minimize_scalar(deviance, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        variance = n * (2 * share + d * (1 - d))
        assert score_statistic(worse, better, n, d) == pytest.approx((better - worse - n * d) / variance**0.5, rel=1e-3)
    # at zero it is McNemar's, and the interval ends where it is significant
    assert score_statistic(20, 38, 358, 0.0) == pytest.approx(18 / 58**0.5)
    low = paired_difference(*pair(100, 20, 38, 200), method="score").low
    assert score_statistic(20, 38, 358, low) == pytest.approx(stats.norm.isf(0.025))


def test_bootstrap_agrees_with_scipy_and_with_the_normal_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.normal(0.1, 1, size=200)
    ours = paired_difference(a, b, resamples=20_000)
    theirs = stats.bootstrap((b - a,), np.mean, method="percentile", n_resamples=5000, rng=rng).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.standard_error == pytest.approx(stats.sem(b - a))
    assert ours == paired_difference(a, b, resamples=20_000)


def test_clustered_error_is_statsmodels_and_copies_add_nothing():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 23, size=150)
    a, b = rng.random(150) < 0.4, rng.random(150) < 0.5 + 0.3 * (clusters % 2)
    fit = OLS(b.astype(float) - a, np.ones(150)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    ours = paired_difference(a, b, clusters=clusters)
    assert ours.standard_error == pytest.approx(float(fit.bse[0]))
    assert ours.clusters == len(np.unique(clusters))
    assert ours.standard_error > paired_difference(a, b).standard_error
    a, b = pair(30, 10, 25, 35)
    single = paired_difference(a, b)
    doubled = paired_difference(np.tile(a, 2), np.tile(b, 2), clusters=np.tile(np.arange(100), 2))
    assert doubled.clusters == 100
    assert doubled.standard_error == pytest.approx(single.standard_error)
    assert (doubled.low, doubled.high) == pytest.approx((single.low, single.high), abs=0.01)


def test_strata_are_resampled_apart():
    a = np.zeros(200)
    b = np.repeat([1.0, 0.0], 100)  # all of the spread lies between the strata
    b[[0, 100]] = [0.0, 1.0]
    apart, together = paired_difference(a, b, strata=np.repeat([0, 1], 100)), paired_difference(a, b)
    assert apart.high - apart.low < 0.3 * (together.high - together.low)


def test_clustered_error_in_strata_is_the_bootstraps():
    rng = np.random.default_rng(0)
    sizes = np.tile(np.repeat([1, 9], 40), 2)  # sources of one item and of nine, in two strata that differ
    clusters, strata = np.repeat(np.arange(160), sizes), np.repeat(np.repeat([0, 1], 80), sizes)
    b = 0.8 * strata + rng.normal(0, 0.05, len(strata))
    found = paired_difference(np.zeros(len(b)), b, clusters=clusters, strata=strata)
    assert found.standard_error == pytest.approx((found.high - found.low) / 3.92, rel=0.05)


def test_the_t_test_is_welchs_in_two_strata():
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.4, 0.1, 8), rng.normal(0.3, 1.0, 8)
    found = paired_difference(np.zeros(16), np.concatenate([one, two]), strata=np.repeat([0, 1], 8))
    assert found.p_value == pytest.approx(stats.ttest_ind(one, -two, equal_var=False).pvalue)


@pytest.mark.parametrize("labels", [{"clusters": [0, 0, 0, 1, 1, 1]}, {}])
def test_strata_without_any_spread_have_no_interval(labels):
    same = labels or {"strata": [0, 0, 0, 1, 1, 1]}
    b = [1, 1, 0, 0, 0, 0] if labels else [1, 1, 1, 0, 0, 0]
    found = paired_difference([0] * 6, b, **{"strata": [0, 0, 0, 1, 1, 1]} | same)
    assert (found.low, found.high, found.p_value) == (None, None, None)
    assert found.reason


def test_ratio_difference_weighs_units_and_agrees_with_scipy():
    by_hand = ratio_difference([2.0, 9.0], [3.0, 9.0], [1, 3])
    assert (by_hand.difference, by_hand.low, by_hand.high) == pytest.approx((0.25, 0.0, 1.0))
    rng = np.random.default_rng(0)
    weights = rng.integers(5, 60, size=80).astype(float)
    a = weights * rng.gamma(3.0, 1.0, size=80)
    b = a + weights * rng.normal(0.2, 0.5, size=80)
    ours = ratio_difference(a, b, weights, resamples=20_000)

    def ratio(x, y, w):
        return (y.sum(-1) - x.sum(-1)) / w.sum(-1)

    theirs = stats.bootstrap((a, b, weights), ratio, paired=True, method="percentile", n_resamples=9999, rng=rng)
    assert ours.difference == pytest.approx(ratio(a, b, weights))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.05)


def test_detectable_gain_is_the_published_one_and_has_its_power():
    for n, points in [(540, 5.4), (1187, 3.6), (5000, 1.8)]:
        assert round(100 * smallest_detectable_gain(n, 0.2).gain, 1) == points
    gain = smallest_detectable_gain(540, 0.2).gain
    rng = np.random.default_rng(0)
    draws = rng.multinomial(540, [(0.2 - gain) / 2, (0.2 + gain) / 2, 0.8], size=2000).tolist()
    found = np.mean([mcnemar_exact(b, c).p_value < 0.05 for b, c, _ in draws])
    assert found == pytest.approx(0.8, abs=0.05)
    for discordance in (0.05, 0.0):
        assert smallest_detectable_gain(20, discordance).gain is None
    assert "too few" in smallest_detectable_gain(20, 0.05).reason
    assert mcnemar_exact(0, 5).p_value > 0.05  # the best that five items can give
    assert (smallest_detectable_gain(5, 1.0).gain, smallest_detectable_gain(6, 1.0).gain is None) == (None, False)
    for power, alpha in ((0.02, 0.05), (1.0, 0.05), (0.8, 0.0)):
        with pytest.raises(EvaluationError, match="power"):
            smallest_detectable_gain(540, 0.2, power, alpha)


@pytest.mark.parametrize(("method", "theirs"), [("holm", "holm"), ("bh", "fdr_bh")])
def test_adjustments_are_statsmodels_and_what_was_not_tested_does_not_count(method, theirs):
    p = np.random.default_rng(0).random(30) ** 3
    p[4] = p[17]
    np.testing.assert_allclose(adjust(list(map(float, p)), method), multipletests(p, method=theirs)[1])
    assert adjust([0.02, None, 0.03], method) == {"holm": [0.04, None, 0.04], "bh": [0.03, None, 0.03]}[method]
    assert adjust([None], method) == [None]
    with pytest.raises(EvaluationError, match="bonferoni"):
        adjust([0.1], "bonferoni")


def test_non_inferiority_is_a_claim_of_its_own():
    same = non_inferiority(*pair(270, 0, 0, 270), 0.02)
    assert same.shown
    assert 0 < same.smallest_margin < 0.02
    noisy = non_inferiority(*pair(200, 54, 54, 232), 0.02)
    assert (noisy.difference, noisy.shown) == (0.0, False)  # no difference seen, none ruled out
    assert noisy.p_value > 0.025
    with pytest.raises(EvaluationError, match="margin"):
        non_inferiority([1], [1], 0.0)


def test_few_units_rule_out_no_loss_that_a_t_test_does_not():
    x, y = np.zeros(3), np.array([-0.02, 0.0, 0.02])
    reach = float(stats.t.isf(0.025, 2) * stats.sem(y))
    assert paired_difference(x, y).low > -0.03  # the bootstrap's
    for margin, shown in ((0.03, False), (reach * 0.999, False), (reach * 1.001, True)):
        assert non_inferiority(x, y, margin).shown is shown


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(40, 300), st.sampled_from([0.01, 0.05, 0.2]))
def test_non_inferiority_is_its_p_value(worse, better, rest, margin):
    result = non_inferiority(*pair(rest, worse, better, 0), margin)
    assert result.shown == (result.p_value < 0.025)
    assert result.p_value == pytest.approx(float(stats.norm.sf(score_statistic(worse, better, result.n, -margin))))
    if result.smallest_margin and result.smallest_margin < 0.99:
        for factor in (1.001, 0.999):
            again = non_inferiority(*pair(rest, worse, better, 0), result.smallest_margin * factor)
            assert again.shown == (factor > 1)


@pytest.mark.parametrize(("a", "b"), [([1], [0]), ([1] * 9, [1] * 9), ([0] * 9, [0] * 9), ([1] * 9, [0] * 9)])
def test_degenerate_items_have_defined_answers(a, b):
    boot, score = paired_difference(a, b), paired_difference(a, b, method="score")
    assert (boot.low, boot.high) == (None, None)
    assert boot.reason
    assert -1 <= score.low <= score.difference <= score.high <= 1
    assert score.high > score.low


def test_unpairable_results_are_refused():
    for a, b in [([1, 0], [1]), ([], []), ([np.nan], [1.0])]:
        with pytest.raises(EvaluationError):
            paired_difference(a, b)
    for a, options in [
        ([0.5, 1.0], {"method": "score"}),
        ([0.0, 1.0], {"method": "score", "clusters": [0, 1]}),
        ([0.0, 1.0], {"method": "score", "strata": [0, 1]}),
    ]:
        with pytest.raises(EvaluationError, match=f"no interval by `{options['method']}`"):
            paired_difference(a, [1, 0], **options)
    for confidence in (95.0, 0.0, 1.0, -0.5):
        for call in (paired_difference, non_inferiority, ratio_difference):
            third = [] if call is paired_difference else [0.02] if call is non_inferiority else [[1, 1]]
            with pytest.raises(EvaluationError, match=f"`{confidence}`"):
                call([1, 0], [0, 1], *third, confidence=confidence)


def test_levels_hold_in_simulation():
    """Coverage of the score interval and false positives of the exact test, without and with a true gain."""
    rng = np.random.default_rng(0)
    for n, discordance, gain in itertools.product((50, 540), (0.05, 0.2, 0.45), (0.0, 0.04)):
        shares = [(discordance - gain) / 2, (discordance + gain) / 2, 1 - discordance]
        draws = rng.multinomial(n, shares, size=400).tolist()
        z = [score_statistic(worse, better, n, gain) for worse, better, _ in draws]
        assert np.mean(np.abs(z) < stats.norm.isf(0.025)) > 0.91  # the interval covers where the score is small
        if gain == 0:
            assert np.mean([mcnemar_exact(b, c).p_value < 0.05 for b, c, _ in draws]) < 0.075
    # non-inferiority is claimed wrongly no more often than its level at the margin itself
    draws = rng.multinomial(540, [0.11, 0.09, 0.8], size=300).tolist()
    wrongly = [non_inferiority(*pair(0, w, b, rest), 0.02).shown for w, b, rest in draws]
    assert np.mean(wrongly) < 0.06
