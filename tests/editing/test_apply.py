"""Live edits: a pointer put in and taken out, whatever happens in between."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from world import make

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied, prepare
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError

UP = "layers.{}.mlp.up_proj.weight"


@pytest.fixture
def model(pair):
    """A live model that must be as it was when a test ends: the same values in the same memory."""
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval().requires_grad_(False)
    model.pointers = pointers(model)
    before = {name: p.clone() for name, p in model.named_parameters(remove_duplicate=False)}
    yield model
    assert pointers(model) == model.pointers
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, before[name])


def pointers(model):
    return {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}


def test_untouched_tensors_keep_their_memory(model, change):
    with applied(model, change, EditPlan.for_layers([1])):
        for name, pointer in pointers(model).items():
            assert (pointer != model.pointers[name]) == (".layers.1." in name)


def test_an_exception_and_a_write_inside_change_nothing(model, change):
    def fail() -> None:
        with applied(model, change, EditPlan.for_layers([0, 2], coefficient=-0.5)):
            model.model.layers[0].mlp.up_proj.weight.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()


def test_edits_nest(model, change):
    with applied(model, change, EditPlan.for_layers([0])):
        with applied(model, change, EditPlan.for_layers([0, 1], coefficient=0.5)):
            pass
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, change.edited(UP.format(0), 1.0))


def test_prepared_once_entered_often(model, change, monkeypatch):
    swap = prepare(model, change, EditPlan.for_layers([2]))
    monkeypatch.setattr(type(change.base), "read_into", lambda *_: pytest.fail("read again"))
    inside = set()
    for _ in range(3):
        with swap.entered() as edited:
            inside.add(edited.get_parameter("model." + UP.format(2)).data_ptr())
        assert pointers(model) == model.pointers
    assert len(inside) == 1


def test_a_model_in_another_dtype(pair, change):
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    with applied(model, change, EditPlan.for_layers([1])):
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, change.edited(UP.format(1), 1.0).float())


def test_an_adapter_of_one_projection_of_the_experts(tmp_path):
    """Transformers runs them as one tensor with others, which the adapter leaves alone."""
    make("qwen3 moe", dtype=torch.float32).save_pretrained(tmp_path / "base")
    experts = [f"base_model.model.model.layers.1.mlp.experts.{n}.gate_proj" for n in range(3)]
    shapes = {"lora_A": (2, 16), "lora_B": (8, 2)}
    weights = {f"{name}.{part}.weight": torch.randn(shape) for name in experts for part, shape in shapes.items()}
    (tmp_path / "adapter").mkdir()
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["gate_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    base, ids = open_checkpoint(tmp_path / "base"), torch.arange(3, 30)[None]
    change, plan = open_task_vector(base, tmp_path / "adapter"), EditPlan.for_layers([1])
    edited = AutoModelForCausalLM.from_pretrained(write_edit(base, change, plan, tmp_path / "edited").path)
    with applied(AutoModelForCausalLM.from_pretrained(base.path), change, plan) as live:
        assert torch.equal(live(ids).logits, edited(ids).logits)


def test_a_model_that_does_not_fit(change):
    with pytest.raises(CheckpointError, match="does not fit the live model") as caught:
        prepare(make("gpt2"), change, EditPlan.for_layers([1]))
    assert len(caught.value.problems) == 9
