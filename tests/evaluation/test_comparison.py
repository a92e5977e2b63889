"""`compare` on made outcomes whose answer is known, and what it refuses."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from stethoscope.errors import EvaluationError, StethoscopeError
from stethoscope.evaluation.comparison import aa_floor, compare
from stethoscope.evaluation.inference import ratio_difference
from stethoscope.evaluation.outcomes import Outcomes, PerDocument
from stethoscope.results.comparison import Comparison
from stethoscope.results.comparison_tables import accuracy_rows, contrast_rows, gain_rows, noise


def rows(arm, task, right, *, extracted=None, truncated=None, prompt="p"):
    n = len(right)
    return pd.DataFrame(
        {
            "arm": arm,
            "task": task,
            "item": range(n),
            "item_hash": [f"{task}{i}" for i in range(n)],
            "prompt_hash": [f"{prompt}{i}" for i in range(n)],
            "exact_match": np.asarray(right, dtype=float),
            "extracted": pd.array([True] * n if extracted is None else extracted, dtype="boolean"),
            "truncated": pd.array([False] * n if truncated is None else truncated, dtype="boolean"),
            "generated_tokens": pd.array([9] * n, dtype="Int64"),
            "response": "r",
            "answer": "a",
            "target": "t",
        }
    )


def outcomes(*parts):
    return Outcomes(frame=pd.concat(parts, ignore_index=True))


@pytest.fixture
def planted():
    """`good` gains on algebra, `null` equals base up to noise, `bad` loses; the control task suffers under `good`."""
    rng = np.random.default_rng(0)
    base = rng.random(300) < 0.3
    noise = rng.random(300) < 0.02
    flip = rng.random(300) < 0.2
    parts = []
    for task in ("algebra", "geometry"):
        parts += [
            rows("base", task, base),
            rows("good", task, base | flip),
            rows("null", task, base ^ noise),
            rows("bad", task, base & ~flip),
        ]
    for arm in ("base", "good", "null", "bad"):
        parts.append(rows(arm, "spelling", ~base & ~flip if arm == "good" else ~base))
    return outcomes(*parts)


def test_verdicts_say_what_was_planted(planted, tmp_path):
    losses = {arm: PerDocument(sums=np.arange(9.0) + (arm == "good"), tokens=np.full(9, 2)) for arm in planted.arms}
    result = compare(planted, family=["algebra", "geometry"], losses=losses)
    good, null, bad = (result.contrast(arm) for arm in ("good", "null", "bad"))
    assert good.improved == ["algebra", "geometry"]
    assert good.worsened == ["spelling"]
    assert good.verdict.startswith("Mixed")
    assert good.loss.difference == pytest.approx(0.5)
    assert null.verdict.startswith("No evidence of benefit")
    assert bad.verdict.startswith("`bad` is worse than `base`")
    assert result.controls == ["spelling"]
    assert good.tasks[0].p_adjusted >= good.tasks[0].mcnemar.p_value
    assert good.pooled.low < good.pooled.difference < good.pooled.high
    assert good.pooled_mcnemar.c == sum(t.mcnemar.c for t in good.tasks if t.in_family)
    frame = result.to_frame()
    assert len(frame) == 3 * 4
    result.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == result


def test_default_pairs_reach_tuned_and_random_arms():
    arms = ("base", "tuned", "selected", "random_1", "random_2")
    result = compare(outcomes(*(rows(arm, "t", [1, 0, 1]) for arm in arms)))
    pairs = {(c.a, c.b) for c in result.contrasts}
    assert {("base", arm) for arm in arms[1:]} <= pairs
    assert {("tuned", "selected"), ("random_1", "selected"), ("random_2", "selected")} <= pairs


def test_flips_tell_format_from_mathematics():
    base = rows(
        "base", "t", [0, 0, 0, 1, 1], extracted=[False, False, True, True, True], truncated=[True, *[False] * 4]
    )
    edit = rows("edit", "t", [1, 1, 1, 0, 1], extracted=[True, True, True, False, True])
    result = compare(outcomes(base, edit))
    flips = result.contrast("edit").tasks[0].flips
    assert flips.gained == {"format": 1, "truncation": 1, "correctness": 1}
    assert flips.lost == {"format": 1, "truncation": 0, "correctness": 0}
    gains = result.gains()
    assert gains[["cause", "gained", "lost", "net"]].to_numpy().tolist() == [
        ["format", 1, 1, 0],
        ["truncation", 1, 0, 1],
        ["correctness", 1, 0, 1],
    ]
    assert gains["points"].sum() == pytest.approx(100 * result.contrast("edit").tasks[0].difference.difference)
    assert gain_rows(result.contrast("edit"))[1] == ["t", "+1 -1", "+1 -0", "+1 -0", "+2", "+40.0"]


def test_truncation_that_is_not_recorded_is_left_out_with_a_reason(tmp_path):
    base = rows("base", "t", [0, 0, 1], extracted=[False, True, True], truncated=[None] * 3)
    result = compare(outcomes(base, rows("edit", "t", [1, 1, 0])))
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
    assert compare(outcomes(rows("base", "t", right), rows("edit", "t", right))).noise == []


def test_margins_metrics_and_a_verdict_for_each_task():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.4
    parts = [rows(arm, task, right if arm == "base" or task == "u" else right | (rng.random(400) < 0.2))
             for arm in ("base", "edit") for task in ("t", "u")]  # fmt: skip
    made = outcomes(*parts)
    made.frame["math_verify"] = made.frame["exact_match"].where(made.frame["arm"] == "base", 1.0)
    result = compare(made, margins={"u": 0.001})
    t, u = result.contrast("edit").tasks
    assert (t.metric, t.non_inferiority.margin, u.non_inferiority.margin) == ("exact_match", 0.02, 0.001)
    assert t.verdict.startswith("`edit` is better than `base`")
    assert t.verdict.endswith("a loss of 2 points or more is ruled out.")
    assert u.verdict.startswith("no evidence that `edit` and `base` differ")
    assert u.verdict.endswith("a loss of 0.1 points or more is not ruled out.")
    assert "a loss of its margin or more is ruled out in 1 of 2 tasks" in result.contrast("edit").verdict
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
    made = outcomes(rows("base", "t", [0.2, 0.5, 0.9, 0.1]), rows("edit", "t", [0.4, 0.5, 0.8, 0.6]))
    task = compare(made).contrast("edit").tasks[0]
    assert (task.mcnemar, task.unpaired, task.smallest_detectable_gain, task.flips) == (None, None, None, None)
    assert set(task.reasons) == {"unpaired", "mcnemar", "p_adjusted", "smallest_detectable_gain", "flips"}
    assert task.difference.low < 0.15 < task.difference.high


def test_divergence_from_the_base_is_paired_by_document():
    made = outcomes(*(rows(arm, "t", [1, 0]) for arm in ("base", "near", "far")))
    tokens = np.full(20, 4)
    rng = np.random.default_rng(0)
    near = rng.gamma(2.0, 0.1, 20)
    kept = {"base": np.zeros(20), "near": near, "far": near * 3}
    divergences = {arm: PerDocument(sums=sums, tokens=tokens) for arm, sums in kept.items()}
    result = compare(made, divergences=divergences, pairs=[("base", "near"), ("near", "far")])
    near_base, far_near = (c.divergence for c in result.contrasts)
    assert near_base == ratio_difference(np.zeros(20), near, tokens, rng=np.random.default_rng(0))
    assert far_near.difference == pytest.approx(2 * near.sum() / 80)
    assert far_near.low > 0
    assert "divergence from the base +" in result.contrasts[0].verdict


@pytest.mark.parametrize("right", [[1] * 6, [0] * 6, [1], [0]])
def test_all_alike_and_a_single_item_are_defined(right, tmp_path):
    result = compare(outcomes(rows("base", "t", right), rows("edit", "t", right)))
    task = result.contrast("edit").tasks[0]
    assert task.unpaired.statistic is None
    assert task.unpaired.reason
    assert task.mcnemar.p_value == 1.0
    assert task.difference.low < 0 < task.difference.high
    assert task.smallest_detectable_gain is None
    assert "No evidence of benefit" in result.contrast("edit").verdict
    result.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == result


def test_arms_with_other_items_or_prompts_are_refused():
    base = rows("base", "t", [1, 0, 1])
    with pytest.raises(EvaluationError, match=r"only one of `base` and `edit` has 1 items \(2\)"):
        compare(outcomes(base, rows("edit", "t", [1, 0])))
    with pytest.raises(EvaluationError, match="another prompt"):
        compare(outcomes(base, rows("edit", "t", [1, 0, 1], prompt="q")))
    with pytest.raises(EvaluationError, match="`edit` has 3 items"):
        compare(outcomes(base, rows("base", "u", [1, 0, 1]), rows("edit", "t", [1, 0, 1])))
    with pytest.raises(EvaluationError, match="`nobody`"):
        compare(outcomes(base), baseline="nobody")
    with pytest.raises(EvaluationError, match="twice"):
        outcomes(base, base)


def test_losses_of_other_documents_are_refused():
    made = outcomes(rows("base", "t", [1, 0]), rows("edit", "t", [1, 0]))
    losses = {
        "base": PerDocument(sums=np.ones(3), tokens=np.ones(3, int)),
        "edit": PerDocument(sums=np.ones(2), tokens=np.ones(2, int)),
    }
    with pytest.raises(EvaluationError, match="same documents"):
        compare(made, losses=losses)


def test_accuracy_table():
    made = outcomes(rows("base", "t", [1, 0, 0, 0], extracted=[True, True, False, False]))
    row = made.accuracy().iloc[0]
    assert (row["n"], row["correct"], row["accuracy"], row["extracted"], row["accuracy_extracted"]) == (
        4,
        1,
        0.25,
        0.5,
        0.5,
    )


def test_files_that_are_not_ours_are_refused(tmp_path):
    (tmp_path / "x").write_text("{}")
    with pytest.raises(StethoscopeError):
        Comparison.load(tmp_path / "x")
    with pytest.raises(EvaluationError):
        Outcomes.load(tmp_path / "x")
    with pytest.raises(EvaluationError):
        Outcomes.load(tmp_path / "missing")
