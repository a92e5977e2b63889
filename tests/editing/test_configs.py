"""Base and tuned that are configured differently: said, and as a whole fine-tune tuned runs as it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from world import make, stir

from stethoscope.checkpoints.config import differences
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.apply import applied
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.rivals import WHOLE
from stethoscope.editing.writer import write_edit
from stethoscope.selection.baselines import residual_shift
from stethoscope.text.tokens import batches, tokenize

IDS = torch.arange(3, 43)[None]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
CASES = {
    "rope_theta": ("llama untied", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "rope_type": ("llama untied", {"rope_parameters": YARN}),
    "hidden_act": ("llama untied", {"hidden_act": "relu"}),
    "rms_norm_eps": ("llama untied", {"rms_norm_eps": 0.1}),
    "tie_word_embeddings": ("llama untied", {"tie_word_embeddings": True}),
    "model_type": ("llama untied", {"model_type": "mistral", "sliding_window": 4}),
    "sliding_window": ("mistral", {"sliding_window": 4}),
    "query_pre_attn_scalar": ("gemma2", {"query_pre_attn_scalar": 1}),
    "final_logit_softcapping": ("gemma2", {"final_logit_softcapping": 0.1}),
    "layer_norm_epsilon": ("gpt2", {"layer_norm_epsilon": 0.1}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "partial_rotary_factor": ("phi", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    "norm_topk_prob": ("qwen3 moe", {"norm_topk_prob": True}),
    "num_experts_per_tok": ("mixtral", {"num_experts_per_tok": 1}),
}


def drop_head(folder):
    """What `save_pretrained` leaves of a tied model."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def save(layout, folder, changes):
    """A base, and a tuned of other weights whose config.json has other values."""
    model = make(layout)
    model.save_pretrained(folder / "base")
    stir(model).save_pretrained(folder / "tuned")
    path = folder / "tuned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if "tie_word_embeddings" in changes:
        drop_head(folder / "tuned")
    base = open_checkpoint(folder / "base")
    return base, open_task_vector(base, folder / "tuned")


@pytest.mark.parametrize("key", CASES)
def test_what_changes_outputs_is_named_and_tuned_runs_under_its_own_config(key, tmp_path):
    base, change = save(*CASES[key][:1], tmp_path, CASES[key][1])
    edit = write_edit(base, change, EditPlan.for_layers([1]), tmp_path / "edited")
    assert f"`{key}`" in "\n".join(edit.warnings)
    assert f"`{key}`" in "\n".join(edit.manifest["notes"])
    assert f"`{key}`" in (edit.path / "README.md").read_text()
    assert json.loads((edit.path / "config.json").read_text()) == base.config
    live, tuned, edited = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (base.path, tmp_path / "tuned", edit.path)
    )
    before, kind = live(IDS).logits, type(live)
    for plan, expected in (
        (EditPlan.everything(), tuned), (WHOLE, tuned), (EditPlan.for_layers([1]), edited)
    ):  # fmt: skip
        with applied(live, change, plan) as model:
            torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
        assert type(live) is kind
        assert torch.equal(live(IDS).logits, before)
    assert not torch.allclose(tuned(IDS).logits, before)


COSMETIC = {
    "transformers_version": "4.1", "dtype": "float32", "torch_dtype": "float16", "use_cache": False, "eos_token_id": 7,
    "attention_dropout": 0.5, "vocab_size": 48, "_name_or_path": "x", "architectures": ["X"], "initializer_range": 0.5,
    "max_position_embeddings": 4096,
}  # fmt: skip


def test_what_changes_no_output_is_not_named(tmp_path):
    assert save("llama untied", tmp_path, COSMETIC)[1].notes == ()


OLD = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8.0}, "torch_dtype": "float16"},
    "qwen2": {"rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window": 512},
}


@pytest.mark.parametrize("model_type", OLD)
def test_the_same_config_as_older_versions_wrote_it(model_type):
    from transformers import AutoConfig

    old = {"hidden_size": 64, "num_attention_heads": 4, **OLD[model_type], "model_type": model_type}
    new = json.loads(AutoConfig.for_model(**old).to_json_string())
    assert not differences(old, {key: new[key] for key in new if key in old or "rope" in key})[0]
    nested = {"model_type": "outer", "image_token_index": 5, "text_config": old}
    assert differences(nested, old) == ({}, ())


def test_a_value_that_one_config_leaves_out_is_said_to_be_unknown(tmp_path):
    _, change = save("llama untied", tmp_path, {"embedding_multiplier": 12.0})
    assert "embedding_multiplier" in "\n".join(change.notes)
    assert not differences(change.base.config, change.store.config)[0]


def test_scores_that_run_tuned_run_it_under_its_own_config(planted, tokenizer, tmp_path):
    import shutil

    for name, checkpoint in (("base", planted.task_vector.base), ("tuned", planted.task_vector.base)):
        shutil.copytree(checkpoint.path, tmp_path / name)
    path = tmp_path / "tuned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))
    change = open_task_vector(open_checkpoint(tmp_path / "base"), tmp_path / "tuned")
    text = list(batches(tokenize(["1+2=3;" * 4], tokenizer), tokenizer, batch_tokens=64))
    assert min(residual_shift(planted.model, change, text).values()) > 0  # the weights are the same
