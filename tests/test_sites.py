"""Every site of every model class: what is read there is what the block computes there."""

import pytest
import torch
from editing.tiny_models import LAYOUTS, make

from stethoscope.errors import SAEError
from stethoscope.models.load import decoder_layers
from stethoscope.models.sites import hook_point, read_activations

IDS = torch.tensor([[5, 9, 12, 7, 3, 30]])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_what_a_block_adds_is_what_its_parts_return(layout):
    model = make(LAYOUTS[layout], dtype=torch.float32)
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    for layer in range(3):
        heard = read_activations(model, {site: hook_point(model, layer, site) for site in sites}, IDS)
        added = heard["attn_out"] + heard["mlp_out"]
        torch.testing.assert_close(heard["resid_post"], heard["resid_pre"] + added, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_layers_output_is_the_next_layers_input_and_the_head_is_never_run(layout):
    model = make(LAYOUTS[layout], dtype=torch.float32)
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the head was run"))
    decoder_layers(model)[2].register_forward_hook(lambda *_: pytest.fail("a layer below the last point was run"))
    heard = read_activations(
        model, {"out": hook_point(model, 0, "resid_post"), "in": hook_point(model, 1, "resid_pre")}, IDS
    )
    assert torch.equal(heard["out"], heard["in"])


@torch.no_grad()
def test_a_tap_says_exactly_where():
    model = make(LAYOUTS["gemma3 text"], dtype=torch.float32)
    heads = read_activations(model, {0: hook_point(model, 0, "attn_out", "self_attn.o_proj.input")}, IDS)[0]
    before_the_norm = read_activations(model, {0: hook_point(model, 0, "attn_out", "self_attn.output")}, IDS)[0]
    torch.testing.assert_close(decoder_layers(model)[0].self_attn.o_proj(heads), before_the_norm)
    after_it = read_activations(model, {0: hook_point(model, 0, "attn_out")}, IDS)[0]
    torch.testing.assert_close(decoder_layers(model)[0].post_attention_layernorm(before_the_norm), after_it)


def test_a_missing_module_is_named_with_what_there_is():
    model = make(LAYOUTS["llama tied"])
    with pytest.raises(SAEError, match=r"no `mixer\.output`") as error:
        hook_point(model, 0, "mlp_out", "mixer.output")
    assert "self_attn, mlp" in error.value.hint
