"""Activations as SAEs are trained and measured on: each layer's output, without the positions that mislead."""

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.corpus import batches, tokenize
from stethoscope.sites import hear, hook_point

# Positions louder than this many times the median of their document are attention sinks. The first position is one in
# most models; left in, they take the whole loss.
SINK_RATIO = 10.0

Activations = dict[str, Float[Tensor, "tokens d_in"]]


class ActivationStream:
    """A site of every chosen layer on text, tokens aligned between layers, without special tokens and sinks.

    Attributes:
        hooks: layer -> the module whose output is read, as `named_modules` calls it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        *,
        site: str = "resid_post",
        max_tokens: int = 384,
        batch_tokens: int = 512,
    ) -> None:
        self.model, self.tokenizer, self.layers = model, tokenizer, list(layers)
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        names = {id(module): name for name, module in model.named_modules()}
        points = {layer: hook_point(model, layer, site) for layer in self.layers}
        ends = {True: ".input", False: ""}
        self.hooks = {layer: names[id(point.module)] + ends[point.reads_input] for layer, point in points.items()}
        self.points = {self.hooks[layer]: point for layer, point in points.items()}

    def tokenize(self, documents: Sequence[str]) -> list[list[int]]:
        """Token ids per document, of those with enough tokens to have any left after the first."""
        return [row for row in tokenize(documents, self.tokenizer, max_tokens=self.max_tokens) if len(row) > 1]

    @torch.no_grad()
    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[Activations]:
        """Each layer's output on some documents, a batch of documents at a time."""
        for batch in batches(rows, self.tokenizer, batch_tokens=self.batch_tokens):
            heard = hear(self.model, self.points, batch.input_ids)
            # tokens worth training on: no padding, no special token, not a document's first, no sink in any layer
            keep = batch.countable & ~loud_positions(heard.values(), batch.attention_mask)
            keep[:, 0] = False
            yield {name: hidden[keep.to(hidden.device)] for name, hidden in heard.items()}

    def shuffled(self, rows: Sequence[Sequence[int]], *, batch: int, buffer: int, seed: int) -> Iterator[Activations]:
        """Batches of single tokens, mixed over at least ``buffer`` tokens of shuffled documents, without end."""
        order = random.Random(seed)
        shuffle = torch.Generator().manual_seed(seed)
        queue: list[Sequence[int]] = []
        rest: list[Activations] = []
        while True:
            held = sum(_tokens(part) for part in rest)
            fill: list[Sequence[int]] = []
            while held + sum(map(len, fill)) < max(buffer, batch):
                if not queue:
                    queue = order.sample(list(rows), len(rows))
                fill.append(queue.pop())
            parts = [*rest, *self.outputs(fill)]
            packed = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            rest = []
            for chosen in torch.randperm(_tokens(packed), generator=shuffle).split(batch):
                mixed = {name: values[chosen.to(values.device)] for name, values in packed.items()}
                if len(chosen) == batch:
                    yield mixed
                else:
                    rest = [mixed]


def _tokens(part: Activations) -> int:
    return len(next(iter(part.values())))


def loud_positions(
    layers: Iterable[Float[Tensor, "rows tokens d_in"]], attention_mask: Bool[Tensor, "rows tokens"]
) -> Bool[Tensor, "rows tokens"]:
    """True at attention sinks: positions far louder than their document's median in any layer.

    The median is per document, so that it depends on nothing else in the batch.
    """
    loud = torch.zeros_like(attention_mask)
    for hidden in layers:
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).cpu()
        median = norms.masked_fill(~attention_mask, torch.nan).nanmedian(dim=1, keepdim=True).values
        loud |= norms > SINK_RATIO * median
    return loud
