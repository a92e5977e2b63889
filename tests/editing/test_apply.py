"""Live edits: a pointer put in and taken out, whatever happens in between."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LAYOUTS, make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import applied, prepare
from stethoscope.editing.plan import EditPlan
from stethoscope.errors import CheckpointError


@pytest.fixture
def model(pair: tuple[Path, Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pair[0]).eval().requires_grad_(False)


def state(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)}


def assert_restored(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        pointer, values = before[name]
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)


def test_untouched_tensors_keep_their_memory(model: PreTrainedModel, change: TaskVector) -> None:
    before = state(model)
    with applied(model, change, EditPlan.for_layers([1])):
        for name, parameter in model.named_parameters():
            assert (parameter.data_ptr() != before[name][0]) == (".layers.1." in name)
    assert_restored(model, before)


def test_an_exception_and_a_write_inside_change_nothing(model: PreTrainedModel, change: TaskVector) -> None:
    before = state(model)

    def fail() -> None:
        with applied(model, change, EditPlan.for_layers([0, 2], coefficient=-0.5)):
            model.model.layers[0].mlp.up_proj.weight.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert_restored(model, before)


def test_edits_nest(model: PreTrainedModel, change: TaskVector) -> None:
    before = state(model)
    with applied(model, change, EditPlan.for_layers([0])):
        with applied(model, change, EditPlan.for_layers([0, 1], coefficient=0.5)):
            pass
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, change.tuned("layers.0.mlp.up_proj.weight"))
    assert_restored(model, before)


def test_prepared_once_entered_often(
    model: PreTrainedModel, change: TaskVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(model)
    swap = prepare(model, change, EditPlan.for_layers([2]))
    monkeypatch.setattr(type(change.base), "read_into", lambda *_: pytest.fail("read again"))
    pointers = set()
    for _ in range(3):
        with swap.entered() as edited:
            pointers.add(edited.get_parameter("model.layers.2.mlp.up_proj.weight").data_ptr())
        assert_restored(model, before)
    assert len(pointers) == 1


def test_a_model_in_another_dtype(pair: tuple[Path, Path], change: TaskVector) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    with applied(model, change, EditPlan.for_layers([1])):
        weight = model.model.layers[1].mlp.up_proj.weight
        assert torch.equal(weight, change.tuned("layers.1.mlp.up_proj.weight").float())


def test_a_model_that_does_not_fit(change: TaskVector) -> None:
    other = make(LAYOUTS["gpt2"])
    with pytest.raises(CheckpointError, match="does not fit the live model") as caught:
        prepare(other, change, EditPlan.for_layers([1]))
    assert len(caught.value.problems) == 9


class Kept:
    """Keeps the change of attention as it is, halves the rest."""

    def apply(self, name: str, delta: Tensor) -> Tensor:
        return delta if ".self_attn." in name else delta / 2

    def describe(self) -> dict[str, Any]:
        return {"kind": "kept"}


def test_a_transform_may_leave_a_tensor_exact(model: PreTrainedModel, change: TaskVector) -> None:
    plan = EditPlan.for_layers([1], transform=Kept())
    q, up = "layers.1.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"
    with applied(model, change, plan):
        assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, change.tuned(q))
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, change.edited(up, 0.5))
