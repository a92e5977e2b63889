"""Tuned minus base: exact, in float32, and nothing passed over in silence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import save_pair

from stethoscope.checkpoints import task_vector as module
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.errors import CheckpointError

WEIGHTS = "model.safetensors"
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return save_pair("llama tied", tmp_path)


def change_of(pair: tuple[Path, Path]) -> TaskVector:
    return open_task_vector(open_checkpoint(pair[0]), pair[1])


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_difference_energy_and_tuned(pair):
    change = change_of(pair)
    base, tuned = load_file(pair[0] / WEIGHTS), load_file(pair[1] / WEIGHTS)
    for name in change.names:
        stored = change.base.entries[name].stored
        delta = tuned[stored].float() - base[stored].float()
        assert torch.equal(change.delta(name), delta)
        assert torch.equal(change.edited(name, 1.0), tuned[stored])
        assert change.energy(name) == pytest.approx(float(delta.double().square().sum()))
    by_layer = change.energy_by_layer()
    expected = sum(change.energy(name) for name in change.names if change.base.entries[name].layer == 2)
    assert by_layer[2] == pytest.approx(expected)


@pytest.mark.parametrize("elements", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("coefficient", [1.0, 0.7, -2.0, 1e-3])
def test_chunks_leave_no_trace(elements, coefficient, pair, monkeypatch):
    whole = change_of(pair).edited(UP, coefficient)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    assert torch.equal(change_of(pair).edited(UP, coefficient), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_another_dtype_is_cast_once(dtype, pair):
    rewrite(pair[1], lambda w: w.update({name: tensor.to(dtype) * 1.001 for name, tensor in w.items()}))
    change = change_of(pair)
    tuned = load_file(pair[1] / WEIGHTS)["model." + UP]
    assert torch.equal(change.edited(UP, 1.0), tuned.bfloat16())
    assert change.raw(UP) is None


def test_values_that_the_base_dtype_cannot_hold(pair):
    rewrite(pair[0], lambda w: w.update({name: tensor.half() for name, tensor in w.items()}))
    rewrite(pair[1], lambda w: w.update({name: tensor.float() + 1e6 for name, tensor in w.items()}))
    with pytest.raises(CheckpointError, match="cannot hold"):
        change_of(pair).edited(UP, 1.0)
    with pytest.raises(CheckpointError, match="leaves the range"):
        change_of(pair).edited(UP, 0.9)


@pytest.mark.parametrize(("side", "value"), [(0, float("nan")), (1, float("inf")), (1, -float("inf"))])
def test_not_finite_is_named(side, value, pair):
    rewrite(pair[side], lambda w: w["model." + UP].__setitem__((3, 3), value))
    change = change_of(pair)
    with pytest.raises(CheckpointError, match=rf"{UP}.*{('base', 'tuned')[side]}.*NaN or infinity"):
        change.delta(UP)
    change.delta("layers.0.mlp.up_proj.weight")


def test_every_misfit_at_once(pair):
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
        weights["model.layers.0.extra.weight"] = torch.zeros(3)
        del weights["model.norm.weight"]

    rewrite(pair[1], damage)
    with pytest.raises(CheckpointError) as caught:
        change_of(pair)
    assert len(caught.value.problems) == 3
    assert all(word in str(caught.value) for word in ("norm", "extra", "[3, 3]"))


def reconfigure(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def test_heads_that_shapes_do_not_show(pair):
    reconfigure(pair[1], '"num_attention_heads": 2', '"num_attention_heads": 4')
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        change_of(pair)


def test_an_untied_fine_tune_of_a_tied_base_is_refused(pair):
    head = torch.ones(48, 16, dtype=torch.bfloat16)
    rewrite(pair[1], lambda w: w.update({"lm_head.weight": head}))
    reconfigure(pair[1], '"tie_word_embeddings": true', '"tie_word_embeddings": false')
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*is missing in `base`"):
        change_of(pair)


def test_integers_have_no_difference_but_can_be_copied(pair):
    for folder in pair:
        rewrite(folder, lambda w: w.update({"model." + UP: torch.ones(32, 16, dtype=torch.int8)}))
    change = change_of(pair)
    assert change.edited(UP, 1.0).dtype == torch.int8
    with pytest.raises(CheckpointError, match="I8"):
        change.delta(UP)
