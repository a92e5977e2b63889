"""What an edit costs on control text, per document: loss, and divergence from the base's distributions.

document_losses(model, documents)                                  # the model as it stands
document_costs(model, {"edited": swap.entered}, documents)         # of many arms, loss and divergence in one pass
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import Artifact, Provenance, Saved
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import DocumentDivergences, DocumentLosses, PerDocument
from stethoscope.losses import chunk_size, head_logits, run, token_losses

Documents = Sequence[Sequence[int]]
Arms = Mapping[str, Callable[[], AbstractContextManager[Any]]]


class _Measured(Artifact):
    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls: type[Saved], measured: PerDocument, provenance: Provenance) -> Saved:
        """What was measured, ready to be saved."""
        return cls.model_validate({"provenance": provenance, **measured.to_dict()})


class TextLoss(_Measured):
    """One arm's loss on each document of a text: sums in nats over predicted tokens."""

    FILE: ClassVar[str] = "loss.json"

    @property
    def measured(self) -> DocumentLosses:
        """As it was measured."""
        return DocumentLosses.from_dict({"sums": self.sums, "tokens": self.tokens})


class TextDivergence(_Measured):
    """One arm's divergence from the base on each document of a text: sums in nats over predicted tokens."""

    FILE: ClassVar[str] = "divergence.json"

    @property
    def measured(self) -> DocumentDivergences:
        """As it was measured."""
        return DocumentDivergences.from_dict({"sums": self.sums, "tokens": self.tokens})


@dataclass(frozen=True, kw_only=True)
class DocumentCosts:
    """One arm's loss on each document of a text, and its divergence from the base."""

    loss: DocumentLosses
    divergence: DocumentDivergences

    def save(self, folder: Path, provenance: Provenance) -> None:
        """Write ``loss.json`` and ``divergence.json``."""
        TextLoss.of(self.loss, provenance).save(folder)
        TextDivergence.of(self.divergence, provenance).save(folder)

    @classmethod
    def load_if_current(cls, folder: Path, provenance: Provenance) -> "DocumentCosts | None":
        """What `save` wrote, if both were made from exactly these inputs; else None."""
        loss = TextLoss.load_if_current(folder, provenance)
        divergence = TextDivergence.load_if_current(folder, provenance)
        if loss is None or divergence is None:
            return None
        return cls(loss=loss.measured, divergence=divergence.measured)


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
    tokens = _checked(documents, starts)
    sums = np.zeros(len(documents))
    for batch, ids in _batches(documents, batch_tokens):
        counted = _counted(ids, documents, batch, starts)
        sums[batch] = token_losses(model, run(model, ids), ids, counted).double().sum(1).cpu().numpy()
    if not np.isfinite(sums).all():
        raise EvaluationError("the control loss is not finite", hint="evaluate in bfloat16 or float32, not float16")
    return DocumentLosses(sums=sums, tokens=tokens)


def document_divergences(
    model: PreTrainedModel, arms: Arms, documents: Documents, *, batch_tokens: int = 4096
) -> dict[str, DocumentDivergences]:
    """KL(base || arm) of the next-token distributions on every document, in nats; the divergences of `document_costs`.

    Raises:
        EvaluationError: no document has two tokens, or a divergence is not finite.
    """
    found = document_costs(model, arms, documents, batch_tokens=batch_tokens)
    return {name: costs.divergence for name, costs in found.items()}


@torch.no_grad()
def document_costs(
    model: PreTrainedModel,
    arms: Arms,
    documents: Documents,
    *,
    starts: Sequence[int] | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, DocumentCosts]:
    """Loss, and KL(base || arm) of the next-token distributions, on every document, in nats, for all arms in one pass.

    All sets of weights stay in memory and are exchanged within a batch, so the base's distributions are computed
    once for all arms and never stored; logits exist for a few tokens at a time, in float32.

    Args:
        model: in the base state, on its device.
        arms: name to a callable whose context puts the model into that arm's state and takes it back; it is entered
            many times, so give `Swap.entered` of `editing.apply.prepare`, which only exchanges pointers. An arm that
            is `contextlib.nullcontext` is the base, which is run anyway.
        documents: token ids of each document; the first token is not predicted.
        starts: the first token of each document whose loss counts, as for `document_losses`; divergences count all.
        batch_tokens: tokens of a batch, padding included.
        progress: called with tokens that are predicted, done and in all.

    Returns:
        by arm; the losses are those of `document_losses`, and the base's divergence is exactly 0.

    Raises:
        EvaluationError: no document has two tokens, none has one that counts, or a value is not finite.
    """
    tokens = _predicted(documents)
    counted = _checked(documents, starts)
    losses, divergences = ({name: np.zeros(len(documents)) for name in arms} for _ in range(2))
    done = 0
    for batch, ids in _batches(documents, batch_tokens):
        output = run(model, ids)
        changed = {}
        for name, enter in arms.items():
            if enter is not nullcontext:
                with enter():
                    changed[name] = run(model, ids)
        hidden = {name: found.last_hidden_state[:, :-1].flatten(0, 1) for name, found in changed.items()}
        base, targets = output.last_hidden_state[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(model.device)
        real = _counted(ids, documents, batch)
        sums = {name: base.new_zeros(2, len(targets), dtype=torch.float32) for name in arms}
        for some in real.flatten().nonzero()[:, 0].to(model.device).split(chunk_size(model)):
            expected = head_logits(model, output, base[some]).float().log_softmax(-1)
            for name, enter in arms.items():
                found = expected
                if enter is not nullcontext:
                    with enter():
                        found = head_logits(model, changed[name], hidden[name][some]).float().log_softmax(-1)
                    apart = torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True)
                    sums[name][1, some] = apart.sum(-1)
                sums[name][0, some] = -found.gather(1, targets[some, None])[:, 0]
        for name, (loss, divergence) in sums.items():
            judged = _counted(ids, documents, batch, starts).to(loss.device)
            losses[name][batch] = loss.view(judged.shape).where(judged, 0.0).double().sum(1).cpu().numpy()
            divergences[name][batch] = divergence.view(judged.shape).double().sum(1).cpu().numpy()
        done += int(tokens[batch].sum())
        if progress:
            progress(done, int(tokens.sum()))
    for what, measured in {"control loss": losses, "divergence from the base": divergences}.items():
        if bad := [f"arm `{name}`" for name, values in measured.items() if not np.isfinite(values).all()]:
            raise EvaluationError(
                f"the {what} is not finite", problems=bad, hint="evaluate in bfloat16 or float32, not float16"
            )
    return {
        name: DocumentCosts(
            loss=DocumentLosses(sums=losses[name], tokens=counted),
            divergence=DocumentDivergences(sums=divergences[name], tokens=tokens),
        )
        for name in arms
    }


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


def _checked(documents: Documents, starts: Sequence[int] | None) -> Int[np.ndarray, " documents"]:
    """Tokens of each document whose loss counts."""
    tokens = _predicted(documents, starts)
    if starts is not None and not tokens.any():
        raise EvaluationError("no token of the text counts", hint="its prompts fill the context: give shorter ones")
    return tokens


@dataclass(frozen=True, kw_only=True)
class ArmLosses:
    """Every arm's losses on the recipe's texts; each is empty where the recipe names no such text."""

    general: dict[str, DocumentCosts]
    target: dict[str, DocumentLosses]
