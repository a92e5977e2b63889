"""Plans are data: what they say about a tensor, and that they survive JSON."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stethoscope.editing.plan import EditPlan
from stethoscope.errors import CheckpointError

ATTENTION, MLP, NORM = "self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"


class Halved:
    def apply(self, name: str, delta: Tensor) -> Tensor:
        return delta / 2

    def describe(self) -> dict[str, Any]:
        return {"kind": "halved"}


def test_whole_layers_and_nothing_else() -> None:
    plan = EditPlan.for_layers([3, 4], coefficient=0.5)
    assert [plan.coefficient(f"layers.3.{name}") for name in (ATTENTION, MLP, NORM)] == [0.5] * 3
    assert [plan.coefficient(name) for name in (f"layers.2.{MLP}", "embed_tokens.weight", "norm.weight")] == [0, 0, 0]
    assert [plan.coefficient(name) for name in ("lm_head.weight", "vision_tower.x.weight", "score.weight")] == [0, 0, 0]
    assert plan.coefficient(f"language_model.model.layers.4.{MLP}") == 0.5
    assert plan.selected_layers == (3, 4)


def test_modules_lists_and_negative_coefficients() -> None:
    plan = EditPlan.for_layers({1: 0.5, 7: -1.0}, modules="mlp")
    assert plan.coefficient(f"layers.7.{MLP}") == -1
    assert plan.coefficient(f"layers.7.{ATTENTION}") == 0
    assert plan.coefficient(f"layers.7.{NORM}") == 0
    mixed = EditPlan(layers={0: {"attention": 1.0, "mlp": 0.25}})
    assert (mixed.coefficient(f"layers.0.{ATTENTION}"), mixed.coefficient(f"layers.0.{MLP}")) == (1, 0.25)


def test_what_is_outside_the_layers_has_to_be_asked_for() -> None:
    plan = EditPlan(layers={}, outside={"embedding": 0.5, "head": 0.5, "norm": 0.5})
    assert [plan.coefficient(n) for n in ("embed_tokens.weight", "lm_head.weight", "norm.weight")] == [0.5] * 3
    assert plan.coefficient("vision_tower.x.weight") == 0
    everything = EditPlan.everything()
    assert [everything.coefficient(n) for n in ("embed_tokens.weight", "vision_tower.x.weight", "other")] == [1] * 3
    assert everything.coefficient("h.0.attn.bias") == 0  # a constant, not a weight


@pytest.mark.parametrize(
    "make",
    [
        lambda: EditPlan.for_layers([-1]),
        lambda: EditPlan.for_layers([True]),
        lambda: EditPlan.for_layers([0], coefficient=float("nan")),
        lambda: EditPlan(default=float("inf")),
    ],
)
def test_nonsense_is_refused(make: Any) -> None:
    with pytest.raises(CheckpointError):
        make()


@given(
    layers=st.dictionaries(st.integers(0, 40), st.floats(-2, 2), max_size=5),
    modules=st.sampled_from(["all", "attention", "mlp"]),
    outside=st.dictionaries(st.sampled_from(["embedding", "head", "norm"]), st.floats(-2, 2)),
)
def test_json_and_back(layers: dict[int, float], modules: Any, outside: dict[Any, float]) -> None:
    plan = replace(EditPlan.for_layers(layers, modules=modules), outside=outside)
    assert EditPlan.from_json(plan.to_json()) == plan


def test_a_transform_must_be_the_one_described() -> None:
    plan = EditPlan.for_layers([1], transform=Halved())
    assert EditPlan.from_json(plan.to_json(), transform=plan.transform) == plan
    with pytest.raises(CheckpointError, match="another transform"):
        EditPlan.from_json(plan.to_json())
    with pytest.raises(CheckpointError, match="schema"):
        EditPlan.from_json({})


def test_a_coefficient_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(CheckpointError, match="coefficients of their own"):
        EditPlan.for_layers({3: 1.0}, coefficient=0.5)
