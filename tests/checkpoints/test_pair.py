"""Base and tuned whose files are not of one kind: what is left out of an edit and said, and what is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from world import make, save_adapter, save_pair, stored

from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit
from stethoscope.errors import CheckpointError

AHEAD = {
    "model.layers.3.self_attn.q_proj.weight": (16, 16), "model.layers.3.eh_proj.weight": (16, 32),
    "mtp.layers.0.mlp.up_proj.weight": (32, 16), "model.mtp_block.0.norm.weight": (16,),
}  # fmt: skip


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(folder, tensors):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("who", ["base", "tuned", "both"])
def test_heads_that_predict_further_ahead_stay_the_bases(who, tmp_path):
    base, tuned = save_pair("llama untied", tmp_path)
    for number, folder in enumerate((base, tuned)):
        if who in ("both", folder.name):
            extra = {name: torch.full(shape, 1.0 + number, dtype=torch.bfloat16) for name, shape in AHEAD.items()}
            add(folder, extra)
    opened = open_checkpoint(base)
    change = open_task_vector(opened, tuned)
    assert opened.layers == 3
    assert set(change.energy_by_layer()) == {0, 1, 2}
    edit = write_edit(opened, change, EditPlan.everything(), tmp_path / "edited")
    assert "further ahead" in "\n".join(edit.warnings)
    found, before, after = stored(edit.path), stored(base), stored(tuned)
    assert all(torch.equal(found[name], (before if name in AHEAD else after)[name]) for name in before)
    live = AutoModelForCausalLM.from_pretrained(base)
    with applied(live, change, EditPlan.everything()):
        assert torch.equal(live.lm_head.weight, after["lm_head.weight"])


@pytest.mark.parametrize("copy", [True, False])
def test_a_tied_head_may_be_stored_as_a_copy_and_as_nothing_else(copy, tmp_path):
    base, tuned = save_pair("llama tied", tmp_path)
    embedding = stored(tuned)["model.embed_tokens.weight"]
    add(tuned, {"lm_head.weight": embedding.clone() if copy else embedding + 1})
    assert open_checkpoint(tuned).tied == copy
    if copy:
        assert open_task_vector(open_checkpoint(base), tuned).names
    else:  # Transformers does not tie such a head
        with pytest.raises(CheckpointError, match="lm_head"):
            open_task_vector(open_checkpoint(base), tuned)


def test_a_folder_has_no_revision(tmp_path):
    base, _ = save_pair("llama tied", tmp_path)
    with pytest.raises(CheckpointError, match="revision"):
        open_checkpoint(base, revision="main")


def test_another_depth_is_no_fine_tune(tmp_path):
    base, tuned = save_pair("llama untied", tmp_path)
    configure(tuned, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="3 layers"):
        open_task_vector(open_checkpoint(base), tuned)


@pytest.mark.parametrize("kind", ["the model's", "the adapter's", "both", "neither"])
def test_a_folder_with_both_configs_is_what_its_weights_are(kind, tmp_path):
    save_adapter(make("llama untied"), tmp_path, target_modules=["q_proj"])
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copy(base / "config.json", adapter / "config.json")
    (adapter / "training_args.bin").write_bytes(b"pickle")
    if kind in ("the model's", "both"):
        shutil.copy(base / "model.safetensors", adapter / "model.safetensors")
    if kind in ("the model's", "neither"):
        (adapter / "adapter_model.safetensors").unlink()
    if kind in ("both", "neither"):
        for given in (adapter, base):
            with pytest.raises(CheckpointError, match="both an adapter" if kind == "both" else "no safetensors"):
                open_task_vector(open_checkpoint(base if given == adapter else adapter), given)
    else:
        change = open_task_vector(open_checkpoint(base), adapter)
        assert isinstance(change, AdapterTaskVector) == (kind == "the adapter's")


QUANTISED = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FineGrainedFP8Config"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "dequantize"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "made from"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "CompressedTensorsConfig"),
    "by its tensors": (None, "made from"),
}


@pytest.mark.parametrize("who", ["base", "tuned", "an adapter's base"])
@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_models_are_refused_by_name(how, who, tmp_path):
    about, hint = QUANTISED[how]
    if who == "an adapter's base":
        save_adapter(make("llama untied"), tmp_path, "tuned", target_modules=["q_proj"])
    else:
        save_pair("llama untied", tmp_path)
    folder = tmp_path / ("tuned" if who == "tuned" else "base")
    if about:
        configure(folder, quantization_config=about)
    else:
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj."
        tensors[name + "qweight"] = tensors.pop(name + "weight").view(torch.int8)
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"`{folder.name}` is quantised") as caught:
        open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "tuned")
    assert hint in caught.value.hint


def test_the_command_that_dequantises_does(tmp_path):
    """FP8 as DeepSeek and Qwen store it: a scale for each block of 128 by 128."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).to(torch.bfloat16)
    for name in ("base", "fp8"):
        model.save_pretrained(tmp_path / name)
    tensors = {}
    for name, weight in load_file(tmp_path / "base" / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().max() / 448
            tensors |= {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.view(1, 1)}
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    about = {"fmt": "e4m3", "activation_scheme": "dynamic"} | QUANTISED["fp8"][0]
    configure(tmp_path / "fp8", quantization_config=about)
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match="quantised") as caught:
        open_task_vector(base, tmp_path / "fp8")
    load, save = caught.value.hint.split("`")[1::2]
    places = {
        "NAME": str(tmp_path / "fp8"),
        "OUT": str(tmp_path / "plain"),
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }
    eval(f"{load}.{save}", places | {"FineGrainedFP8Config": FineGrainedFP8Config})
    change = open_task_vector(base, tmp_path / "plain")
    assert set(change.names) == set(base)
    for name in base:
        torch.testing.assert_close(change.edited(name, 1.0), base[name], rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("real", [False, True])
def test_a_rounded_fine_tune_is_said_with_the_share_that_rounding_makes(real, dtype, tmp_path):
    model = make("llama untied", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    if real:
        for layer in model.model.layers[1:2]:
            layer.mlp.up_proj.weight += 2e-4 * torch.randn_like(layer.mlp.up_proj.weight)
    tuned = model.to(dtype)
    tuned.save_pretrained(tmp_path / "tuned")
    base = open_checkpoint(tmp_path / "base")
    change = open_task_vector(base, tmp_path / "tuned")
    rounding = whole = 0.0
    for name in change.names:
        rounding += float((base[name].to(dtype).float() - base[name]).double().square().sum())
        whole += change.energy(name)
    (note,) = change.notes
    assert f"about {100 * rounding / whole:.0f} %" in note
    assert (rounding == pytest.approx(whole)) == (not real)
    assert open_task_vector(base, tmp_path / "base").notes == ()
    assert open_task_vector(open_checkpoint(tmp_path / "tuned"), tmp_path / "base").notes == ()
