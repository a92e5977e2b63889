"""Canonical names: one name per tensor, whatever saved it, and nothing by substring."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stethoscope.checkpoints.names import parse_name


@pytest.mark.parametrize(
    ("stored", "canonical", "layer", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "layers.12.self_attn.q_proj.weight", 12, "attention"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight", 3, "mlp"),
        ("model.language_model.layers.3.input_layernorm.weight", "layers.3.input_layernorm.weight", 3, "norm"),
        ("base_model.model.model.layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_norm.weight", 0, "attention"),
        ("transformer.h.1.attn.c_attn.weight", "layers.1.attn.c_attn.weight", 1, "attention"),
        ("h.1.mlp.c_fc.bias", "layers.1.mlp.c_fc.bias", 1, "mlp"),
        ("h.1.attn.bias", "layers.1.attn.bias", 1, "buffer"),
        ("gpt_neox.layers.1.attention.dense.bias", "layers.1.attention.dense.bias", 1, "attention"),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", "layers.1.mlp.experts.7.gate_proj.weight", 1, "mlp"),
        ("model.layers.1.mlp.experts.7.gate_proj.weight", "layers.1.mlp.experts.7.gate_proj.weight", 1, "mlp"),
        ("model.embed_tokens.weight", "embed_tokens.weight", None, "embedding"),
        ("transformer.wte.weight", "embed_tokens.weight", None, "embedding"),
        ("language_model.model.norm.weight", "norm.weight", None, "norm"),
        ("model.final_layernorm.bias", "norm.bias", None, "norm"),
        ("language_model.lm_head.weight", "lm_head.weight", None, "head"),
        ("embed_out.weight", "lm_head.weight", None, "head"),
        ("model.vision_tower.encoder.layers.0.fc1.bias", "vision_tower.encoder.layers.0.fc1.bias", None, "vision"),
        ("vision_tower.vision_model.encoder.layers.0.fc.bias", "vision_tower.encoder.layers.0.fc.bias", None, "vision"),
        ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight", None, "vision"),
        # what only looks like a layer
        ("model.encoder.layers.0.fc1.weight", "model.encoder.layers.0.fc1.weight", None, "other"),
        ("my.model.layers.0.mlp.up_proj.weight", "my.model.layers.0.mlp.up_proj.weight", None, "other"),
        ("model.layers.03.mlp.up_proj.weight", "model.layers.03.mlp.up_proj.weight", None, "other"),
        ("model.layers.-1.mlp.up_proj.weight", "model.layers.-1.mlp.up_proj.weight", None, "other"),
        ("model.layers.٣.mlp.up_proj.weight", "model.layers.٣.mlp.up_proj.weight", None, "other"),
        ("score.weight", "score.weight", None, "other"),
    ],
)  # fmt: skip
def test_what_names_mean(stored, canonical, layer, kind):
    found = parse_name(stored)
    assert (found.canonical, found.layer, found.kind) == (canonical, layer, kind)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.model.", "model.language_model.", "base_model.model.model."]
)
@given(
    layer=st.integers(0, 9999), tail=st.sampled_from(["self_attn.q_proj.weight", "mlp.down_proj.weight", "ln_1.bias"])
)
def test_the_prefix_does_not_matter_and_canonical_names_are_fixed_points(prefix, layer, tail):
    found = parse_name(f"{prefix}layers.{layer}.{tail}")
    assert found == parse_name(found.canonical)
    assert (found.canonical, found.layer) == (f"layers.{layer}.{tail}", layer)


@given(st.text(max_size=40))
def test_any_text_is_a_name(text):
    assert parse_name(text).kind
