"""The pass: an exact SAE must explain everything, and sums must equal those of a plain loop."""

import numpy as np
import pytest
import torch
from editing.tiny_models import LAYOUTS, make
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stethoscope.diagnosis import encoding
from stethoscope.diagnosis.listen import listen
from stethoscope.diagnosis.listener import Listener
from stethoscope.diagnosis.statistics import FeatureStatistics, load_statistics, save_statistics
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.saes.activations import SINK_RATIO
from stethoscope.text.tokens import batches, tokenize

TEXTS = [f"document {i}: " + "abc xyz "[i % 5 :] * (1 + i % 4) for i in range(23)]


def exact_sae(d: int) -> SAE:
    """W_enc = [I, -I], W_dec its inverse: the positive and negative part of every coordinate."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False))
    identity = torch.eye(d)
    sae.W_enc.data = torch.cat([identity, -identity], dim=1)
    sae.W_dec.data = torch.cat([identity, -identity], dim=0)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_exact_sae_explains_every_layer_and_site_of_every_model_class(layout, tokenizer):
    model = make(LAYOUTS[layout], dtype=torch.float32)
    texts = ["".join(map(chr, range(33, 33 + n))) for n in (9, 12, 5, 14)]  # ids below the tiny models' 48
    small = PreTrainedTokenizerFast(tokenizer_object=letters(), pad_token="!", padding_side="right")
    for site in ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_z", "attn_out"):
        width = read_activations(model, {0: hook_point(model, 0, site)}, torch.tensor([[3, 4]]))[0].shape[-1]
        saes = {layer: exact_sae(width) for layer in range(3)}
        heard = listen(model, small, saes, {"all": texts}, site=site, block_size=2)["all"]
        assert {n: h.variance_explained for n, h in heard.health.items()} == pytest.approx(dict.fromkeys(saes, 1.0))
        assert all(health.encoding_error < 1e-6 for health in heard.health.values())


def letters() -> Tokenizer:
    """Characters as tokens, within the tiny models' vocabulary of 48."""
    built = Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(48)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return built


def test_sums_equal_a_plain_loop_over_layer_outputs(llama, tokenizer):
    model = llama(layers=3)
    saes = {0: exact_sae(32), 2: exact_sae(32)}
    heard = listen(model, tokenizer, saes, {"all": TEXTS}, block_size=4, max_tokens=40)["all"]
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
    heard = listen(model, tokenizer, {layer: exact_sae(32) for layer in range(3)}, {"all": texts})["all"]
    sinks = {layer: int(found.sinks.sum()) for layer, found in heard.statistics.layers.items()}
    assert sinks == dict.fromkeys(range(3), len(texts))


def test_blocks_do_not_depend_on_what_else_is_listened_to(llama, tokenizer):
    model, saes = llama(layers=2), {1: exact_sae(32)}
    texts = {"all": TEXTS, **{f"part {i}": TEXTS[i : i + 10] for i in (0, 10, 20)}}
    heard = listen(model, tokenizer, saes, texts, block_size=5)
    whole = heard.pop("all").statistics
    merged = FeatureStatistics.merge([part.statistics for part in heard.values()])
    for name in ("sums", "fired", "maxima", "tokens", "sinks"):
        np.testing.assert_array_equal(getattr(merged.layers[1], name), getattr(whole.layers[1], name))


def test_statistics_survive_the_disk(llama, tokenizer, tmp_path):
    saes = {0: exact_sae(32), 1: exact_sae(32)}
    statistics = listen(llama(layers=2), tokenizer, saes, {"all": TEXTS})["all"].statistics
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
        listen(llama(layers=2), tokenizer, {1: sae}, {"all": TEXTS})


def random_sae(kind: str, d: int = 32, width: int = 300) -> SAE:
    torch.manual_seed(0)
    if kind == "topk":
        sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=width, k=7))
    elif kind == "gated":
        sae = GatedSAE(GatedSAEConfig(d_in=d, d_sae=width))
    elif kind == "normalised":
        sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=width, normalize_activations="layer_norm"))
    elif kind == "standard":
        sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=width))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=width, apply_b_dec_to_input=kind == "jumprelu"))
        sae.threshold.data = torch.rand(width) - 0.2  # some below 0, where relu decides
    for parameter in sae.parameters():
        if parameter is not getattr(sae, "threshold", None):
            parameter.data = 0.3 * torch.randn_like(parameter)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "jumprelu without b_dec", "topk", "gated", "normalised"])
