"""What an edit costs: loss on control text, per document, under whatever state the model is in."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import DocumentLosses
from stethoscope.losses import run, token_losses


@torch.no_grad()
def document_losses(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], *, batch_tokens: int = 4096
) -> DocumentLosses:
    """Next-token loss of every document, in nats.

    The log-softmax is taken in float32 over a few tokens at a time, so the logits of a whole batch never exist.

    Args:
        model: a causal language model, on its device, in the state to measure.
        documents: token ids of each document, cut to the length to be read; the first token is not predicted.
        batch_tokens: tokens of a batch, padding included.

    Returns:
        each document's summed loss and number of predicted tokens, in the documents' order.

    Raises:
        EvaluationError: no document has two tokens, or a loss is not finite.
    """
    order = sorted((i for i, d in enumerate(documents) if len(d) > 1), key=lambda i: (-len(documents[i]), i))
    if not order:
        raise EvaluationError("no control document has two tokens", hint="give longer control text")
    sums = np.zeros(len(documents))
    start = 0
    while start < len(order):
        longest = len(documents[order[start]])
        batch = order[start : start + max(1, batch_tokens // longest)]
        # Padded on the right: under a causal mask no real token sees the padding, so no mask is needed.
        rows = [list(documents[i]) + [0] * (longest - len(documents[i])) for i in batch]
        ids = torch.tensor(rows, device=model.device)  # [documents, longest]
        losses = token_losses(model, run(model, ids), ids)  # [documents, longest - 1]
        lengths = torch.tensor([len(documents[i]) - 1 for i in batch], device=model.device)
        real = torch.arange(longest - 1, device=model.device) < lengths[:, None]
        sums[batch] = losses.where(real, 0.0).double().sum(1).cpu().numpy()
        start += len(batch)
    if not np.isfinite(sums).all():
        raise EvaluationError("the control loss is not finite", hint="evaluate in bfloat16 or float32, not float16")
    return DocumentLosses(sums=sums, tokens=np.array([max(len(d) - 1, 0) for d in documents], dtype=np.int64))
