"""Adapters: what this package makes of one is what PEFT merges."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import LINEAR, SMALL, build, gpt2, save_adapter

from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.errors import CheckpointError

TRANSPOSED = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
PATTERNS = {
    "lora_alpha": 8,
    "target_modules": LINEAR,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
    "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5, "proj": 99},
}
CASES = {
    "LoRA": {"lora_alpha": 12, "target_modules": LINEAR},
    "rsLoRA": {"lora_alpha": 12, "target_modules": LINEAR, "use_rslora": True},
    "DoRA": {"target_modules": LINEAR, "use_dora": True},
    "rsDoRA": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "patterns": PATTERNS,
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [2]},
    "embedding and norm": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA of an embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "transposed": TRANSPOSED,
    "transposed DoRA": TRANSPOSED | {"use_dora": True},
    "all biases": TRANSPOSED | {"target_modules": ["c_attn"], "bias": "all"},
    "biases of adapted modules": TRANSPOSED | {"target_modules": ["c_attn"], "bias": "lora_only"},
    "LoRA biases": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
}


def opened(folder):
    change = open_task_vector(open_checkpoint(folder / "base"), folder / "adapter")
    assert isinstance(change, AdapterTaskVector)
    return change


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_peft(case, llama, tmp_path):
    options = CASES[case]
    model = llama(hidden=16)
    if "fan_in_fan_out" in options:
        model = gpt2()
    elif "lora_bias" in options:
        model = build("Qwen2", **SMALL)  # its attention has biases
    merged = save_adapter(model, tmp_path, r=4, **options)
    change = opened(tmp_path)
    base = change.base
    assert change.names
    for name in base:
        if name in change.names:
            tuned = change.edited(name, 1.0)
            torch.testing.assert_close(tuned, merged[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(tuned, base[name])
            torch.testing.assert_close(base[name] + change.delta(name), merged[name], rtol=1e-5, atol=1e-6)
            assert change.energy(name) == pytest.approx(float(change.delta(name).double().square().sum()), rel=1e-5)
        else:
            assert torch.equal(base[name], merged[name]), name


def test_factors(llama, tmp_path):
    save_adapter(llama(hidden=16), tmp_path, r=4, lora_alpha=12, target_modules=LINEAR)
    change = opened(tmp_path)
    factors = change.factors("layers.1.mlp.up_proj.weight")
    assert (factors.A.shape, factors.B.shape, factors.scaling) == ((4, 16), (32, 4), 3.0)
    expected = factors.scaling * factors.B @ factors.A
    torch.testing.assert_close(change.delta("layers.1.mlp.up_proj.weight"), expected)
    assert list(change.energy_by_layer()) == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="does not change"):
        change.delta("norm.weight")


@pytest.fixture
def saved(llama, tmp_path):
    save_adapter(llama(hidden=16), tmp_path, r=4, target_modules=["q_proj"])
    return tmp_path


def configure(**changes):
    def edit(folder) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def reweigh(change):
    def edit(folder) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors")

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj."
FAULTS = {
    "another kind": (configure(peft_type="IA3"), "only LORA"),
    "moved base": (configure(init_lora_weights="pissa_niter_4"), "also changed the base"),
    "unknown option": (configure(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "rank is a word": (configure(r="big", lora_alpha="x"), "lora_alpha"),
    "not DoRA after all": (configure(use_dora=True), "use_dora is True"),
    "half of a pair": (reweigh(lambda w: w.pop(Q + "lora_B.weight")), "not both of A and B"),
    "another model": (reweigh(lambda w: w.update({Q + "lora_A.weight": torch.zeros(4, 18)})), "does not make the"),
    "unknown key": (reweigh(lambda w: w.update({"x.prompt": torch.zeros(1)})), "`x.prompt`"),
    "unknown module": (
        reweigh(lambda w: w.update({f"x.lora_{m}.weight": torch.ones(1, 1) for m in "AB"})),
        "`x.lora_A.weight` fits no tensor",
    ),
    "rank 0": (
        reweigh(lambda w: w.update({Q + "lora_A.weight": torch.ones(0, 16), Q + "lora_B.weight": torch.ones(16, 0)})),
        "does not make the",
    ),
    "two truths": (reweigh(lambda w: w.update({Q + "weight": torch.zeros(16, 16)})), "both change"),
    "patterns are a number": (configure(alpha_pattern=3), "alpha_pattern"),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "not a sound safetensors"),
    "config gone bad": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "is a pickle"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_do_not_fit(fault, saved):
    damage, message = FAULTS[fault]
    damage(saved / "adapter")
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(saved)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "part"), [({"use_dora": True}, "lora_magnitude_vector"), ({"lora_bias": True}, "lora_B.bias")]
)
def test_vectors_of_another_length_do_not_fit(options, part, tmp_path):
    save_adapter(build("Qwen2", **SMALL), tmp_path, r=4, target_modules=["q_proj"], **options)

    def shorten(weights):
        name = next(name for name in weights if part in name)
        weights[name] = weights[name][:1].clone()

    reweigh(shorten)(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not have"):
        opened(tmp_path)


def test_a_saved_embedding_changes_the_head_of_a_tied_base_and_it_is_said(llama, tmp_path):
    save_adapter(llama(hidden=16), tmp_path, r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    assert any("head" in note for note in opened(tmp_path).notes)


def test_not_a_number_is_named(saved):
    reweigh(lambda w: w[Q + "lora_A.weight"].fill_(float("nan")))(saved / "adapter")
    change = opened(saved)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        change.edited("layers.0.self_attn.q_proj.weight", 1.0)


def test_an_adapter_is_no_base(saved):
    with pytest.raises(CheckpointError, match="is a PEFT adapter"):
        open_checkpoint(saved / "adapter")
