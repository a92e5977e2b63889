"""Peaks: those of a plain loop, however text, tiles and layers are cut and whatever the order of the parts."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from world import random_sae

from stethoscope.diagnosis import encoding
from stethoscope.diagnosis.collect import collect_activations
from stethoscope.diagnosis.peaks import DOCUMENTS, KEPT, Peaks
from stethoscope.diagnosis.statistics import load_layers, save_layers
from stethoscope.errors import StethoscopeError
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.text.tokens import tokenize

TEXTS = [f"document {i}: " + "abc xyz "[i % 5 :] * (1 + i % 4) for i in range(23)]
COLUMNS = ("features", "documents", "tokens", "activations")


def same(one: Peaks, other: Peaks) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in COLUMNS)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated", "transcoder"])
def test_they_are_those_of_a_plain_loop_on_tiles_that_cut_documents_and_features(kind, llama, tokenizer, monkeypatch):
    monkeypatch.setitem(encoding.TILE_TOKENS, "cpu", 16)
    monkeypatch.setitem(encoding.TILE_WIDTH, "cpu", 70)
    model, sae = llama(layers=2), random_sae(kind, width=200)
    texts, options = [*TEXTS, *TEXTS[::-1], *TEXTS[5:], *TEXTS[:5]], {"block_size": 7, "health_tokens": 0}
    peaks = collect_activations(model, tokenizer, {1: sae}, {"all": texts}, **options)["all"]
    rows, point = tokenize(texts, tokenizer), {1: hook_point(model, 1, "resid_post")}
    encoded = [sae.encode(read_activations(model, point, torch.tensor([row]))[1][0]) for row in rows[:DOCUMENTS]]
    largest = torch.stack([one.amax(0) for one in encoded])
    for feature in range(200):
        found = peaks.peaks[1].of(feature)
        strongest = sorted(largest[largest[:, feature] > 0, feature].tolist(), reverse=True)[:KEPT]
        np.testing.assert_allclose(found.activations, strongest, rtol=1e-4, atol=1e-5)
        assert len(set(found.documents)) == len(found.documents)
        for document, token, activation in zip(found.documents, found.tokens, found.activations, strict=True):
            assert encoded[document][token, feature].item() == pytest.approx(activation, rel=1e-4, abs=1e-5)


def test_they_do_not_depend_on_groups_of_layers_and_survive_the_disk(llama, tokenizer, tmp_path):
    saes = {layer: random_sae("jumprelu") for layer in range(3)}
    ways = [{}, {"memory": 1}, {"block_size": 64}, {"health_tokens": 0}]
    (whole, *others) = (
        collect_activations(llama(layers=3), tokenizer, saes, {"all": TEXTS}, **{"block_size": 5, **way})["all"].peaks
        for way in ways
    )
    save_layers(tmp_path / "peaks.safetensors", {"a.b": whole})
    for other in (*others[:1], others[2], load_layers(tmp_path / "peaks.safetensors", Peaks)["a.b"]):
        assert all(same(other[layer], found) for layer, found in whole.items())
    # batches are others there, and with them the last bits
    for layer, found in whole.items():
        np.testing.assert_allclose(others[1][layer].activations, found.activations, rtol=1e-4)
    (tmp_path / "peaks.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(StethoscopeError, match="the peaks `"):
        load_layers(tmp_path / "peaks.safetensors", Peaks)


def test_the_strongest_are_kept_in_whatever_order_parts_are_joined():
    rng, chance = np.random.default_rng(0), random.Random(0)
    pairs = np.argwhere(rng.random((50, 40)) < 0.5)
    columns = [pairs[:, 0], pairs[:, 1], rng.integers(99, size=len(pairs))]
    strengths = rng.integers(1, 12, size=len(pairs)).astype(np.float32)  # many are equal
    columns = [*(column.astype(np.int32) for column in columns), strengths]
    parts = [
        Peaks(**dict(zip(COLUMNS, (column[n : n + 1] for column in columns), strict=True))) for n in range(len(pairs))
    ]
    whole = Peaks.strongest(parts)
    for feature in range(50):
        mine = pairs[:, 0] == feature
        wanted = sorted(zip(-strengths[mine], pairs[mine, 1], strict=True))[:KEPT]
        assert list(zip(-whole.of(feature).activations, whole.of(feature).documents, strict=True)) == wanted
    for _ in range(5):
        chance.shuffle(parts)
        cuts = [0, *sorted(chance.sample(range(1, len(parts)), 6)), len(parts)]
        some = [Peaks.strongest(parts[a:b]) for a, b in pairwise(cuts)]
        assert same(Peaks.strongest(some), whole)
