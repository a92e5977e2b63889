"""Activations as SAEs are trained and measured on: each layer's output, without the positions that mislead."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.corpus import TokenBatch, batches, tokenize
from stethoscope.models import decoder, decoder_layers

# Positions louder than this many times the median of their document are attention sinks. The first position is one in
# most models; left in, they take the whole loss.
SINK_RATIO = 10.0

Activations = dict[str, Float[Tensor, "tokens d_in"]]
Padded = dict[str, Float[Tensor, "rows tokens d_in"]]


class ActivationStream:
    """Every chosen layer's output on text, tokens aligned between layers, without special tokens and sinks."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        *,
        max_tokens: int = 384,
        batch_tokens: int = 512,
    ) -> None:
        self.model, self.tokenizer, self.layers = model, tokenizer, list(layers)
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        self.blocks = decoder_layers(model)
        self._names = {id(module): name for name, module in model.named_modules()}

    def hook(self, layer: int) -> str:
        """The module whose output is read, as `named_modules` calls it."""
        return self._names[id(self.blocks[layer])]

    def tokenize(self, documents: Sequence[str]) -> list[list[int]]:
        """Token ids per document, of those with enough tokens to have any left after the first."""
        return [row for row in tokenize(documents, self.tokenizer, max_tokens=self.max_tokens) if len(row) > 1]

    @torch.no_grad()
    def outputs(self, rows: Sequence[Sequence[int]]) -> Iterator[Activations]:
        """Each layer's output on some documents, a batch of documents at a time."""
        for batch in batches(rows, self.tokenizer, batch_tokens=self.batch_tokens):
            heard: Padded = {}
            with ExitStack() as stack:
                for layer in self.layers:
                    stack.callback(self.blocks[layer].register_forward_hook(_keep(heard, self.hook(layer))).remove)
                decoder(self.model)(
                    # no attention mask: padding is on the right, where a causal model never looks
                    input_ids=batch.input_ids.to(self.model.device),
                    use_cache=False,
                )
            keep = _countable(heard, batch)
            yield {name: hidden[keep] for name, hidden in heard.items()}

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


def _keep(heard: Padded, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        heard[name] = output[0] if isinstance(output, tuple) else output

    return hook


def _countable(heard: Padded, batch: TokenBatch) -> Bool[Tensor, "rows tokens"]:
    """Tokens worth training on: no padding, no special token, not a document's first, no sink in any layer."""
    keep = batch.countable.clone()
    keep[:, 0] = False
    for hidden in heard.values():
        norms = hidden.float().norm(dim=-1).cpu()
        median = norms.masked_fill(~batch.attention_mask, torch.nan).nanmedian(dim=1, keepdim=True).values
        keep &= norms <= SINK_RATIO * median
    return keep
