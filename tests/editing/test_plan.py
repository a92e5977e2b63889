"""Plans are data: what they say about a tensor, and that they survive JSON."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import Kept

from stethoscope.editing.plan import EditPlan
from stethoscope.errors import CheckpointError

OUTSIDE = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "vision_tower.x.weight", "score.weight")
INSIDE = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


@pytest.mark.parametrize(
    ("plan", "layers", "outside"),
    [
        (EditPlan.for_layers([3, 4], coefficient=0.5), {2: (0, 0, 0), 3: (0.5, 0.5, 0.5)}, (0, 0, 0, 0, 0)),
        (EditPlan.for_layers({1: 0.5, 7: -1.0}, modules="mlp"), {1: (0, 0.5, 0), 7: (0, -1, 0)}, (0, 0, 0, 0, 0)),
        (EditPlan(layers={0: {"attention": 1.0, "mlp": 0.25}}), {0: (1, 0.25, 0)}, (0, 0, 0, 0, 0)),
        (
            EditPlan(layers={}, outside={"embedding": 0.5, "head": 0.5, "norm": 0.5}),
            {0: (0, 0, 0)},
            (0.5, 0.5, 0.5, 0, 0),
        ),
        (EditPlan.everything(), {0: (1, 1, 1)}, (1, 1, 1, 1, 1)),
    ],
)
def test_what_a_plan_says_about_a_tensor(plan, layers, outside):
    assert tuple(plan.coefficient(name) for name in OUTSIDE) == outside
    for layer, expected in layers.items():
        assert tuple(plan.coefficient(f"layers.{layer}.{name}") for name in INSIDE) == expected
        assert plan.coefficient(f"language_model.model.layers.{layer}.{INSIDE[1]}") == expected[1]
    assert plan.coefficient("h.0.attn.bias") == 0  # a constant, not a weight


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EditPlan.for_layers([-1]), None),
        (lambda: EditPlan.for_layers([True]), None),
        (lambda: EditPlan.for_layers([0], coefficient=float("nan")), None),
        (lambda: EditPlan(default=float("inf")), None),
        (lambda: EditPlan.for_layers({3: 1.0}, coefficient=0.5), "coefficients of their own"),
        (lambda: EditPlan.from_json(EditPlan.for_layers([1], transform=Kept()).to_json()), "another transform"),
        (lambda: EditPlan.from_json({}), "schema"),
    ],
)
def test_nonsense_is_refused(make, said):
    with pytest.raises(CheckpointError, match=said):
        make()


@given(
    layers=st.dictionaries(st.integers(0, 40), st.floats(-2, 2), max_size=5),
    modules=st.sampled_from(["all", "attention", "mlp"]),
    outside=st.dictionaries(st.sampled_from(["embedding", "head", "norm"]), st.floats(-2, 2)),
    transform=st.sampled_from([None, Kept()]),
)
def test_json_and_back(layers, modules, outside, transform):
    plan = replace(EditPlan.for_layers(layers, modules=modules, transform=transform), outside=outside)
    assert EditPlan.from_json(plan.to_json(), transform=transform) == plan
    assert plan.selected_layers == tuple(sorted(layer for layer, value in layers.items() if value))
