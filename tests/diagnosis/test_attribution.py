"""Features have the exact first-order effect of what their SAE decodes, and planted layers come first."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from world import exact_sae, plant, random_sae

from stethoscope.diagnosis.attribution import attribute, attribution_scores, own_changes
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import SAEError
from stethoscope.models.sites import hook_point
from stethoscope.selection.injection import local_effect


def counted_changes(planted, edits, layer, site="resid_post"):
    """Each document's place and its counted tokens under base and tuned weights, and the gradient there."""
    points = {layer: hook_point(planted.model, layer, site)}
    for batch in planted.texts["target"]:
        own = own_changes(planted.model, edits, points, batch)
        change = own.changes[layer]
        for row, document in enumerate(batch.documents):
            at = (batch.countable & ~own.sinks)[row]
            yield document, change.base[row, at], change.tuned[row, at], change.gradient[row, at]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
def test_features_that_decode_everything_sum_to_the_exact_first_order_effect(planted, edits, site):
    saes, text = {n: exact_sae() for n in range(6)}, planted.texts["target"]
    alone, blocks = (attribute(planted.model, edits, saes, text, site=site, block_size=size) for size in (1, 5))
    for n in range(6):
        exact = np.zeros(24)
        for document, base, tuned, slope in counted_changes(planted, edits, n, site):
            exact[document] = -(slope * (tuned - base)).double().sum()
        np.testing.assert_allclose(alone.features.layers[n].sums.sum(1), exact, rtol=1e-4, atol=1e-5)
        features = blocks.features.layers[n]
        summed = np.add.reduceat(alone.features.layers[n].sums, range(0, 24, 5))
        np.testing.assert_allclose(features.sums, summed, rtol=1e-6, atol=1e-9)
        assert features.tokens.tolist() == [blocks.tokens[i : i + 5].sum() for i in range(0, 24, 5)]
    exact_tokens = local_effect(planted.model, edits, planted.texts, site=site).tokens["target"]
    np.testing.assert_array_equal(alone.tokens, exact_tokens)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("standard", {}), ("jumprelu", {}), ("topk", {}), ("topk", {"rescale_acts_by_decoder_norm": True})],
)
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_features_sum_to_the_effect_of_what_the_sae_decodes(
    planted, edits, architecture, options, apply_b_dec, normalize
):
    own = {"apply_b_dec_to_input": apply_b_dec, "normalize_activations": normalize}
    sae = random_sae(architecture, width=48, seed=3, **own, **options)
    found = attribute(planted.model, edits, {4: sae}, planted.texts["target"], block_size=1).features.layers[4].sums
    rows = sae.W_dec / (sae.W_dec.norm(dim=1, keepdim=True) if options else 1)
    for document, base, tuned, slope in counted_changes(planted, edits, 4):
        after = sae.encode(tuned)
        before = sae.encode(base)
        decoded_before = sae.decode(before)
        sae.encode(base)  # decoding forgets the scale
        decoded = sae.decode(after) - decoded_before
        assert found[document].sum() == pytest.approx(float(-(slope * decoded).sum()), rel=1e-3, abs=1e-4)
        if normalize == "none":
            parts = (-(slope @ rows.T) * (after - before)).sum(0)
            np.testing.assert_allclose(found[document], parts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "layers"), [("Llama", (0, 3)), ("Llama", (2, 5)), ("Gemma3", (1, 2))])
def test_planted_layers_come_first(family, layers, tmp_path, tokenizer):
    made = plant(tmp_path, tokenizer, family=family, layers=layers, seed=50, batch_tokens=4096)
    edits = LayerEdits(made.model, made.task_vector)
    saes = {n: exact_sae() for n in range(6)}
    target, control = (attribute(made.model, edits, saes, made.texts[name]) for name in ("target", "control"))
    scores = {n: one.score for n, one in attribution_scores(target, control).items()}
    assert set(sorted(scores, key=scores.__getitem__)[-2:]) == set(layers)


def test_a_layers_attribution_is_target_less_control(planted, edits):
    found = attribute(planted.model, edits, {4: exact_sae()}, planted.texts["target"])
    control = attribute(planted.model, edits, {4: exact_sae()}, planted.texts["control"])
    made = attribution_scores(found, control)[4]
    ours, theirs = (one.features.layers[4].sums.sum(0) / one.tokens.sum() for one in (found, control))
    assert made.score == pytest.approx(sum(value for value in ours - theirs if value > 0))
    assert made.explained == pytest.approx((ours - theirs).sum())
    alone = attribution_scores(found, found)[4]
    assert (alone.score, alone.explained) == (0, 0)


def test_tokens_that_do_not_count_have_no_part(planted, edits):
    text = [replace(b, countable=torch.zeros_like(b.countable)) for b in planted.texts["target"]]
    found = attribute(planted.model, edits, {4: exact_sae()}, text)
    assert not found.features.layers[4].sums.any()


def test_values_that_are_not_finite_are_refused(planted, edits):
    broken = exact_sae()
    broken.W_dec.data[0, 0] = torch.nan
    with pytest.raises(SAEError, match="not finite") as caught:
        attribute(planted.model, edits, {1: broken, 2: exact_sae()}, planted.texts["target"])
    assert caught.value.problems == ("layer 1",)


def test_transcoders_are_refused(planted, edits):
    transcoder = random_sae("transcoder", d_out=32)
    transcoder.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with pytest.raises(SAEError, match="transcoders") as caught:
        attribute(planted.model, edits, {0: exact_sae(), 1: transcoder}, planted.texts["target"], site="mlp_in")
    assert caught.value.problems == ("layer 1",)
