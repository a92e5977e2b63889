"""`compare` on made outcomes whose answer is known, and what it refuses."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from stethoscope.errors import EvaluationError, StethoscopeError
from stethoscope.evaluation.comparison import aa_floor, compare
from stethoscope.evaluation.inference import ratio_difference
from stethoscope.evaluation.outcomes import Outcomes, PerDocument
from stethoscope.results.comparison import Comparison
from stethoscope.results.comparison_tables import WHOLE, accuracy_rows, by_task, contrast_rows, gain_rows, noise


def rows(arm, task, right, *, extracted=True, truncated=False, prompt="p"):
    n = len(right)
    return pd.DataFrame(
        {
            "arm": arm,
            "task": task,
            "item": range(n),
            "item_hash": [f"{task}{i}" for i in range(n)],
            "prompt_hash": [f"{prompt}{i}" for i in range(n)],
            "exact_match": np.asarray(right, dtype=float),
            "extracted": pd.array(np.broadcast_to(extracted, n), dtype="boolean"),
            "truncated": pd.array(np.broadcast_to(truncated, n), dtype="boolean"),
            "generated_tokens": pd.array([9] * n, dtype="Int64"),
            **{"response": "r", "answer": "a", "target": "t"},
        }
    )


def outcomes(*parts):
    return Outcomes(frame=pd.concat(parts, ignore_index=True))


def pair_of(right, other, **options):
    """The outcomes of `base` and `edit` on one task."""
    return outcomes(rows("base", "t", right, **options), rows("edit", "t", other))


def test_verdicts_say_what_was_planted(tmp_path):
    """`good` gains on algebra, `null` equals base up to noise, `bad` loses; the control task suffers under `good`."""
    rng = np.random.default_rng(0)
    base, noisy, flip = (rng.random(300) < share for share in (0.3, 0.02, 0.2))
    right = {"base": base, "good": base | flip, "null": base ^ noisy, "bad": base & ~flip}
    family = ["algebra", "geometry"]
    made = outcomes(
        *(rows(arm, task, found) for task in family for arm, found in right.items()),
        *(rows(arm, "spelling", ~base & ~flip if arm == "good" else ~base) for arm in right),
    )
    losses = {arm: PerDocument(sums=np.arange(9.0) + (arm == "good"), tokens=np.full(9, 2)) for arm in right}
    result = compare(made, family=family, losses=losses)
    good, null, bad = (result.contrast(arm) for arm in ("good", "null", "bad"))
    assert (good.improved, good.worsened) == (family, ["spelling"])
    assert good.verdict.startswith("Mixed")
    assert good.loss.difference == pytest.approx(0.5)
    assert null.verdict.startswith("No evidence of benefit")
    assert bad.verdict.startswith("`bad` is worse than `base`")
    assert result.controls == ["spelling"]
    assert good.tasks[0].p_adjusted >= good.tasks[0].mcnemar.p_value
    assert good.pooled.low < good.pooled.difference < good.pooled.high
    assert good.pooled_mcnemar.c == sum(t.mcnemar.c for t in good.tasks if t.in_family)
    assert len(result.to_frame()) == 3 * 4
    result.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == result


def test_default_pairs_reach_tuned_and_random_arms():
    arms = ("base", "tuned", "selected", "random_1", "random_2")
    result = compare(outcomes(*(rows(arm, "t", [1, 0, 1]) for arm in arms)))
    pairs = {(c.a, c.b) for c in result.contrasts}
    assert {("base", arm) for arm in arms[1:]} <= pairs
    assert {("tuned", "selected"), ("random_1", "selected"), ("random_2", "selected")} <= pairs


def flipped(task, gained, lost, alike):
    """Both arms' rows of a task on which ``edit`` mends and breaks so many items."""
    counts = [gained, lost, alike]
    return rows("base", task, np.repeat([0, 1, 1], counts)), rows("edit", task, np.repeat([1, 0, 1], counts))


