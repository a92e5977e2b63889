"""Devices by name: what is not here is said, and a GPU is taken only where PyTorch sees one."""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from stethoscope.errors import RecipeError, StethoscopeError
from stethoscope.models.load import find_device, room_beside
from stethoscope.recipe import Recipe
from stethoscope.saes.activations import on_device


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_device_is_one_that_is_there(monkeypatch):
    gpus(monkeypatch, 0)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(StethoscopeError, match=r"no device `cuda` here: PyTorch sees no GPU"):
        find_device("cuda")
    gpus(monkeypatch, 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(StethoscopeError, match=r"`cuda:2` here: PyTorch sees 2 GPUs"):
        find_device("cuda:2")
    for name in ("gpu", "cuda:", "CPU", "cuda:1 "):
        with pytest.raises(StethoscopeError, match="is not a device"):
            find_device(name)


def test_a_recipe_names_a_device(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "{base: a/b, tuned: a/c, saes: a/d, target: {dataset: t.jsonl}, control: {dataset: c.jsonl}, select: {k: 1},"
        " evaluate: {tasks: [x]}, device: gpu}"
    )
    with pytest.raises(RecipeError, match="device"):
        Recipe.from_yaml(path)
    mistaken = path.read_text()
    path.write_text(mistaken.replace(", device: gpu", ""))
    assert Recipe.from_yaml(path).device == "auto"
    path.write_text(mistaken.replace("device: gpu", "device: 'cuda:1'"))
    assert Recipe.from_yaml(path).device == "cuda:1"


def test_lent_weights_come_back_whatever_happens():
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8, apply_b_dec_to_input=False))
    before = [parameter.data_ptr() for parameter in sae.parameters()]

    def fail() -> None:
        with on_device(sae, torch.device("cpu")):
            sae.W_enc.data = sae.W_enc.data + 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [parameter.data_ptr() for parameter in sae.parameters()] == before


def test_edited_weights_have_room(llama):
    assert room_beside(llama(layers=1, hidden=16)) == 8 << 30
