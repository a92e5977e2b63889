"""Control loss per document equals a document-by-document computation, for heads with and without a soft cap."""

import numpy as np
import pytest
import torch

from stethoscope import losses
from stethoscope.errors import EvaluationError
from stethoscope.evaluation import control


def by_hand(model, document):
    ids = torch.tensor([document])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


@pytest.mark.parametrize("cap", [None, 5.0])
def test_losses_are_each_documents_own(any_model, cap, monkeypatch):
    if cap and hasattr(any_model.config, "final_logit_softcapping"):
        any_model.config.final_logit_softcapping = cap
    monkeypatch.setattr(losses, "CHUNK", 259 * 7)
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 259, size=n).tolist() for n in (40, 1, 7, 90, 2, 33)]
    found = control.document_losses(any_model, documents, batch_tokens=128)
    assert found.tokens.tolist() == [39, 0, 6, 89, 1, 32]
    expected = [by_hand(any_model, d) if len(d) > 1 else 0.0 for d in documents]
    assert found.sums == pytest.approx(expected, rel=1e-4)
    assert found.mean == pytest.approx(sum(expected) / 167, rel=1e-4)


def test_no_text_is_refused(stirred_llama):
    with pytest.raises(EvaluationError, match="two tokens"):
        control.document_losses(stirred_llama, [[1], []])
