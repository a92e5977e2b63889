"""Adapters: what this package makes of one is what PEFT merges."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.errors import CheckpointError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=32)).eval()


def with_adapter(model: PreTrainedModel, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Save the model and an adapter with random matrices for it; return the weights that PEFT merges them to."""
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name or "magnitude" in name or (parameter.requires_grad and "bias" in name):
                parameter.data += 0.1 * torch.rand_like(parameter)
        peft.save_pretrained(folder / "adapter")
        merged = peft.merge_and_unload()
    return {parse_name(name).canonical: tensor for name, tensor in merged.state_dict().items()}


CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "lora_alpha": 12, "target_modules": LINEAR},
    "rsLoRA": {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "use_rslora": True},
    "DoRA": {"r": 4, "target_modules": LINEAR, "use_dora": True},
    "rsDoRA": {"r": 4, "target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5, "proj": 99},
    },
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [2]},
    "embedding and norm": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "DoRA of an embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "modules to save": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_peft(case: str, llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    merged = with_adapter(llama(hidden=16), tmp_path, **CASES[case])
    check_against(merged, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
    ],
)
def test_agrees_with_peft_on_transposed_weights_and_biases(options: dict[str, Any], tmp_path: Path) -> None:
    merged = with_adapter(gpt2(), tmp_path, r=4, **options)
    check_against(merged, tmp_path)


def test_agrees_with_peft_on_lora_biases(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 48}
    model = Qwen2ForCausalLM(Qwen2Config(hidden_size=16, intermediate_size=32, **sizes)).eval()
    merged = with_adapter(model, tmp_path, r=4, target_modules=["q_proj", "k_proj"], lora_bias=True)
    check_against(merged, tmp_path)


def check_against(merged: dict[str, torch.Tensor], folder: Path) -> None:
    base = open_checkpoint(folder / "base")
    change = open_task_vector(base, folder / "adapter")
    assert isinstance(change, AdapterTaskVector)
    assert change.names
    for name in base:
        if name in change.names:
            tuned = change.tuned(name)
            torch.testing.assert_close(tuned, merged[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(tuned, base[name])
            torch.testing.assert_close(base[name] + change.delta(name), merged[name], rtol=1e-5, atol=1e-6)
            assert change.energy(name) == pytest.approx(float(change.delta(name).double().square().sum()), rel=1e-5)
        else:
            assert torch.equal(base[name], merged[name]), name


def test_factors(llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with_adapter(llama(hidden=16), tmp_path, r=4, lora_alpha=12, target_modules=LINEAR)
    change = open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    assert isinstance(change, AdapterTaskVector)
    factors = change.factors("layers.1.mlp.up_proj.weight")
    assert factors is not None
    assert (factors.A.shape, factors.B.shape, factors.scaling) == ((4, 16), (32, 4), 3.0)
    expected = factors.scaling * factors.B @ factors.A
    torch.testing.assert_close(change.delta("layers.1.mlp.up_proj.weight"), expected)
    assert list(change.energy_by_layer()) == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="does not change"):
        change.delta("norm.weight")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj."
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind": (lambda f: edit_config(f, peft_type="IA3"), "only LORA"),
    "moved base": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "also changed the base"),
    "unknown option": (lambda f: edit_config(f, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "rank is a word": (lambda f: edit_config(f, r="big", lora_alpha="x"), "lora_alpha"),
    "half of a pair": (lambda f: edit_weights(f, lambda w: w.pop(Q + "lora_B.weight")), "not both of A and B"),
    "another model": (
        lambda f: edit_weights(f, lambda w: w.update({Q + "lora_A.weight": torch.zeros(4, 18)})),
        "does not make the base's",
    ),
    "unknown key": (lambda f: edit_weights(f, lambda w: w.update({"x.prompt": torch.zeros(1)})), "`x.prompt`"),
    "unknown module": (
        lambda f: edit_weights(f, lambda w: w.update({f"x.lora_{m}.weight": torch.ones(1, 1) for m in "AB"})),
        "`x.lora_A.weight` fits no tensor",
    ),
    "not DoRA after all": (lambda f: edit_config(f, use_dora=True), "use_dora is True"),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "not a sound safetensors"),
    "config gone bad": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_do_not_fit(fault: str, llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with_adapter(llama(hidden=16), tmp_path, r=4, target_modules=["q_proj"])
    damage, message = FAULTS[fault]
    damage(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    assert caught.value.hint


def test_not_a_number_is_named(llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with_adapter(llama(hidden=16), tmp_path, r=4, target_modules=["q_proj"])
    edit_weights(tmp_path / "adapter", lambda w: w[Q + "lora_A.weight"].fill_(float("nan")))
    change = open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    for read in (change.delta, change.tuned):
        with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
            read("layers.0.self_attn.q_proj.weight")


def test_a_pickled_adapter_is_refused(llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with_adapter(llama(hidden=16), tmp_path, r=4, target_modules=["q_proj"])
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")


def test_an_adapter_is_no_base(llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with_adapter(llama(hidden=16), tmp_path, r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="is a PEFT adapter"):
        open_checkpoint(tmp_path / "adapter")
