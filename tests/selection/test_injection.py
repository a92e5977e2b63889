"""Rivals find the layers that the skill was planted in, and first-order effects are the slopes of true ones."""

import numpy as np
import pytest
import torch
from world import plant, save_pair

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.models import narrow
from stethoscope.models.load import load_model
from stethoscope.selection import baselines
from stethoscope.selection.baselines import gradient
from stethoscope.selection.injection import forwards, local_effect, measure, standard_error
from stethoscope.text.tokens import batches, prompt_lengths, tokenize

SMALL = 1e-2


def slope(model, edits, texts, change, corpus="target"):
    """The true effect per unit of coefficient, by a central difference."""
    scaled = [{layer: s * SMALL * c for layer, c in change.items()} for s in (1, -1)]
    up, down = measure(model, edits, texts, scaled).mean(corpus)
    return (up - down) / (2 * SMALL)


@pytest.mark.parametrize(("family", "seed"), [("Llama", n) for n in range(4)] + [("Gemma3", n) for n in range(2)])
def test_planted_layers_come_first(family, seed, tmp_path, tokenizer):
    rng = np.random.default_rng(seed)
    layers = tuple(sorted(rng.choice(6, size=2, replace=False).tolist()))
    made = plant(tmp_path, tokenizer, family=family, layers=layers, seed=seed, batch_tokens=4096)
    edits = LayerEdits(made.model, made.task_vector)
    for found in (
        measure(made.model, edits, made.texts, [{layer: 1.0} for layer in range(6)]),
        gradient(made.model, made.task_vector, made.texts),
        local_effect(made.model, edits, made.texts),
    ):
        assert tuple(sorted(np.argsort(-found.score())[:2].tolist())) == layers


@torch.no_grad()
def test_an_effect_is_the_loss_of_the_edited_model_per_document(planted, edits):
    found = measure(planted.model, edits, planted.texts, [{4: 0.5}])
    for corpus, text in planted.texts.items():
        for batch in text:
            for row, document in enumerate(batch.documents):
                ids = batch.input_ids[row][batch.attention_mask[row]][None]
                before = planted.model(ids, labels=ids).loss * (ids.shape[1] - 1)
                with edits.entered({4: 0.5}):
                    after = planted.model(ids, labels=ids).loss * (ids.shape[1] - 1)
                assert found.tokens[corpus][document] == ids.shape[1] - 1
                assert found.losses[corpus][document] == pytest.approx(float(before), rel=1e-5)
                assert found.sums[corpus][document, 0] == pytest.approx(float(before - after), rel=1e-3, abs=1e-4)


def test_sets_are_measured_as_sets_and_nothing_costs_nothing(planted, edits):
    changes = [{}, {1: 1.0, 4: 1.0}, {4: 0.0, 1: 1.0}, {1: 1.0}, dict.fromkeys(range(6), 1.0)]
    found = measure(planted.model, edits, planted.texts, changes)
    gain = found.mean("target")
    assert gain[0] == 0
    assert gain[1] > gain[3] == gain[2]
    assert found.changes[1] == {1: 1.0, 4: 1.0}
    assert forwards(changes, 6) == pytest.approx(1 + 0 + 5 / 6 + 5 / 6 + 5 / 6 + 1)


def test_gradient_effects_are_the_slopes_of_the_truth(planted, edits):
    found = gradient(planted.model, planted.task_vector, planted.texts)
    for corpus in planted.texts:
        mean = found.mean(corpus)
        for layer in range(6):
            true = slope(planted.model, edits, planted.texts, {layer: 1.0}, corpus)
            assert mean[layer] == pytest.approx(true, rel=0.02, abs=2e-4)
        together = slope(planted.model, edits, planted.texts, dict.fromkeys(range(6), 1.0), corpus)
        assert mean.sum() == pytest.approx(together, rel=0.02, abs=5e-4)
    small = local_effect(planted.model, edits, planted.texts, coefficient=1e-3).mean("target") / 1e-3
    np.testing.assert_allclose(small, found.mean("target"), rtol=0.01, atol=2e-3)