@pytest.mark.parametrize(
    ("tasks", "begins"),
    [
        ({"small": (9, 0, 11), **{f"t{i}": (28, 40, 132) for i in range(5)}}, "Mixed"),  # one gains, all together lose
        ({"small": (9, 0, 11), "t": (28, 45, 132)}, "Mixed"),
        ({"t": (12, 10, 178), "control": (0, 30, 100)}, "No evidence of benefit"),
        ({"t": (10, 12, 178), "control": (0, 30, 100)}, "`edit` is worse than `base`"),
        ({"t": (40, 2, 100), "control": (0, 30, 100)}, "Mixed"),
    ],
)
def test_no_verdict_contradicts_the_sign_of_the_gain(tasks, begins):
    made = outcomes(*(part for task, counts in tasks.items() for part in flipped(task, *counts)))
    contrast = compare(made, family=[task for task in tasks if task != "control"]).contrast("edit")
    assert contrast.verdict.startswith(begins)
    for task in contrast.worsened or contrast.improved:
        assert f"on {task}" in contrast.verdict


def test_a_few_results_claim_only_what_a_t_test_claims():
    base = np.array([0.1, 0.2, 0.3])
    made = outcomes(rows("base", "t", base), rows("edit", "t", base + np.array([0.01, 0.02, 0.03])))
    result = compare(made)
    contrast = result.contrast("edit")
    assert contrast.pooled.above  # as a bootstrap of three items has it
    assert contrast.pooled.p_value == pytest.approx(stats.ttest_1samp([0.01, 0.02, 0.03], 0).pvalue)
    assert not contrast.significant(0.05)
    assert contrast.verdict.startswith("No evidence of benefit")
    assert "does not bear out" in contrast.verdict
    assert [line.cells[1].kind for line in by_task(result)["Target: accuracy, %"]] == ["", ""]


def test_items_that_share_sources_are_tested_by_source():
    """Three of four passages change all of their items the same way, 75 items better and none worse: no evidence."""
    source = np.repeat(list("abcd"), 25)
    base, edit = rows("base", "t", np.zeros(100)), rows("edit", "t", source != "d")
    made = outcomes(base.assign(source=source), edit.assign(source=source))
    contrast = compare(made).contrast("edit")
    task = contrast.tasks[0]
    assert task.p_adjusted == pytest.approx(stats.ttest_1samp([1, 1, 1, 0], 0).pvalue)
    assert (task.mcnemar, contrast.pooled_mcnemar, contrast.improved) == (None, None, [])
    assert contrast.verdict.startswith("No evidence of benefit")
    assert task.flips.gained["correctness"] == 75
    assert compare(outcomes(base, edit)).contrast("edit").improved == ["t"]
    # a task without sources beside it: each of its items is one
    both = compare(outcomes(made.frame, *flipped("u", 9, 1, 30))).contrast("edit")
    assert (both.pooled.clusters, both.pooled_mcnemar) == (44, None)


def test_tasks_of_one_source_each_claim_nothing():
    parts = [part.assign(source=task) for task, k in (("t", 9), ("u", 12)) for part in flipped(task, k, 0, 11)]
    contrast = compare(outcomes(*parts)).contrast("edit")
    assert (contrast.pooled.low, contrast.significant(0.05)) == (None, False)
    assert contrast.verdict.startswith("No evidence of benefit")
    assert contrast.tasks[0].reasons["p_adjusted"] == "one unit cannot be resampled"


def test_a_task_named_twice_counts_once():
    made = outcomes(*flipped("t", 9, 1, 30))
    assert compare(made, family=["t", "t"]).contrasts == compare(made).contrasts


def test_another_filters_metric_has_no_known_extraction():
    parts = [rows(arm, "t", [0] * 9, extracted=arm == "edit") for arm in ("base", "edit")]
    frame = pd.concat([part.assign(**{"exact_match,flexible": float(i)}) for i, part in enumerate(parts)])
    made = Outcomes(frame=frame.reset_index(drop=True))
    task = compare(made, metric="exact_match,flexible").contrast("edit").tasks[0]
    assert (task.flips, task.mcnemar.c) == (None, 9)
    assert "first filter" in task.reasons["flips"]
    assert made.accuracy("exact_match,flexible")["accuracy_extracted"].isna().all()
    assert made.accuracy()["accuracy_extracted"].tolist()[1] == 0


