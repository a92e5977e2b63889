"""`compare` on made outcomes whose answer is known, and what it refuses."""

import numpy as np
import pandas as pd
import pytest

from stethoscope.errors import EvaluationError
from stethoscope.evaluation import Comparison, DocumentLosses, Outcomes, compare


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
    losses = {arm: DocumentLosses(sums=np.arange(9.0) + (arm == "good"), tokens=np.full(9, 2)) for arm in planted.arms}
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
    flips = compare(outcomes(base, edit)).contrast("edit").tasks[0].flips
    assert flips.gained == {"format": 1, "truncation": 1, "correctness": 1}
    assert flips.lost == {"format": 1, "truncation": 0, "correctness": 0}


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
        "base": DocumentLosses(sums=np.ones(3), tokens=np.ones(3, int)),
        "edit": DocumentLosses(sums=np.ones(2), tokens=np.ones(2, int)),
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
    with pytest.raises(EvaluationError):
        Comparison.load(tmp_path / "x")
    with pytest.raises(EvaluationError):
        Outcomes.load(tmp_path / "x")
    with pytest.raises(EvaluationError):
        Outcomes.load(tmp_path / "missing")
