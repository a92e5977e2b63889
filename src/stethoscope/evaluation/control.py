"""What an edit costs on control text, per document: loss, and divergence from the base's distributions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import DocumentDivergences, DocumentLosses
from stethoscope.losses import chunk_size, head_logits, run, token_losses

Documents = Sequence[Sequence[int]]


@torch.no_grad()
def document_losses(
    model: PreTrainedModel, documents: Documents, *, starts: Sequence[int] | None = None, batch_tokens: int = 4096
) -> DocumentLosses:
    """Next-token loss of every document, in nats.

    The log-softmax is taken in float32 over a few tokens at a time, so the logits of a whole batch never exist.

    Args:
        model: a causal language model, on its device, in the state to measure.
        documents: token ids of each document, cut to the length to be read; the first token is not predicted.
        starts: the first token of each document that counts, such as the first after a prompt; all if not given.
        batch_tokens: tokens of a batch, padding included.

    Returns:
        each document's summed loss and number of predicted tokens, in the documents' order.

    Raises:
        EvaluationError: no document has two tokens, none has one that counts, or a loss is not finite.
    """
    tokens = _predicted(documents, starts)
    if starts is not None and not tokens.any():
        raise EvaluationError("no token of the text counts", hint="its prompts fill the context: give shorter ones")
    sums = np.zeros(len(documents))
    for batch, ids in _batches(documents, batch_tokens):
        counted = _counted(ids, documents, batch, starts)
        sums[batch] = token_losses(model, run(model, ids), ids, counted).double().sum(1).cpu().numpy()
    if not np.isfinite(sums).all():
        raise EvaluationError("the control loss is not finite", hint="evaluate in bfloat16 or float32, not float16")
    return DocumentLosses(sums=sums, tokens=tokens)


@torch.no_grad()
def document_divergences(
    model: PreTrainedModel,
    arms: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    documents: Documents,
    *,
    batch_tokens: int = 4096,
) -> dict[str, DocumentDivergences]:
    """KL(base || arm) of the next-token distributions on every document, in nats, for all arms in one pass.

    Both sets of weights stay in memory and are exchanged within a batch, so the base's distributions are computed
    once for all arms and never stored; logits exist for a few tokens at a time, in float32.

    Args:
        model: in the base state, on its device.
        arms: name to a callable whose context puts the model into that arm's state and takes it back; it is entered
            many times, so give `Swap.entered` of `editing.apply.prepare`, which only exchanges pointers.
        documents: token ids of each document; the first token is not predicted.
        batch_tokens: tokens of a batch, padding included.

    Returns:
        each arm's summed divergence and number of predicted tokens by document; exactly 0 where an arm is the base.

    Raises:
        EvaluationError: no document has two tokens, or a divergence is not finite.
    """
    sums = {name: np.zeros(len(documents)) for name in arms}
    for batch, ids in _batches(documents, batch_tokens):
        output = run(model, ids)
        base = output.last_hidden_state[:, :-1].flatten(0, 1)
        changed = {}
        for name, enter in arms.items():
            with enter():
                changed[name] = run(model, ids)
        parts: dict[str, list[Tensor]] = {name: [] for name in arms}
        for start in range(0, len(base), step := chunk_size(model)):
            chosen = slice(start, start + step)
            expected = head_logits(model, output, base[chosen]).float().log_softmax(-1)
            for name, enter in arms.items():
                hidden = changed[name].last_hidden_state[:, :-1].flatten(0, 1)[chosen]
                with enter():
                    found = head_logits(model, changed[name], hidden).float().log_softmax(-1)
                loss = torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True)
                parts[name].append(loss.sum(-1))
        for name, tokens in parts.items():
            found = torch.cat(tokens).view(len(ids), -1)
            counted = _counted(ids, documents, batch).to(found.device)
            sums[name][batch] = found.where(counted, 0.0).double().sum(1).cpu().numpy()
    if bad := [f"arm `{name}`" for name, values in sums.items() if not np.isfinite(values).all()]:
        raise EvaluationError(
            "the divergence from the base is not finite",
            problems=bad,
            hint="evaluate in bfloat16 or float32, not float16",
        )
    return {name: DocumentDivergences(sums=values, tokens=_predicted(documents)) for name, values in sums.items()}


def _batches(documents: Documents, batch_tokens: int) -> Iterator[tuple[list[int], Int[Tensor, "rows tokens"]]]:
    """Documents of similar length: their numbers, and their ids padded on the right."""
    order = sorted((i for i, d in enumerate(documents) if len(d) > 1), key=lambda i: (-len(documents[i]), i))
    if not order:
        raise EvaluationError("no control document has two tokens", hint="give longer control text")
    while order:
        longest = len(documents[order[0]])
        size = max(1, batch_tokens // longest)
        batch, order = order[:size], order[size:]
        # Under a causal mask no real token sees the padding, so no mask is needed.
        yield batch, torch.tensor([list(documents[i]) + [0] * (longest - len(documents[i])) for i in batch])


def _counted(
    ids: Int[Tensor, "rows tokens"], documents: Documents, batch: Sequence[int], starts: Sequence[int] | None = None
) -> Bool[Tensor, "rows predicted"]:
    places = torch.arange(1, ids.shape[1])  # of the tokens that are predicted
    real = places < torch.tensor([len(documents[i]) for i in batch])[:, None]
    if starts is not None:
        real &= places >= torch.tensor([starts[i] for i in batch])[:, None]
    return real


def _predicted(documents: Documents, starts: Sequence[int] | None = None) -> Int[np.ndarray, " documents"]:
    first = [max(1, start) for start in starts] if starts is not None else [1] * len(documents)
    return np.array([max(len(d) - n, 0) for d, n in zip(documents, first, strict=True)], dtype=np.int64)