@pytest.mark.parametrize("alpha", [5.0, 0.0, -0.1])
def test_a_level_that_is_none_is_refused(alpha):
    with pytest.raises(EvaluationError, match="not between 0 and 1"):
        compare(pair_of([0, 1], [1, 1]), alpha=alpha)


def test_flips_tell_format_from_mathematics(tmp_path):
    base = rows(
        "base", "t", [0, 0, 0, 1, 1], extracted=[False, False, True, True, True], truncated=[True, *[False] * 4]
    )
    edit = rows("edit", "t", [1, 1, 1, 0, 1], extracted=[True, True, True, False, True])
    result = compare(outcomes(base, edit))
    task = result.contrast("edit").tasks[0]
    assert task.flips.gained == {"format": 1, "truncation": 1, "correctness": 1}
    assert task.flips.lost == {"format": 1, "truncation": 0, "correctness": 0}
    gains = result.gains()
    assert gains[["cause", "gained", "lost", "net"]].to_numpy().tolist() == [
        ["format", 1, 1, 0],
        ["truncation", 1, 0, 1],
        ["correctness", 1, 0, 1],
    ]
    assert gains["points"].sum() == pytest.approx(100 * task.difference.difference)
    assert gain_rows(result.contrast("edit"))[1] == ["t", "+1 -1", "+1 -0", "+1 -0", "+2", "+40.0"]
    # truncation that is not recorded is left out with a reason
    result = compare(pair_of([0, 0, 1], [1, 1, 0], extracted=[False, True, True], truncated=None))
    flips = result.contrast("edit").tasks[0].flips
    assert flips.gained == {"format": 1, "correctness": 1}
    assert "not recorded" in flips.reason
    assert result.gains()["net"].isna().tolist() == [False, True, False]
    assert gain_rows(result.contrast("edit"))[1][1:4] == ["+1 -0", "-", "+1 -1"]
    result.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == result


def test_an_arm_evaluated_twice_gives_the_noise_floor():
    right, again = np.arange(200) % 2, np.arange(200) % 2
    again[:3] ^= 1
    made = outcomes(rows("base", "t", right), rows("base_again", "t", again), rows("edit", "t", right))
    result = compare(made)
    assert [(c.a, c.b) for c in result.contrasts] == [("base", "edit")]
    (floor,) = result.noise
    assert (floor.arm, floor.again, floor.n, floor.changed, floor.share) == ("base", "base_again", 200, 3, 0.015)
    assert (floor.low, floor.high) == pytest.approx(proportion_confint(3, 200, method="beta"))
    assert result.noise == aa_floor(made, "base", "base_again")
    assert any("3 of 200 items of `base` changed" in line for line in noise(result))
    assert compare(pair_of(right, right)).noise == []
    made.frame.loc[made.frame["item"] >= 100, "exact_match"] = np.nan  # no result, twice
    assert aa_floor(made, "base", "base_again")[0].changed == 3


def test_margins_metrics_and_a_verdict_for_each_task():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.4
    better = right | (rng.random(400) < 0.2)
    made = outcomes(*(rows("base", task, right) for task in "tu"), rows("edit", "t", better), rows("edit", "u", right))
    made.frame["math_verify"] = made.frame["exact_match"].where(made.frame["arm"] == "base", 1.0)
    result = compare(made, margins={"u": 0.001})
    t, u = result.contrast("edit").tasks
    assert (t.metric, t.non_inferiority.margin, u.non_inferiority.margin) == ("exact_match", 0.02, 0.001)
    assert t.verdict.startswith("`edit` is better than `base`")
    assert t.verdict.endswith("a loss of 2 points or more is ruled out.")
    assert u.verdict.startswith("no evidence that `edit` and `base` differ")
    assert u.verdict.endswith("a loss of 0.1 points or more is not ruled out.")
    other = compare(made, metric="math_verify").contrast("edit").tasks[1]
    assert (other.metric, other.accuracy_b) == ("math_verify", 1.0)
    assert result.accuracy[0]["metrics"].keys() == {"exact_match", "math_verify"}
    header, *body = accuracy_rows(result)
    assert header[3:5] == ["exact_match", "math_verify"]
    assert [row[:2] for row in body] == [["t", "base"], ["t", "edit"], ["u", "base"], ["u", "edit"]]
    assert len(contrast_rows(result.contrasts[0])) == 1 + 2 + 1
    column = contrast_rows(result.contrasts[0])[0].index("loss of it ruled out")
    assert [row[column] for row in contrast_rows(result.contrasts[0])[1:3]] == ["yes", "no"]
    with pytest.raises(EvaluationError, match="`nonsense`"):
        compare(made, metric="nonsense")
    made.frame.loc[0, "math_verify"] = np.nan
    with pytest.raises(EvaluationError, match=r"task `t` has items without `math_verify`"):
        compare(made, metric="math_verify")