def test_matrices_that_stay_16_bit_have_their_gradients(tmp_path, tokenizer, monkeypatch):
    base, tuned = save_pair("qwen2", tmp_path)
    change, rng = open_task_vector(open_checkpoint(base), tuned), np.random.default_rng(0)
    texts = {"target": list(batches([rng.integers(3, 48, size=12).tolist() for _ in range(4)], tokenizer))}
    wide = gradient(load_model(base, dtype=torch.float32), change, texts)
    monkeypatch.setattr(narrow, "LARGE", 0.0)
    found = gradient(load_model(base, dtype=torch.float32), change, texts)
    np.testing.assert_allclose(found.mean("target"), wide.mean("target"), rtol=0.02)


@pytest.mark.parametrize("layout", ["gemma2", "gemma3 multimodal", "gpt2", "mixtral"])
def test_first_order_effects_of_other_classes(layout, tmp_path, tokenizer):
    base, tuned = save_pair(layout, tmp_path, dtype=torch.float32)
    model, change = load_model(base, dtype=torch.float32), open_task_vector(open_checkpoint(base), tuned)
    rng = np.random.default_rng(0)
    texts = {"target": list(batches([rng.integers(3, 48, size=12).tolist() for _ in range(4)], tokenizer))}
    found = gradient(model, change, texts).mean("target")
    edits = LayerEdits(model, change)
    local = local_effect(model, edits, texts, coefficient=SMALL).mean("target") / SMALL
    for layer in range(3):
        true = slope(model, edits, texts, {layer: 1.0})
        assert found[layer] == pytest.approx(true, rel=0.03, abs=1e-4)
        assert local[layer] == pytest.approx(true, rel=0.1, abs=2e-3)


def test_gradients_are_freed_at_once_and_a_task_vector_that_does_not_fit_is_read_again(planted, monkeypatch):
    roomy = gradient(planted.model, planted.task_vector, planted.texts)
    alive, dot = [], baselines._dot

    def counting(*args):
        alive.append(sum(p.grad is not None for p in planted.model.parameters()))
        return dot(*args)

    monkeypatch.setattr(baselines, "_dot", counting)
    tight = gradient(planted.model, planted.task_vector, planted.texts, memory=0)
    assert len(alive) == 9 * 6 * sum(map(len, planted.texts.values()))
    assert max(alive) == 0
    for corpus, sums in tight.sums.items():
        np.testing.assert_array_equal(sums, roomy.sums[corpus])
    assert not any(p.requires_grad or p.grad is not None for p in planted.model.parameters())


def test_the_error_of_a_mean_is_that_of_a_ratio():
    rng = np.random.default_rng(0)
    sums = rng.normal(size=(50, 3))
    alike = np.full(50, 4, dtype=np.int64)
    np.testing.assert_allclose(standard_error(sums, alike), sums.std(0, ddof=1) / np.sqrt(50) / 4)
    lengths = rng.integers(5, 50, size=50)
    assert standard_error(0.3 * lengths[:, None].astype(float), lengths) == pytest.approx(0, abs=1e-12)
    assert np.isnan(standard_error(sums[:1], alike[:1])).all()


@torch.no_grad()
def test_only_what_follows_a_prompt_counts(planted, edits, tokenizer):
    rows = tokenize(["ab cd", "abc ab"], tokenizer)
    starts = prompt_lengths(rows, tokenize(["ab", "abc"], tokenizer))
    texts = {"target": list(batches(rows, tokenizer, starts=starts)), "all": list(batches(rows, tokenizer))}
    found = measure(planted.model, edits, texts, [{4: 1.0}])
    for n, (row, start) in enumerate(zip(rows, starts, strict=True)):
        with edits.entered({4: 1.0}):
            after = planted.model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        before = planted.model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        gains = (after - before)[range(len(row) - 1), row[1:]]
        assert found.tokens["target"][n] == len(row) - start < found.tokens["all"][n]
        assert found.sums["target"][n, 0] == pytest.approx(float(gains[start - 1 :].sum()), abs=1e-4)
    slopes = gradient(planted.model, planted.task_vector, texts), local_effect(planted.model, edits, texts)
    for effect in slopes:
        assert effect.tokens["target"].sum() == found.tokens["target"].sum()
        assert effect.losses["target"].sum() == pytest.approx(found.losses["target"].sum(), rel=1e-5)
    with pytest.raises(StethoscopeError, match="no token of a text counts"):
        measure(planted.model, edits, {"target": list(batches(rows[:1], tokenizer, starts=[len(rows[0])]))}, [{4: 1.0}])