def test_tiles_sum_to_what_saelens_encodes(kind, monkeypatch):
    monkeypatch.setitem(encoding.TILE_TOKENS, "cpu", 64)
    monkeypatch.setitem(encoding.TILE_WIDTH, "cpu", 70)
    sae, hidden = random_sae(kind), torch.randn(150, 32)
    encoder = encoding.Encoder(sae, dtype=torch.float32, device=torch.device("cpu"))
    assert encoder.exact == (kind in ("topk", "gated", "normalised"))
    sums = encoding.BlockSums(300, torch.device("cpu"))
    for part in hidden.split(100):
        encoder.add(part, sums)
    found, expected = sums.freeze(), sae.encode(hidden)
    assert 0.01 < (expected > 0).float().mean() < 0.9
    np.testing.assert_array_equal(found.fired[0], (expected > 0).sum(0))
    np.testing.assert_allclose(found.sums[0], expected.double().sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.maxima[0], expected.amax(0), rtol=1e-5, atol=1e-5)


def test_what_bfloat16_costs_is_measured(llama, tokenizer):
    saes = {1: random_sae("jumprelu")}
    errors = [
        listen(llama(layers=2), tokenizer, saes, {"all": TEXTS}, dtype=dtype)["all"].health[1].encoding_error
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 0.02


def test_encoders_that_do_not_fit_wait_for_another_forward(llama, tokenizer):
    model, saes = llama(layers=4), {layer: random_sae("jumprelu") for layer in range(4)}
    seen: list[tuple[int, int]] = []
    at_once = listen(model, tokenizer, saes, {"all": TEXTS})["all"]
    one_by_one = listen(
        model, tokenizer, saes, {"all": TEXTS}, memory=1, progress=lambda done, total: seen.append((done, total))
    )["all"]
    assert seen[-1] == (4 * sum(map(len, TEXTS)), 4 * sum(map(len, TEXTS)))  # characters: documents differ in length
    for layer in saes:
        np.testing.assert_array_equal(one_by_one.statistics.layers[layer].sums, at_once.statistics.layers[layer].sums)
    assert one_by_one.health == at_once.health


def test_only_the_tokens_asked_for_count(llama, tokenizer):
    heard = listen(llama(layers=2), tokenizer, {1: exact_sae(32)}, {"all": TEXTS}, tokens="last", block_size=4)["all"]
    assert heard.statistics.layers[1].tokens.tolist() == [4, 4, 4, 4, 4, 3]
    assert heard.health[1].tokens == len(TEXTS)


def test_chats_that_cannot_be_rendered_are_refused_for_that(llama, tokenizer):
    chats = [[{"role": "user", "content": f"question {i}"}] for i in range(4)]
    with pytest.raises(StethoscopeError, match="has no chat template"):
        listen(llama(layers=1), tokenizer, {0: exact_sae(32)}, {"target": chats})


def test_a_document_broken_for_one_group_of_layers_counts_for_none(llama, tokenizer, monkeypatch):
    """Layer 2 overflows on a document; the group of layers that was heard before is heard again without it."""
    document, hear_documents = 7, Listener._hear

    def choosy(self, documents):
        if 2 in self._encoders and TEXTS[document] in documents.values():
            raise FloatingPointError("overflow")
        return hear_documents(self, documents)

    monkeypatch.setattr(Listener, "_hear", choosy)
    saes, one_encoder = {layer: exact_sae(32) for layer in range(3)}, 32 * 64 * 4
    options = {"memory": 2 * one_encoder, "skip_broken": True, "block_size": 4}
    found = listen(llama(layers=3), tokenizer, saes, {"all": TEXTS}, **options)["all"]
    assert found.broken == {document: "overflow"}
    tokens = [layer.tokens.tolist() for layer in found.statistics.layers.values()]
    assert tokens[0] == tokens[2]