def test_a_metric_between_0_and_1_has_an_interval_and_reasons():
    task = compare(pair_of([0.2, 0.5, 0.9, 0.1], [0.4, 0.5, 0.8, 0.6])).contrast("edit").tasks[0]
    assert (task.mcnemar, task.unpaired, task.smallest_detectable_gain, task.flips) == (None, None, None, None)
    assert set(task.reasons) == {"unpaired", "mcnemar", "p", "smallest_detectable_gain", "flips"}
    assert task.p_adjusted == pytest.approx(stats.ttest_rel([0.2, 0.5, 0.9, 0.1], [0.4, 0.5, 0.8, 0.6]).pvalue)
    assert task.difference.low < 0.15 < task.difference.high


def test_divergence_from_the_base_is_paired_by_document():
    made = outcomes(*(rows(arm, "t", [1, 0]) for arm in ("base", "near", "far")))
    near = np.random.default_rng(0).gamma(2.0, 0.1, 20)
    kept = {"base": np.zeros(20), "near": near, "far": near * 3}
    divergences = {arm: PerDocument(sums=sums, tokens=np.full(20, 4)) for arm, sums in kept.items()}
    result = compare(made, divergences=divergences, pairs=[("base", "near"), ("near", "far")])
    near_base, far_near = (c.divergence for c in result.contrasts)
    assert near_base == ratio_difference(np.zeros(20), near, np.full(20, 4), rng=np.random.default_rng(0))
    assert far_near.difference == pytest.approx(2 * near.sum() / 80)
    assert far_near.low > 0
    assert "divergence from the base +" in result.contrasts[0].verdict


@pytest.mark.parametrize("right", [[1] * 6, [0] * 6, [1], [0]])
def test_all_alike_and_a_single_item_are_defined(right, tmp_path):
    result = compare(pair_of(right, right))
    task = result.contrast("edit").tasks[0]
    assert task.unpaired.statistic is None
    assert task.unpaired.reason
    assert task.mcnemar.p_value == 1.0
    assert task.difference.low < 0 < task.difference.high
    assert task.smallest_detectable_gain is None
    assert "No evidence of benefit" in result.contrast("edit").verdict
    result.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == result


def test_arms_with_other_items_prompts_or_documents_are_refused():
    base, edit = rows("base", "t", [1, 0, 1]), rows("edit", "t", [1, 0, 1])
    losses = {arm: PerDocument(sums=np.ones(n), tokens=np.ones(n, int)) for arm, n in (("base", 3), ("edit", 2))}
    for refused, said in (
        (lambda: compare(pair_of([1, 0, 1], [1, 0])), r"only one of `base` and `edit` has 1 items \(2\)"),
        (lambda: compare(outcomes(base, rows("edit", "t", [1, 0, 1], prompt="q"))), "another prompt"),
        (lambda: compare(outcomes(rows("base", "u", [1, 0, 1]), edit)), "`edit` has 3 items"),
        (lambda: compare(outcomes(base), baseline="nobody"), "`nobody`"),
        (lambda: outcomes(base, base), "twice"),
        (lambda: outcomes(base[:0]), "no item"),
        (lambda: compare(outcomes(base, edit), losses=losses), "same documents"),
    ):
        with pytest.raises(EvaluationError, match=said):
            refused()


