"""What a comparison comes to: use the edit or not, and six rows at most."""

from dataclasses import replace

from made_results import make_comparison

from stethoscope.results.overview import MOST, headline, overview
from stethoscope.results.scale import Scale

ONE = {"algebra": 0.3}


def compared(**arms):
    return make_comparison(arms={"base": (0.0, 0.0), **arms}, subjects=ONE, items=400, pairs=None)


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
