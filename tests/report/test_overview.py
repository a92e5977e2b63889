"""What a comparison comes to: use the edit or not, and six rows at most."""

from dataclasses import replace

import pandas as pd
import pytest
from made_results import make_comparison

from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.outcomes import Outcomes
from stethoscope.results.comparison_tables import WHOLE, accuracy_table, contrast_rows
from stethoscope.results.overview import MOST, headline, overview
from stethoscope.results.scale import Scale

ONE = {"algebra": 0.3}


def compared(**arms):
    return make_comparison(arms={"base": (0.0, 0.0), **arms}, subjects=ONE, items=400, pairs=None)


def of_shares(**tasks):
    """A comparison of base and edit by task: items, and how many of the first each answers."""
    rows = [
        {
            "arm": arm, "task": task, "item": i, "item_hash": f"{task}-{i}", "prompt_hash": "p",
            "exact_match": float(i < right), "extracted": True, "truncated": False,
            "generated_tokens": 9, "response": "", "answer": "", "target": "",
        }
        for task, (items, *both) in tasks.items()
        for arm, right in zip(("base", "recommended"), both, strict=True)
        for i in range(items)
    ]  # fmt: skip
    return compare(Outcomes(frame=pd.DataFrame(rows)))


def test_an_edit_that_gains_and_harms_nothing_is_recommended_with_its_share_of_the_fine_tunes_gain():
    said = headline(compared(tuned=(0.4, 0.8), recommended=(0.36, 0.0)))
    assert said.startswith("Use this edit: it gains +")
    assert "of the fine-tune's gain" in said


def test_an_edit_that_costs_something_is_recommended_only_with_its_cost():
    said = headline(compared(tuned=(0.4, 0.8), recommended=(0.36, 0.2)))
    assert said.startswith("Use this edit only if")
    assert "nats per token" in said


def test_without_evidence_of_a_gain_no_edit_is_recommended():
    assert "no evidence" in headline(compared(tuned=(0.4, 0.8), selected=(0.0, 0.0)))
    assert "worse" in headline(compared(selected=(-0.2, 0.0)))


def test_a_metric_that_is_better_when_lower_or_of_unknown_direction_is_no_gain():
    made = compared(recommended=(0.4, 0.0))
    for metric, higher in (("pct_stereotype", False), ("toxicity", None)):
        scale = Scale(higher_is_better=higher)
        made.scales["algebra"] = {"exact_match": scale}
        task = replace(made.contrasts[0].tasks[0], metric=metric, scale=scale)
        worse = replace(made.contrasts[0].pooled, difference=-0.4, low=-0.5, high=-0.3)
        changed = replace(made, contrasts=[replace(made.contrasts[0], tasks=[task], pooled=worse)])
        said = headline(changed)
        assert said.startswith("Judge this edit yourself" if higher is None else "Do not use this edit: it is worse")
        assert "not known" in overview(changed)[0][1] or "lower is better" in overview(changed)[0][1]


def test_a_share_is_given_only_of_a_gain_that_is_certain():
    rows = overview(compared(tuned=(0.0, 0.8), recommended=(0.2, 0.0)))
    assert "of the fine-tune's" not in rows[0]


def test_six_models_at_most_the_edit_first_and_the_fine_tune_last():
    arms = dict.fromkeys(("projected", "scaled", "random_layers_1", "random_layers_2", "selected", "mine"), (0.1, 0.0))
    rows = overview(compared(tuned=(0.4, 0.8), recommended=(0.3, 0.0), **arms))
    models = [row[0] for row in rows[1:]]
    assert models == ["base", "recommended", "selected", "random_layers_1", "scaled", "tuned"]
    assert len(models) == MOST
    assert [row[0] for row in overview(compared(mine=(0.1, 0.0)))[1:]] == ["base", "mine"]


def test_accuracy_is_over_items_as_the_gain_beside_it():
    made = of_shares(large=(1000, 500, 480), small=(30, 3, 30))
    head, base, edit = overview(made)
    assert [row[head.index("accuracy, %")] for row in (base, edit)] == ["48.8", "49.5"]
    assert [cell.strip() for cell in accuracy_table(made)[-1]] == [WHOLE, "48.8", "49.5"]


def test_a_gain_in_one_task_alone_is_no_reason_to_use_an_edit_and_none_not_to():
    made = of_shares(large=(1000, 500, 500), small=(200, 0, 14))
    weak = replace(made.contrasts[0], pooled_mcnemar=replace(made.contrasts[0].pooled_mcnemar, p_value=0.2))
    said = headline(replace(made, contrasts=[weak]))
    assert said.startswith("Judge this edit yourself: no evidence")
    assert "small" in said


@pytest.mark.parametrize(("text", "rise", "begins"), [
    ("loss", 0.009, "Use this edit: "), ("loss", 0.5, "Use this edit only"), ("target_loss", 0.5, "Use this edit only"),
])  # fmt: skip
def test_a_rise_of_a_loss_is_said_and_a_large_one_is_damage(text, rise, begins):
    made = compared(recommended=(0.3, 0.0))
    (contrast,) = made.contrasts
    loss = replace(contrast.loss, difference=rise, low=0.9 * rise, high=1.1 * rise)
    said = headline(replace(made, contrasts=[replace(contrast, **{text: loss})]))
    assert said.startswith(begins)
    assert f"{rise:.3f} nats per token" in said


def test_items_of_one_unit_alone_are_not_called_all():
    made = make_comparison(arms={"base": (0, 0), "recommended": (0.3, 0)}, subjects={"a": 0.3, "b": 0.3}, pairs=None)
    (contrast,) = made.contrasts
    bits = Scale(unit="bits per byte", higher_is_better=False)
    tasks = [replace(t, scale=bits) if t.task == "b" else t for t in contrast.tasks]
    made.scales["b"] = {"exact_match": bits}
    mixed = replace(made, contrasts=[replace(contrast, tasks=tasks)])
    names = [row[0] for row in (*accuracy_table(mixed), *contrast_rows(mixed.contrasts[0]))]
    assert WHOLE not in names
    assert f"{WHOLE} in %" in names


def test_zero_has_no_sign_of_a_loss_and_what_is_just_below_it_has():
    made = compared(recommended=(0.3, 0.0))
    (contrast,) = made.contrasts
    loss = replace(contrast.loss, difference=-0.0, low=-2e-4, high=0.003)
    shown = overview(replace(made, contrasts=[replace(contrast, loss=loss)]))[2]
    assert "+0.000 (-0.000 to +0.003)" in shown