def test_accuracy_table():
    made = outcomes(rows("base", "t", [1, 0, 0, 0], extracted=[True, True, False, False]))
    columns = ["n", "correct", "accuracy", "extracted", "accuracy_extracted"]
    assert made.accuracy().loc[0, columns].tolist() == [4, 1, 0.25, 0.5, 0.5]


def test_only_results_of_0_and_1_have_an_exact_interval_and_tasks_without_a_metric_are_left_out():
    parts = [rows("base", "t", [1, 0, 1]), rows("base", "u", [0.5, 0.5, 1.0]).rename(columns={"exact_match": "f1"})]

    def shown(**metric):
        (points,) = outcomes(*parts).plot(**metric).to_dict()["datasets"].values()
        return {row["task"]: (row["low"], row["accuracy"], row["high"]) for row in points}

    assert shown()["t"] == pytest.approx((9.43, 66.67, 99.16), abs=0.01)
    assert shown()["u"] == pytest.approx((200 / 3,) * 3)
    assert list(shown(metric="f1")) == ["u"]


def test_files_that_are_not_ours_are_refused(tmp_path):
    (tmp_path / "x").write_text("{}")
    for kind, name in ((Comparison, "x"), (Outcomes, "x"), (Outcomes, "missing")):
        with pytest.raises(StethoscopeError):
            kind.load(tmp_path / name)


def scored(metric, base, edit, *, task="t", higher=None):
    """The outcomes of `base` and `edit` by one metric, whose direction the task tells if ``higher`` is not None."""
    made = outcomes(*(rows(arm, task, found) for arm, found in (("base", base), ("edit", edit))))
    told = {} if higher is None else {"higher_is_better": {task: {metric: higher}}}
    return Outcomes(frame=made.frame.rename(columns={"exact_match": metric}), provenance=told)


def test_a_metric_that_is_better_when_lower_turns_every_judgement(tmp_path):
    never, always = [0] * 60, [1] * 59 + [0]
    rise = compare(scored("pct_stereotype", never, always, higher=False))
    task = rise.contrast("edit").tasks[0]
    assert rise.verdict.startswith("`edit` is worse than `base`")
    assert (rise.contrast("edit").worsened, rise.contrast("edit").improved) == (["t"], [])
    assert task.verdict.startswith("`edit` is worse")
    assert "lower is better" in task.verdict
    assert (task.accuracy_a, task.accuracy_b) == (0, pytest.approx(59 / 60))
    assert (task.difference.difference, task.non_inferiority.shown) == (pytest.approx(-59 / 60), False)
    assert (task.mcnemar.b, task.mcnemar.c) == (59, 0)  # items that only the base got right
    cell = by_task(rise)["Target"][0].cells[1]
    assert (cell.value, cell.change, cell.stars, cell.kind) == ("98.3", "-98.3", "***", "worse")
    assert contrast_rows(rise.contrasts[0])[1][3:6] == ["0.0", "98.3", "-98.3"]
    assert rise.plot().to_dict()["datasets"]["arms"][0]["gain"] == pytest.approx(-100 * 59 / 60)
    fall = compare(scored("pct_stereotype", always, never, higher=False))
    assert fall.verdict.startswith("`edit` beats `base` by +98.3 points")
    assert fall.contrast("edit").not_degraded == ["t"]
    fall.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == fall


def test_a_direction_that_is_not_known_is_said():
    contrast = compare(scored("toxicity", [0] * 60, [1] * 60)).contrast("edit")
    assert "not known of `toxicity`" in contrast.verdict
    assert "if more is better" in contrast.tasks[0].verdict
    assert "not known" in contrast_rows(contrast)[1][1]
    known = compare(scored("acc", [0] * 60, [1] * 60)).contrast("edit")
    assert "known" not in known.verdict + known.tasks[0].verdict


