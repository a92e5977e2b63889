"""What an edit costs on text, per document: loss, and divergence from the base's distributions.

document_losses(model, documents)                   # the model as it stands
BaseText(model, documents).costs(swap.entered)      # an arm's loss and divergence; one arm is in memory at a time
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import Artifact, Provenance, Saved
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import PerDocument
from stethoscope.models.forward import chunk_size, head_logits, run, token_losses
from stethoscope.text.tokens import by_length

Documents = Sequence[Sequence[int]]  # token ids
Enter = Callable[[], AbstractContextManager[Any]]


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
    """Next-token loss of every document, in nats, by a float32 log-softmax over a few tokens at a time.

    Args:
        model: a causal language model, on its device, in the state to measure.
        documents: token ids of each document, cut to the length to be read; the first token is not predicted.
        starts: the first token of each document that counts, such as the first after a prompt; all if not given.
        batch_tokens: tokens of a batch, padding included.

    Raises:
        EvaluationError: no document has two tokens, none has one that counts, or a loss is not finite.
    """
    found = _zeros(len(documents))
    for batch, ids, _, judged in _batches(documents, starts, batch_tokens):
        found.tokens[batch] = judged.sum(1)
        found.sums[batch] = token_losses(model, run(model, ids), ids, judged).double().sum(1).cpu()
    _check_finite("loss", found)
    return found


class BaseText:
    """A text as the base reads it, which every arm's costs are measured against.

    Its last hidden states are kept, in main memory; its distributions are a vocabulary each and made anew for each arm.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        documents: Documents,
        starts: Sequence[int] | None = None,
        *,
        batch_tokens: int = 4096,
    ) -> None:
        """Read the text once.

        Args:
            model: in the base state, on its device.
            starts: the first token of each document whose loss counts; divergences count all.

        Others and errors: as for `document_losses`.
        """
        self.model, self.size = model, len(documents)
        self.batches = list(_batches(documents, starts, batch_tokens))
        self.outputs = []
        for _, ids, _, _ in self.batches:
            self.outputs.append(run(model, ids))
            self.outputs[-1].last_hidden_state = self.outputs[-1].last_hidden_state.cpu()

    @torch.no_grad()
    def costs(self, enter: Enter = nullcontext) -> DocumentCosts:
        """An arm's loss, and KL(base || arm) of the next-token distributions, on every document, in nats.

        Losses are those that `document_losses` gives.

        Args:
            enter: its context puts the model into the arm's state and takes it back. It is entered many times, so give
                `Swap.entered` of `editing.apply.prepare`, which only exchanges pointers. `contextlib.nullcontext` is
                the base, whose divergence is exactly 0.

        Raises:
            EvaluationError: a loss or a divergence is not finite.
        """
        model, device = self.model, self.model.device
        costs = DocumentCosts(_zeros(self.size), _zeros(self.size))
        for (batch, ids, real, judged), base in zip(self.batches, self.outputs, strict=True):
            if enter is not nullcontext:
                with enter():
                    output = run(model, ids)
            sums = torch.zeros(2, *real.shape, device=device)  # losses, divergences
            targets = ids[:, 1:].to(device)
            for some in real.nonzero().split(chunk_size(model)):
                at = some[:, 0], some[:, 1]
                hidden = base.last_hidden_state[at].to(device)
                found = expected = head_logits(model, base, hidden).float().log_softmax(-1)
                if enter is not nullcontext:
                    with enter():
                        hidden = output.last_hidden_state[at]
                        found = head_logits(model, output, hidden).float().log_softmax(-1)
                    apart = torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True)
                    sums[1][at] = apart.sum(-1)
                sums[0][at] = -found.gather(1, targets[at][:, None])[:, 0]
            counted = sums[0].where(judged.to(device), 0.0)
            for cost, values, which in zip(costs, (counted, sums[1]), (judged, real), strict=True):
                cost.sums[batch], cost.tokens[batch] = values.double().sum(1).cpu(), which.sum(1)
        for what, cost in zip(("loss", "divergence from the base"), costs, strict=True):
            _check_finite(what, cost)
        return costs


def _zeros(documents: int) -> PerDocument:
    return PerDocument(sums=np.zeros(documents), tokens=np.zeros(documents, dtype=np.int64))


def _check_finite(what: str, measured: PerDocument) -> None:
    if not np.isfinite(measured.sums).all():
        raise EvaluationError(f"the {what} is not finite", hint="use bfloat16 or float32, not float16")


def _batches(
    documents: Documents, starts: Sequence[int] | None, batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Documents of similar length, padded on the right.

    Yields:
        their numbers; ids [rows, tokens]; which tokens but the first are predicted, and which of them count, [rows,
        tokens - 1].
    """
    firsts = [1] * len(documents) if starts is None else starts
    read = [i for i, document in enumerate(documents) if len(document) > 1]
    if not read:
        raise EvaluationError("no control document has two tokens", hint="give longer control text")
    if not any(len(documents[i]) > firsts[i] for i in read):
        raise EvaluationError("no token of the text counts", hint="its prompts fill the context: give shorter ones")
    for together in by_length([len(documents[i]) for i in read], batch_tokens):
        batch = [read[place] for place in together]
        longest = len(documents[batch[0]])
        places = torch.arange(1, longest)
        real = places < torch.tensor([len(documents[i]) for i in batch])[:, None]
        # Under a causal mask no real token sees the padding, so no mask is needed.
        ids = torch.tensor([list(documents[i]) + [0] * (longest - len(documents[i])) for i in batch])
        yield batch, ids, real, real & (places >= torch.tensor([firsts[i] for i in batch])[:, None])
