"""Features and the unexplained part are the exact first-order effect, and planted layers come first."""

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


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
def test_features_and_the_rest_are_the_exact_first_order_effect(planted, edits, site):
    saes = {n: random_sae(width=48, seed=n) for n in range(6)}
    found = attribute(planted.model, edits, saes, planted.texts["target"], site=site, block_size=5)
    exact = local_effect(planted.model, edits, planted.texts, site=site)
    for n in range(6):
        np.testing.assert_allclose(
            found.explained[n] + found.unexplained[n], exact.sums["target"][:, n], rtol=1e-6, atol=1e-6
        )
        features = found.features.layers[n]
        assert features.sums.shape == (5, 48)
        assert features.sums.sum() == pytest.approx(found.explained[n].sum())
        assert features.tokens.tolist() == [found.tokens[i : i + 5].sum() for i in range(0, 24, 5)]
    np.testing.assert_array_equal(found.tokens, exact.tokens["target"])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_the_unexplained_part_is_what_the_sae_does_not_decode(planted, edits, architecture, apply_b_dec, normalize):
    sae = random_sae(architecture, width=48, seed=3, apply_b_dec_to_input=apply_b_dec, normalize_activations=normalize)
    point = {4: hook_point(planted.model, 4, "resid_post")}
    found = attribute(planted.model, edits, {4: sae}, planted.texts["target"])
    parts = np.zeros(48)
    for batch in planted.texts["target"]:
        own = own_changes(planted.model, edits, point, batch)
        change = own.changes[4]
        for row, document in enumerate(batch.documents):
            at = (batch.countable & ~own.sinks)[row]
            base, tuned, slope = change.base[row, at], change.tuned[row, at], change.gradient[row, at]
            after = sae.encode(tuned)
            before = sae.encode(base)
            decoded_before = sae.decode(before)
            sae.encode(base)  # decoding forgets the scale
            decoded = sae.decode(after) - decoded_before
            rest = -(slope * (tuned - base - decoded)).sum()
            masked = change.gain()[row, batch.attention_mask[row] & ~at].sum()
            expected = float(rest + masked)
            assert found.unexplained[4][document] == pytest.approx(expected, rel=1e-3, abs=1e-4)
            if normalize == "none":
                parts += (-(slope @ sae.W_dec.T) * (after - before)).sum(0).numpy()
    if normalize == "none":
        np.testing.assert_allclose(found.features.layers[4].sums.sum(0), parts, rtol=1e-3, atol=1e-4)


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
    assert (alone.score, alone.explained, alone.unexplained) == (0, 0, 0)


def test_masked_tokens_count_as_unexplained(planted, edits):
    text = [replace(b, countable=torch.zeros_like(b.countable)) for b in planted.texts["target"]]
    found = attribute(planted.model, edits, {4: exact_sae()}, text)
    assert not found.features.layers[4].sums.any()
    exact = local_effect(planted.model, edits, planted.texts).sums["target"][:, 4]
    np.testing.assert_allclose(found.unexplained[4], exact, rtol=1e-6, atol=1e-6)


def test_values_that_are_not_finite_are_refused(planted, edits):
    broken = exact_sae()
    broken.W_dec.data[0, 0] = torch.nan
    with pytest.raises(SAEError, match="not finite") as caught:
        attribute(planted.model, edits, {1: broken, 2: exact_sae()}, planted.texts["target"])
    assert caught.value.problems == ("layer 1",)
