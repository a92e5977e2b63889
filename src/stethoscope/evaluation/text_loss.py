"""What an edit costs on text, per document: loss, and divergence from the base's distributions.

document_losses(model, documents)                                  # the model as it stands
document_costs(model, {"edited": swap.entered}, documents)         # of many arms, loss and divergence in one pass
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import Artifact, Provenance, Saved
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import PerDocument
from stethoscope.losses import chunk_size, head_logits, run, token_losses

Documents = Sequence[Sequence[int]]
Arms = Mapping[str, Callable[[], AbstractContextManager[Any]]]


class TextLoss(Artifact):
    """One arm's loss on each document of a text: sums in nats over predicted tokens."""

    FILE: ClassVar[str] = "loss.json"

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls: type[Saved], measured: PerDocument, provenance: Provenance) -> Saved:
        """What was measured, ready to be saved."""
        values = {"sums": measured.sums.tolist(), "tokens": measured.tokens.tolist()}
        return cls.model_validate({"provenance": provenance, **values})

    @property
    def measured(self) -> PerDocument:
        """As it was measured."""
        return PerDocument(sums=np.array(self.sums, dtype=np.float64), tokens=np.array(self.tokens, dtype=np.int64))


class TextDivergence(TextLoss):
    """One arm's divergence from the base on each document of a text: sums in nats over predicted tokens."""

    FILE: ClassVar[str] = "divergence.json"


class DocumentCosts(NamedTuple):
    """One arm's loss on each document of a text, and its divergence from the base, KL(base || arm)."""

    loss: PerDocument
    divergence: PerDocument

    def save(self, folder: Path, provenance: Provenance) -> None:
        """Write ``loss.json`` and ``divergence.json``."""
        TextLoss.of(self.loss, provenance).save(folder)
        TextDivergence.of(self.divergence, provenance).save(folder)

    @classmethod
    def load_if_current(cls, folder: Path, provenance: Provenance) -> "DocumentCosts | None":
        """What `save` wrote, if both were made from exactly these inputs; else None."""
        loss = TextLoss.load_if_current(folder, provenance)
        divergence = TextDivergence.load_if_current(folder, provenance)
        return cls(loss.measured, divergence.measured) if loss and divergence else None


class ArmLosses(NamedTuple):
    """Every arm's losses on the recipe's texts; each is empty where the recipe names no such text."""

    general: dict[str, DocumentCosts]
    target: dict[str, PerDocument]


@torch.no_grad()
def document_losses(
    model: PreTrainedModel, documents: Documents, *, starts: Sequence[int] | None = None, batch_tokens: int = 4096
) -> PerDocument:
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
    tokens, sums = _predicted(documents, starts), np.zeros(len(documents))
    for batch, ids in _batches(documents, batch_tokens):
        counted = _counted(ids, documents, batch, starts)
        sums[batch] = token_losses(model, run(model, ids), ids, counted).double().sum(1).cpu().numpy()
    _check_finite("control loss", {"": sums})
    return PerDocument(sums=sums, tokens=tokens)


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
    tokens, judged_tokens = _predicted(documents), _predicted(documents, starts)
    losses, divergences = ({name: np.zeros(len(documents)) for name in arms} for _ in range(2))
    edits = {name: enter for name, enter in arms.items() if enter is not nullcontext}
    done = 0
    for batch, ids in _batches(documents, batch_tokens):
        base, changed = run(model, ids), {}
        for name, enter in edits.items():
            with enter():
                changed[name] = run(model, ids)
        judged = _counted(ids, documents, batch, starts).to(model.device)
        sums = {name: torch.zeros(2, *judged.shape, device=model.device) for name in arms}
        targets = ids[:, 1:].to(model.device)
        for rows, columns in _places(_counted(ids, documents, batch).to(model.device), chunk_size(model)):
            expected = _log_probabilities(model, base, rows, columns)
            for name in arms:
                found = expected
                if name in edits:
                    with edits[name]():
                        found = _log_probabilities(model, changed[name], rows, columns)
                    apart = torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True)
                    sums[name][1, rows, columns] = apart.sum(-1)
                sums[name][0, rows, columns] = -found.gather(1, targets[rows, columns, None])[:, 0]
        for name, (loss, divergence) in sums.items():
            losses[name][batch] = loss.where(judged, 0.0).double().sum(1).cpu().numpy()
            divergences[name][batch] = divergence.double().sum(1).cpu().numpy()
        done += int(tokens[batch].sum())
        if progress:
            progress(done, int(tokens.sum()))
    _check_finite("control loss", losses)
    _check_finite("divergence from the base", divergences)
    return {
        name: DocumentCosts(
            loss=PerDocument(sums=losses[name], tokens=judged_tokens),
            divergence=PerDocument(sums=divergences[name], tokens=tokens),
        )
        for name in arms
    }


def _places(counted: Bool[Tensor, "rows predicted"], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the tokens that count, so many at a time."""
    rows, columns = counted.nonzero(as_tuple=True)
    return zip(rows.split(size), columns.split(size), strict=True)


def _log_probabilities(model: PreTrainedModel, output: Any, rows: Tensor, columns: Tensor) -> Tensor:
    """The model's log-probabilities after some tokens of a batch, shape [some, vocabulary]."""
    return head_logits(model, output, output.last_hidden_state[rows, columns]).float().log_softmax(-1)


def _check_finite(what: str, measured: Mapping[str, Any]) -> None:
    bad = [name for name, values in measured.items() if not np.isfinite(values).all()]
    if bad:
        raise EvaluationError(
            f"the {what} is not finite",
            problems=[f"arm `{name}`" for name in bad if name],
            hint="evaluate in bfloat16 or float32, not float16",
        )


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
    return real if starts is None else real & (places >= torch.tensor([starts[i] for i in batch])[:, None])


def _predicted(documents: Documents, starts: Sequence[int] | None = None) -> Int[np.ndarray, " documents"]:
    """Tokens of each document whose loss counts."""
    first = [1] * len(documents) if starts is None else [max(1, start) for start in starts]
    tokens = np.array([max(len(d) - n, 0) for d, n in zip(documents, first, strict=True)], dtype=np.int64)
    if starts is not None and not tokens.any():
        raise EvaluationError("no token of the text counts", hint="its prompts fill the context: give shorter ones")
    return tokens
