"""Activations as SAEs are trained and measured on: each layer's output, without the positions that mislead."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.corpus import Document, batches, tokenize
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

    def tokenize(self, documents: Sequence[Document]) -> list[list[int]]:
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

    def shuffled(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch: int,
        buffer: int,
        seed: int,
        start: "StreamPosition | None" = None,
    ) -> Iterator[tuple[Activations, "StreamPosition"]]:
        """Batches of single tokens, mixed over at least ``buffer`` tokens of shuffled documents, without end.

        Args:
            start: where an earlier stream of the same rows and settings stood; the beginning if None.

        Yields:
            a batch, and the place behind it, from which another stream goes on with the same batches.
        """
        shuffle = torch.Generator().manual_seed(seed)
        at = start or StreamPosition(shuffle=shuffle.get_state())
        documents = _without_end(rows, seed, at.taken)
        while True:
            held, fill = _tokens(at.rest), []
            while held < max(buffer, batch):
                fill.append(next(documents))
                held += len(fill[-1])
            parts = [*([at.rest] if at.rest else ()), *self.outputs(fill)]
            packed = {name: torch.cat([part[name].to(self.model.device) for part in parts]) for name in parts[0]}
            shuffle.set_state(at.shuffle)
            rest: Activations = {}
            for number, chosen in enumerate(torch.randperm(_tokens(packed), generator=shuffle).split(batch), 1):
                if number <= at.given:
                    continue
                mixed = {name: values[chosen.to(values.device)] for name, values in packed.items()}
                if len(chosen) == batch:
                    yield mixed, replace(at, given=number)
                else:
                    rest = mixed
            at = StreamPosition(shuffle=shuffle.get_state(), taken=at.taken + len(fill), rest=rest)


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream of shuffled batches stands: how it was when it last filled its buffer, and how far it has come.

    Attributes:
        shuffle: the state of the generator that mixes the buffer.
        taken: documents taken, over all passes over them.
        rest: what the buffer before had left, less than a batch.
        given: batches cut from the buffer since.
    """

    shuffle: UInt8[Tensor, " bytes"]
    taken: int = 0
    rest: Activations = field(default_factory=dict)
    given: int = 0


def _without_end(rows: Sequence[Sequence[int]], seed: int, taken: int) -> Iterator[Sequence[int]]:
    """Documents in an order of each pass's own, from the one behind so many."""
    number, place = divmod(taken, len(rows))
    while True:
        order = random.Random(seed + number).sample(range(len(rows)), len(rows))
        yield from (rows[row] for row in order[place:])
        number, place = number + 1, 0


def _tokens(part: Activations) -> int:
    return len(next(iter(part.values()))) if part else 0


@contextmanager
def lent(sae: nn.Module, device: torch.device) -> Iterator[None]:
    """An SAE on another device for the length of a block: a copy is lent, and its own weights stay where they are."""
    own = [(tensor, tensor.data) for tensor in (*sae.parameters(), *sae.buffers())]
    try:
        for tensor, data in own:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in own:
            tensor.data = data


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