@pytest.mark.parametrize(
    ("metric", "higher", "unit", "better"),
    [
        ("perplexity", False, "nats", True),  # of an item the harness gives the log-likelihood
        ("bits_per_byte", None, "bits per byte", False),
        ("likelihood_diff", False, "likelihood_diff", False),
        ("rouge_diff", True, "rouge_diff", True),
    ],
)
def test_points_are_for_shares_and_other_metrics_have_their_unit(metric, higher, unit, better):
    base = -np.linspace(10, 20, 40) if metric == "perplexity" else np.linspace(1, 2, 40)
    made = scored(metric, base, base + np.linspace(0.1, 0.3, 40), higher=higher)
    result = compare(made)
    contrast = result.contrast("edit")
    task = contrast.tasks[0]
    assert contrast.verdict.startswith("`edit` beats `base` by +0.2" if better else "`edit` is worse than `base`: -0.2")
    assert (contrast.improved, contrast.worsened) == ((["t"], []) if better else ([], ["t"]))
    header, row = contrast_rows(contrast)
    cells = dict(zip(header, row, strict=True))
    assert unit in cells["metric"]
    assert (cells["to"], cells["gain"]) == (f"{task.accuracy_b:.4g}", "+0.2" if better else "-0.2")
    assert by_task(result)["Target"][0].cells[1].kind == ("better" if better else "worse")
    told = [contrast.verdict, task.verdict, *header, *row, *result.table()[0], *made.table()[0]]
    assert not [text for text in told if "points" in text or (text.endswith(" %") and "interval" not in text)]
    assert result.plot().to_dict()["title"]["text"].endswith(f"in {unit}")
    assert made.plot().to_dict()
    # a margin of shares means nothing here; one in the metric's unit does
    assert (task.non_inferiority.margin, task.non_inferiority.shown) == (None, None)
    bound = compare(made, margins={"t": 1.0}).contrast("edit")
    assert bound.tasks[0].non_inferiority.shown is True
    assert "a loss of its margin or more is ruled out in every task" in bound.verdict
    assert f"a loss of 1 {unit}" in bound.tasks[0].verdict


def test_tasks_of_several_units_are_not_pooled_together():
    bits = np.linspace(1, 2, 30)
    shares = scored("acc", [0, 1] * 15, [1] * 30, higher=True)
    other = scored("bits_per_byte", bits, bits + np.linspace(0.1, 0.2, 30), task="u", higher=False)
    told = {"higher_is_better": shares.provenance["higher_is_better"] | other.provenance["higher_is_better"]}
    frame = pd.concat([shares.frame, other.frame], ignore_index=True)
    contrast = compare(Outcomes(frame=frame, provenance=told)).contrast("edit")
    assert (contrast.pooled.n, contrast.pooled.difference) == (30, 0.5)
    assert contrast.pooled_mcnemar == contrast.task("t").mcnemar
    assert contrast.verdict.startswith("Mixed")
    assert "over 1 task of 2" in contrast.verdict
    assert (contrast.improved, contrast.worsened) == (["t"], ["u"])
    result = compare(Outcomes(frame=frame, provenance=told))
    assert [line.name for line in by_task(result)["Target"]] == [
        "t",
        "u, bits per byte, lower is better",
        f"{WHOLE} in %",
    ]
    header, *body = accuracy_rows(result)
    assert header[3:5] == ["acc", "bits_per_byte, bits per byte, lower is better"]
    assert [row[3:5] for row in body] == [["50.0", "-"], ["100.0", "-"], ["-", "1.5"], ["-", "1.65"]]


def test_what_was_saved_before_metrics_had_scales_reads_as_shares(tmp_path):
    made = compare(pair_of([0, 1, 1], [1, 1, 1]))
    saved = made.to_dict()
    del saved["scales"]
    for contrast in saved["contrasts"]:
        del contrast["scale"]
        for task in contrast["tasks"]:
            del task["scale"]
            task["unpaired"]["share_a"] = 1 / 3
    (tmp_path / "c.json").write_text(json.dumps(saved))
    old = Comparison.load(tmp_path / "c.json")
    assert old.contrasts == made.contrasts
    assert by_task(old) == by_task(made)
