"""Selections choose the best believable layers and say why."""

import pytest

from stethoscope.artifacts import Provenance
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import Select
from stethoscope.results.diagnosis import CorpusSummary, Diagnosis, LayerDiagnosis, SAEHealth
from stethoscope.selection.policies import select

FLAG = "SAE variance explained 0.31 on target text"


def diagnosis(excesses: list[float], flagged: tuple[int, ...] = ()) -> Diagnosis:
    healthy = SAEHealth(tokens=100, variance_explained=0.9, l0=10.0, dead=0.0, dense=0.0)
    both = ("target", "control")
    order = sorted(excesses, reverse=True)
    layers = (
        LayerDiagnosis(
            layer=i, score=e + 0.1, null=0.1, excess=e, interval=(e - 0.1, e + 0.1), z=10 * e, p=0.01,
            p_familywise=0.02 if e >= 0.3 else 0.6, rank=order.index(e) + 1, stability=0.97, increment=e,
            increment_z=e, against="control", health=dict.fromkeys(both, healthy),
            flag=FLAG if i in flagged else None, features=(),
        )
        for i, e in enumerate(excesses)
    )  # fmt: skip
    summary = CorpusSummary(documents=8, blocks=4, tokens=100, sinks=0)
    made = {"score": "mass_shift", "increments": False, "corpora": dict.fromkeys(both, summary), "warnings": ()}
    return Diagnosis(provenance=Provenance(), layers=tuple(layers), **made)


def choose(*args, **options):
    return select(diagnosis(*args), Select(**options))


def test_top_k_takes_the_largest_and_explains_every_layer():
    made = choose([0.1, 0.5, 0.2, 0.4], k=2)
    assert made.layers == (1, 3)
    assert not made.warnings
    assert [choice.reason for choice in made.choices] == [
        "left out: excess 0.100, z 1.0, p 0.600, rank 4 of 4",
        "chosen: excess 0.500, z 5.0, p 0.020, rank 1 or better in 97 % of resamples",
        "left out: excess 0.200, z 2.0, p 0.600, rank 3 of 4",
        "chosen: excess 0.400, z 4.0, p 0.020, rank 2 or better in 97 % of resamples",
    ]
    assert choose([0.3, 0.3, 0.3], k=2).layers == (0, 1)  # ties break toward the lower layer


def test_a_policy_that_takes_a_calibration_says_so():
    with pytest.raises(StethoscopeError, match="`calibrated`"):
        choose([0.1, 0.5], policy="calibrated")


def test_layers_whose_rank_is_chance_are_warned_of():
    steady = diagnosis([0.1, 0.5, 0.2, 0.4])
    shaky = [layer.model_copy(update={"stability": 0.49 if layer.layer != 1 else 0.5}) for layer in steady.layers]
    (warning,) = select(steady.model_copy(update={"layers": tuple(shaky)}), Select(k=2)).warnings
    assert "leave these layers their rank: 3;" in warning


@pytest.mark.parametrize("options", [{"k": 2}, {"policy": "spread", "k": 2}, {"policy": "gap"}])
def test_a_choice_of_layers_that_are_all_chance_says_so_in_its_verdict(options):
    made = choose([0.1, 0.05, 0.2, 0.15], **options)
    assert made.verdict.endswith("none of them stands out from chance.")
    assert any("stands out from chance" in warning for warning in made.warnings)
    assert "chance" not in choose([0.1, 0.5, 0.2, 0.15], **options).verdict


def test_a_flagged_layer_is_left_out_unless_the_user_insists():
    made = choose([0.1, 0.9, 0.2], (1,), k=1)
    assert made.layers == (2,)
    assert made.choices[1].reason == f"left out: {FLAG}"
    assert choose([0.1, 0.9, 0.2], (1,), k=1, include_flagged=True).layers == (1,)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"policy": "threshold", "z": 2.0}, (1, 2, 3)),
        ({"policy": "threshold"}, (1, 3)),
        ({"policy": "significant"}, (1, 3)),
        ({"policy": "budget", "share": 0.5}, (1, 3)),
        ({"policy": "budget", "share": 0.75}, (1, 3)),  # 0.9 of 1.2, met exactly
        ({"policy": "budget", "share": 1.0}, (0, 1, 2, 3)),
        ({"policy": "gap"}, (0, 1, 2, 3)),
        ({"policy": "spread", "k": 1}, (1,)),
        ({"policy": "spread", "k": 2}, (1, 3)),
        ({"policy": "spread", "k": 3}, (1, 3, 4)),  # runs of two, two and one
        ({"policy": "spread", "k": 5}, (0, 1, 2, 3, 4)),
    ],
)
def test_policies_by_hand(options, layers):
    assert choose([0.1, 0.5, 0.2, 0.4, -0.2], **options).layers == layers


def test_too_few_layers_or_none_is_an_error_that_says_why():
    with pytest.raises(StethoscopeError, match="only 2 are not excluded") as error:
        choose([0.1, 0.9, 0.2], (1,), k=3)
    assert f"layer 1: {FLAG}" in str(error.value)
    with pytest.raises(StethoscopeError, match=r"chooses no layer: the best, layer 1, has excess 0\.200"):
        choose([0.1, 0.2], policy="significant")
    for policy in ("top_k", "spread"):
        with pytest.raises(ValueError, match=f"`{policy}` needs `k`"):
            Select(policy=policy)


def test_spread_divides_the_layers_that_are_not_excluded_and_says_who_was_ahead():
    found = select(diagnosis([0.9, 0.1, 0.5, 0.4, 0.3, 0.2], (0, 1)), Select(policy="spread", k=2))
    assert found.layers == (2, 4)
    assert found.choices[2].reason.endswith(", the best of its depth segment")
    assert found.choices[3].reason.endswith("rank 2 of 4, behind layer 2 of its depth segment")
    assert not found.warnings
