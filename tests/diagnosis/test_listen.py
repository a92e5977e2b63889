"""The pass: an exact SAE must explain everything, and sums must equal those of a plain loop."""

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from stethoscope.corpus import batches, tokenize
from stethoscope.diagnosis.listen import listen
from stethoscope.diagnosis.statistics import FeatureStatistics, load_statistics, save_statistics
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.saes.activations import SINK_RATIO

TEXTS = [f"document {i}: " + "abc xyz "[i % 5 :] * (1 + i % 4) for i in range(23)]


def exact_sae(d: int) -> SAE:
    """W_enc = [I, -I], W_dec its inverse: the positive and negative part of every coordinate."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False))
    identity = torch.eye(d)
    sae.W_enc.data = torch.cat([identity, -identity], dim=1)
    sae.W_dec.data = torch.cat([identity, -identity], dim=0)
    return sae.requires_grad_(False)


def test_exact_sae_explains_every_layer(llama, tokenizer):
    model = llama(layers=4)
    heard = listen(model, tokenizer, {layer: exact_sae(32) for layer in range(4)}, TEXTS, block_size=5)
    assert heard.variance_explained == pytest.approx(dict.fromkeys(range(4), 1.0), abs=1e-6)


def test_sums_equal_a_plain_loop_over_layer_outputs(llama, tokenizer):
    model = llama(layers=3)
    heard = listen(model, tokenizer, {0: exact_sae(32), 2: exact_sae(32)}, TEXTS, block_size=4, max_tokens=40)
    outputs: dict[int, torch.Tensor] = {}
    for layer in (0, 2):
        model.model.layers[layer].register_forward_hook(lambda _m, _i, out, at=layer: outputs.__setitem__(at, out))
    statistics = heard.statistics.layers
    for block, start in enumerate(range(0, len(TEXTS), 4)):
        expected = {layer: np.zeros(64) for layer in (0, 2)}
        tokens = 0
        for row in tokenize(TEXTS, tokenizer, max_tokens=40)[start : start + 4]:
            with torch.no_grad():
                model(torch.tensor([row]))
            norms = torch.stack([outputs[layer][0].norm(dim=-1) for layer in (0, 2)])
            counted = (norms <= SINK_RATIO * norms.median(dim=1, keepdim=True).values).all(0)
            for layer in (0, 2):
                hidden = outputs[layer][0][counted]
                expected[layer] += torch.cat([hidden.relu(), (-hidden).relu()], dim=1).sum(0).numpy()
            tokens += int(counted.sum())
        for layer in (0, 2):
            assert statistics[layer].sums.shape == (6, 64)
            assert statistics[layer].tokens[block] == tokens
            np.testing.assert_allclose(statistics[layer].sums[block], expected[layer], rtol=1e-4, atol=1e-4)


def test_a_sink_in_one_layer_is_left_out_of_all(llama, tokenizer):
    model = llama(layers=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("#")["input_ids"][0]] *= 1000  # loud, until the blocks drown it
        model.model.layers[1].mlp.down_proj.weight *= 1e6
    texts = ["#abcdefghijklmnopqrstuvwxyz" + text for text in TEXTS]
    heard = listen(model, tokenizer, {layer: exact_sae(32) for layer in range(3)}, texts)
    sinks = {layer: int(found.sinks.sum()) for layer, found in heard.statistics.layers.items()}
    assert sinks == dict.fromkeys(range(3), len(texts))


def test_blocks_do_not_depend_on_what_else_is_listened_to(llama, tokenizer):
    model, saes = llama(layers=2), {1: exact_sae(32)}
    whole = listen(model, tokenizer, saes, TEXTS, block_size=5).statistics
    parts = [listen(model, tokenizer, saes, TEXTS[i : i + 10], block_size=5).statistics for i in (0, 10, 20)]
    merged = FeatureStatistics.merge(parts)
    for name in ("sums", "fired", "maxima", "tokens", "sinks"):
        np.testing.assert_array_equal(getattr(merged.layers[1], name), getattr(whole.layers[1], name))


def test_statistics_survive_the_disk(llama, tokenizer, tmp_path):
    statistics = listen(llama(layers=2), tokenizer, {0: exact_sae(32), 1: exact_sae(32)}, TEXTS).statistics
    save_statistics(tmp_path / "statistics.safetensors", {"target": statistics, "control": statistics})
    loaded = load_statistics(tmp_path / "statistics.safetensors")
    assert set(loaded) == {"target", "control"}
    np.testing.assert_array_equal(loaded["control"].layers[1].sums, statistics.layers[1].sums)
    (tmp_path / "statistics.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(StethoscopeError, match="cannot be read"):
        load_statistics(tmp_path / "statistics.safetensors")


def test_special_tokens_and_padding_do_not_count(tokenizer):
    (batch,) = batches([[1, 50, 60], [70, 2, 80, 90, 91]], tokenizer)
    assert batch.documents == (1, 0)
    assert batch.countable.tolist() == [[True, False, True, True, True], [False, True, True, False, False]]
    assert batch.attention_mask.sum().item() == 8


def test_values_that_are_not_finite_are_refused(llama, tokenizer):
    sae = exact_sae(32)
    sae.W_enc.data[0, 0] = torch.nan
    with pytest.raises(SAEError, match="layer 1"):
        listen(llama(layers=2), tokenizer, {1: sae}, TEXTS)
