"""Control loss and divergence per document equal a document-by-document one, for heads with and without a soft cap."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from stethoscope.errors import EvaluationError
from stethoscope.evaluation import text_loss
from stethoscope.models import forward
from stethoscope.text.tokens import prompt_lengths

caps = pytest.mark.parametrize("cap", [None, 5.0])


@pytest.fixture
def documents(monkeypatch) -> list[list[int]]:
    monkeypatch.setattr(forward, "CHUNK", 259 * 7)
    rng = np.random.default_rng(0)
    return [rng.integers(3, 259, size=n).tolist() for n in (40, 1, 7, 21, 2)]


def capped(model, cap):
    if cap and hasattr(model.config, "final_logit_softcapping"):
        model.config.final_logit_softcapping = cap
    return model


def logits(model, document):
    return model(input_ids=torch.tensor([document])).logits[0, :-1].double().log_softmax(-1)


def by_hand(model, document):
    found = logits(model, document)
    return -float(found[range(len(document) - 1), document[1:]].sum()) if len(document) > 1 else 0.0


@caps
def test_losses_are_each_documents_own(any_model, cap, documents):
    model = capped(any_model, cap)
    found = text_loss.document_losses(model, documents, batch_tokens=64)
    assert found.tokens.tolist() == [39, 0, 6, 20, 1]
    expected = [by_hand(model, document) for document in documents]
    assert found.sums == pytest.approx(expected, rel=1e-4)


def test_no_text_is_refused(stirred_llama):
    with pytest.raises(EvaluationError, match="two tokens"):
        text_loss.document_losses(stirred_llama, [[1], []])
    with pytest.raises(EvaluationError, match="two tokens"):
        text_loss.BaseText(stirred_llama, [[1], []])


def test_a_loss_that_float16_cannot_hold_is_refused(stirred_llama):
    """As activations of Gemma would be."""
    stirred_llama.get_input_embeddings().weight.data *= 1e7
    assert np.isfinite(text_loss.document_losses(stirred_llama.bfloat16(), [[3, 4, 5]]).sums).all()
    stirred_llama.half()
    for measured in (text_loss.document_losses, lambda *given: text_loss.BaseText(*given).costs()):
        with pytest.raises(EvaluationError, match="the loss is not finite") as caught:
            measured(stirred_llama, [[3, 4, 5]])
        assert "not float16" in caught.value.hint


def turned(model, scale):
    """The head and one block scaled: hidden states and the head itself differ between the states."""

    @contextmanager
    def enter():
        weights = [model.get_output_embeddings().weight, next(p for p in model.base_model.parameters() if p.ndim > 1)]
        before = [w.data for w in weights]
        try:
            for weight in weights:
                weight.data = weight.data * scale
            yield
        finally:
            for weight, own in zip(weights, before, strict=True):
                weight.data = own

    return enter


@caps
def test_divergences_are_the_definition(any_model, cap, documents):
    model = capped(any_model, cap)
    arms = {"same": nullcontext, "warm": turned(model, 0.7), "hot": turned(model, 0.2)}
    base = text_loss.BaseText(model, documents, batch_tokens=64)
    found = {name: base.costs(enter).divergence for name, enter in arms.items()}
    for name, enter in arms.items():
        expected = []
        for document in documents:
            p = logits(model, document)
            with enter():
                q = logits(model, document)
            expected.append(float((p.exp() * (p - q)).sum()))
        assert found[name].sums == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found[name].tokens.tolist() == [39, 0, 6, 20, 1]
    assert not found["same"].sums.any()  # the base against itself, to the bit
    assert 0 < found["warm"].sums.sum() < found["hot"].sums.sum()


@pytest.mark.parametrize("starts", [None, [5, 1, 3, 1, 1]])
def test_costs_hold_the_losses_that_each_arm_gives_alone(any_model, starts, documents):
    arms = {"base": nullcontext, "warm": turned(any_model, 0.7)}
    options = {"starts": starts, "batch_tokens": 64}
    base = text_loss.BaseText(any_model, documents, **options)
    found = {name: base.costs(enter) for name, enter in arms.items()}
    for name, enter in arms.items():
        with enter():
            alone = text_loss.document_losses(any_model, documents, **options)
        assert found[name].loss.tokens.tolist() == alone.tokens.tolist()
        assert found[name].loss.sums == pytest.approx(alone.sums, rel=1e-6)
        if starts is None:  # the same tokens go through the head together
            assert (found[name].loss.sums == alone.sums).all()
    assert found["base"].divergence.tokens.tolist() == [39, 0, 6, 20, 1]


def test_only_what_follows_a_prompt_counts(any_model):
    documents = [[3, 5, 7, 9, 11, 4], [6, 2, 8], [1, 2]]
    starts = prompt_lengths(documents, [[3, 5, 7], [6, 9], [1, 2]])
    assert starts == [3, 1, 2]  # a token that the whole text joins otherwise is the document's
    found = text_loss.document_losses(any_model, documents, starts=starts)
    assert found.tokens.tolist() == [3, 2, 0]
    expected = [by_hand(any_model, d) - by_hand(any_model, d[:n]) for d, n in zip(documents, starts, strict=True)]
    assert found.sums == pytest.approx(expected, abs=1e-4)
    with pytest.raises(EvaluationError, match="no token of the text counts"):
        text_loss.document_losses(any_model, documents, starts=[9, 9, 9])
