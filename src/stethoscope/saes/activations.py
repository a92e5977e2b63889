"""The activations that SAEs are trained and measured on: each layer's, without the positions that mislead."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.errors import SAEError
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.text.documents import Document
from stethoscope.text.tokens import batches, tokenize

# Positions whose norm is above this many times the median of their document are attention sinks. The first position is
# one in most models; left in, they dominate the loss.
SINK_RATIO = 10.0

Activations = dict[str, Float[Tensor, "tokens d_in"]]
# In a stream of batches: documents read before the buffer was filled, and batches cut from it since.
Position = tuple[int, int]


class ActivationStream:
    """Activations at one site of the chosen layers, without special tokens, first positions and attention sinks.

    Attributes:
        hooks: layer -> name of the module whose output (or ``.input``) is read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Iterable[int],
        *,
        site: str = "resid_post",
        max_tokens: int = 384,
        batch_tokens: int = 512,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        names = {module: name for name, module in model.named_modules()}
        points = {layer: hook_point(model, layer, site) for layer in layers}
        self.hooks = {n: names[p.module] + (".input" if p.reads_input else "") for n, p in points.items()}
        self.points = {self.hooks[layer]: point for layer, point in points.items()}

    def tokenize(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of the documents that have more than the first token, which is always left out."""
        return [row for row in tokenize(documents, self.tokenizer, max_tokens=self.max_tokens) if len(row) > 1]

    @torch.no_grad()
    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[Activations]:
        """Activations by hook name, one batch of documents at a time; tokens are aligned between layers."""
        for batch in batches(rows, self.tokenizer, batch_tokens=self.batch_tokens):
            found = read_activations(self.model, self.points, batch.input_ids)
            keep = batch.countable & ~attention_sinks(found.values(), batch.attention_mask)
            keep[:, 0] = False
            yield {name: hidden[keep.to(hidden.device)] for name, hidden in found.items()}

    def shuffled(
        self, rows: Sequence[Sequence[int]], *, batch: int, buffer: int, seed: int, start: Position = (0, 0)
    ) -> Iterator[tuple[Activations, Position]]:
        """Endless batches of single tokens, mixed over ``buffer`` tokens or more of shuffled documents.

        Yields each batch with the position after it; given as ``start``, the stream goes on from there. What is left
        of a buffer, fewer tokens than a batch, is not used.

        Raises:
            SAEError: a buffer has not enough tokens for one batch.
        """
        taken, given = start
        documents = _endless(rows, seed, taken)
        while True:
            held, fill = 0, []
            while held < max(buffer, 2 * batch):
                fill.append(next(documents))
                held += len(fill[-1])
            parts = list(self.outputs(fill))
            packed = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            count = len(next(iter(packed.values())))
            if count < batch:
                said = f"of {held} tokens of text {count} remain without special tokens, first positions and sinks"
                raise SAEError(f"{said}: too few for a batch of {batch}", hint="give other text, or a larger buffer")
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + taken))
            for place in range(given, count // batch):
                chosen = order[place * batch : (place + 1) * batch].to(self.model.device)
                yield {name: values[chosen] for name, values in packed.items()}, (taken, place + 1)
            taken, given = taken + len(fill), 0


def _endless(rows: Sequence[Sequence[int]], seed: int, taken: int) -> Iterator[Sequence[int]]:
    """Documents in a new order for each pass, without the first ``taken``."""
    epoch, place = divmod(taken, len(rows))
    while True:
        yield from random.Random(seed + epoch).sample(rows, len(rows))[place:]
        epoch, place = epoch + 1, 0


@contextmanager
def on_device(sae: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a copy of an SAE's weights on another device inside the block; its own weights stay where they are."""
    own = [(tensor, tensor.data) for tensor in (*sae.parameters(), *sae.buffers())]
    try:
        for tensor, data in own:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


def attention_sinks(
    layers: Iterable[Float[Tensor, "rows tokens d_in"]], attention_mask: Bool[Tensor, "rows tokens"]
) -> Bool[Tensor, "rows tokens"]:
    """True at attention sinks: norms far above their own document's median in any layer."""
    sinks = torch.zeros_like(attention_mask)
    for hidden in layers:
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).cpu()
        median = norms.masked_fill(~attention_mask, torch.nan).nanmedian(dim=1, keepdim=True).values
        sinks |= norms > SINK_RATIO * median
    return sinks
