"""The pass: an exact SAE must explain everything, and sums must equal those of a plain loop."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from world import LAYOUTS, exact_sae, make, random_sae

from stethoscope.diagnosis import encoding
from stethoscope.diagnosis.collect import Collector, collect_activations
from stethoscope.diagnosis.statistics import load_statistics, save_layers
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.executor import LocalExecutor
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.saes.activations import SINK_RATIO
from stethoscope.text.tokens import tokenize

TEXTS = [f"document {i}: " + "abc xyz "[i % 5 :] * (1 + i % 4) for i in range(23)]


@pytest.fixture
def collected_by(llama, tokenizer):
    """Collect the activations on texts of a model of so many layers."""

    def collected(layers, saes, texts=TEXTS, **options):
        return collect_activations(llama(layers=layers), tokenizer, saes, {"all": texts}, **options)["all"]

    return collected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_exact_sae_explains_every_layer_and_site_of_every_model_class(layout):
    model = make(layout, dtype=torch.float32)
    texts = ["".join(map(chr, range(33, 33 + n))) for n in (9, 12, 5, 14)]
    letters = Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(48)}, merges=[]))  # the tiny models' vocabulary
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    small = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="!", padding_side="right")
    for site in ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_z", "attn_out"):
        width = read_activations(model, {0: hook_point(model, 0, site)}, torch.tensor([[3, 4]]))[0].shape[-1]
        saes = {layer: exact_sae(width) for layer in range(3)}
        found = collect_activations(model, small, saes, {"all": texts}, site=site, block_size=2)["all"]
        assert {n: h.variance_explained for n, h in found.health.items()} == pytest.approx(dict.fromkeys(saes, 1.0))
        assert all(health.encoding_error < 1e-6 for health in found.health.values())


def test_sums_equal_a_plain_loop_over_layer_outputs(llama, tokenizer):
    model = llama(layers=3)
    saes = {0: exact_sae(), 2: exact_sae()}
    statistics = collect_activations(model, tokenizer, saes, {"all": TEXTS}, block_size=4, max_tokens=40)[
        "all"
    ].statistics.layers
    outputs: dict[int, torch.Tensor] = {}
    for layer in saes:
        model.model.layers[layer].register_forward_hook(lambda _m, _i, out, at=layer: outputs.__setitem__(at, out))
    for block, start in enumerate(range(0, len(TEXTS), 4)):
        expected = {layer: np.zeros(64) for layer in saes}
        tokens = 0
        for row in tokenize(TEXTS, tokenizer, max_tokens=40)[start : start + 4]:
            model(torch.tensor([row]))
            norms = torch.stack([outputs[layer][0].norm(dim=-1) for layer in saes])
            counted = (norms <= SINK_RATIO * norms.median(dim=1, keepdim=True).values).all(0)
            for layer in saes:
                hidden = outputs[layer][0][counted]
                expected[layer] += torch.cat([hidden.relu(), (-hidden).relu()], dim=1).sum(0).numpy()
            tokens += int(counted.sum())
        for layer in saes:
            assert statistics[layer].sums.shape == (6, 64)
            assert statistics[layer].tokens[block] == tokens
            np.testing.assert_allclose(statistics[layer].sums[block], expected[layer], rtol=1e-4, atol=1e-4)


def test_a_sink_in_one_layer_is_left_out_of_all(llama, tokenizer):
    model = llama(layers=3)
    model.model.embed_tokens.weight[tokenizer("#")["input_ids"][0]] *= 1000  # loud, until the blocks drown it
    model.model.layers[1].mlp.down_proj.weight *= 1e6
    texts = ["#abcdefghijklmnopqrstuvwxyz" + text for text in TEXTS]
    found = collect_activations(model, tokenizer, {layer: exact_sae() for layer in range(3)}, {"all": texts})["all"]
    sinks = {layer: int(found.sinks.sum()) for layer, found in found.statistics.layers.items()}
    assert sinks == dict.fromkeys(range(3), len(texts))


def test_blocks_do_not_depend_on_other_blocks_and_survive_the_disk(llama, tokenizer, tmp_path):
    texts = {"all": TEXTS, **{f"part {i}": TEXTS[i : i + 10] for i in (0, 10, 20)}}
    found = collect_activations(llama(layers=2), tokenizer, {1: exact_sae()}, texts, block_size=5)
    path = tmp_path / "statistics.safetensors"
    save_layers(path, {name: one.statistics.layers for name, one in found.items()})
    loaded = load_statistics(path)
    for name in ("sums", "fired", "tokens", "sinks"):
        whole, *parts = (getattr(loaded[corpus].layers[1], name) for corpus in texts)
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        np.testing.assert_array_equal(getattr(found["all"].statistics.layers[1], name), whole)
    arrays = load_file(path)
    save_file(arrays | {"all.1.maxima": arrays["all.1.sums"]}, path)  # as earlier versions did
    assert load_statistics(path)["all"].blocks == 5
    sound = path.read_bytes()
    renamed = [sound.replace(b"all.1.sums", name) for name in (b"all.1.sumr", b"all.x.sums", b"all_1.sums")]
    for damaged in (b"\x00" * 20, *renamed):
        path.write_bytes(damaged)
        with pytest.raises(StethoscopeError, match="cannot be read"):
            load_statistics(path)


def test_values_that_are_not_finite_and_texts_without_tokens_are_refused(collected_by):
    sae = exact_sae()
    sae.W_enc.data[0, 0] = torch.nan
    with pytest.raises(SAEError, match="layer 1"):
        collected_by(2, {1: sae})
    with pytest.raises(StethoscopeError, match="no document of `all` has a token to count"):
        collected_by(2, {1: exact_sae()}, texts=["</s>"] * 3)


@pytest.mark.parametrize(
    ("kind", "options", "exact"),
    [
        ("standard", {}, False),
        ("jumprelu", {}, False),
        ("jumprelu", {"apply_b_dec_to_input": False}, False),
        ("topk", {}, True),
        ("gated", {}, True),
        ("standard", {"normalize_activations": "layer_norm"}, True),
    ],
)
def test_tiles_sum_to_what_saelens_encodes(kind, options, exact, monkeypatch):
    monkeypatch.setitem(encoding.TILE_TOKENS, "cpu", 64)
    monkeypatch.setitem(encoding.TILE_WIDTH, "cpu", 70)
    sae, hidden = random_sae(kind, width=300, **options), torch.randn(150, 32)
    encoder = encoding.Encoder(sae, dtype=torch.float32, device=torch.device("cpu"))
    assert encoder.exact == exact
    assert encoding.encoder_bytes(sae, torch.bfloat16) == 300 * 32 * (8 if exact else 2)
    sums = encoding.BlockSums(300, torch.device("cpu"))
    for part in hidden.split(100):
        encoder.add(part, sums)
    found, expected = sums.freeze(), sae.encode(hidden)
    assert 0.01 < (expected > 0).float().mean() < 0.9
    np.testing.assert_array_equal(found.fired[0], (expected > 0).sum(0))
    np.testing.assert_allclose(found.sums[0], expected.double().sum(0), rtol=1e-5, atol=1e-5)


def test_what_bfloat16_costs_is_measured(collected_by):
    saes = {1: random_sae("jumprelu", width=300)}
    errors = [collected_by(2, saes, dtype=dtype).health[1].encoding_error for dtype in (torch.float32, torch.bfloat16)]
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 0.02


def test_health_takes_few_tokens_of_a_small_corpus(llama, tokenizer):
    """An eighth of its documents, but enough tokens; as many as are asked for of a large one."""
    texts = {"long": ["abc " * 100] * 16, "short": ["abc " * 10] * 16, "many": ["abc " * 100] * 160}
    options = {"saes": {}, "site": "resid_post", "max_tokens": 1024, "tokens": "all", "health_tokens": 2048}
    collector = Collector(LocalExecutor(model=llama(layers=1), tokenizer=tokenizer), **options)
    taken = {name: len(collector.first_documents(name, some)) for name, some in texts.items()}
    assert taken == {"long": 2, "short": 4, "many": 6}


def test_encoders_that_do_not_fit_wait_for_another_forward(collected_by):
    saes, seen = {layer: random_sae("jumprelu") for layer in range(4)}, []
    at_once = collected_by(4, saes)
    one_by_one = collected_by(4, saes, memory=1, progress=lambda *done: seen.append(done))
    assert [4 * done / total for done, total in seen] == [1, 2, 3, 4]  # in characters of text
    for layer in saes:
        np.testing.assert_array_equal(one_by_one.statistics.layers[layer].sums, at_once.statistics.layers[layer].sums)
    assert one_by_one.health == at_once.health


def test_only_the_tokens_asked_for_count(collected_by):
    found = collected_by(2, {1: exact_sae()}, tokens="last", block_size=4)
    assert found.statistics.layers[1].tokens.tolist() == [4, 4, 4, 4, 4, 3]
    assert found.health[1].tokens == len(TEXTS)


def test_a_document_broken_for_one_group_of_layers_counts_for_none(collected_by, monkeypatch):
    """Layer 2 overflows on a document; the layers that were collected before are collected again without it."""
    document, read = 7, Collector.read

    def choosy(self, documents):
        if 2 in self.encoders and TEXTS[document] in documents:
            raise FloatingPointError("overflow")
        return read(self, documents)

    monkeypatch.setattr(Collector, "read", choosy)
    saes, one_encoder = {layer: exact_sae() for layer in range(3)}, 32 * 64 * 4
    found = collected_by(3, saes, memory=2 * one_encoder, skip_broken=True, block_size=4)
    assert found.broken == {document: "overflow"}
    tokens = [layer.tokens.tolist() for layer in found.statistics.layers.values()]
    assert tokens[0] == tokens[2]
