"""What an edit costs: loss on control text, per document, under whatever state the model is in."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import DocumentLosses

_CHUNK = 2**25  # logits held at once: 128 MiB in float32


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
    plain_head = _has_plain_head(model, torch.tensor([list(documents[order[0]])], device=model.device))
    start = 0
    while start < len(order):
        longest = len(documents[order[start]])
        batch = order[start : start + max(1, batch_tokens // longest)]
        # Padded on the right: under a causal mask no real token sees the padding, so no mask is needed.
        rows = [list(documents[i]) + [0] * (longest - len(documents[i])) for i in batch]
        ids = torch.tensor(rows, device=model.device)  # [documents, longest]
        losses = _token_losses(model, ids, plain_head=plain_head)  # [documents, longest - 1]
        lengths = torch.tensor([len(documents[i]) - 1 for i in batch], device=model.device)
        real = torch.arange(longest - 1, device=model.device) < lengths[:, None]
        sums[batch] = losses.where(real, 0.0).double().sum(1).cpu().numpy()
        start += len(batch)
    if not np.isfinite(sums).all():
        raise EvaluationError("the control loss is not finite", hint="evaluate in bfloat16 or float32, not float16")
    return DocumentLosses(sums=sums, tokens=np.array([max(len(d) - 1, 0) for d in documents], dtype=np.int64))


def _token_losses(
    model: PreTrainedModel, ids: Int[Tensor, "documents tokens"], *, plain_head: bool
) -> Float[Tensor, "documents predicted"]:
    if not plain_head:
        rows = [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ids]
        return torch.stack([_losses(logits, row[1:]) for logits, row in zip(rows, ids, strict=True)])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head, targets = model.get_output_embeddings(), ids[:, 1:].flatten()
    step = max(1, _CHUNK // head.weight.shape[0])
    parts = [_losses(head(h), t) for h, t in zip(hidden.split(step), targets.split(step), strict=True)]
    return torch.cat(parts).view(len(ids), -1)


def _losses(logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _has_plain_head(model: PreTrainedModel, ids: Int[Tensor, "documents tokens"]) -> bool:
    """Whether logits are the head of the last hidden state and nothing more (no soft cap, no scale)."""
    few = ids[:1, :8]
    logits = model(input_ids=few, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    head = model.get_output_embeddings()
    if head is None:
        return False
    ours = head(model.base_model(input_ids=few, use_cache=False).last_hidden_state[0, -1:])[0].float()
    return bool(torch.allclose(ours, logits, rtol=0.02, atol=0.02 * float(logits.abs().max())))
