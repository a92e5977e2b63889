"""The activations that SAEs are trained and measured on: each layer's, without the positions that mislead."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.models.sites import hook_point, read_activations
from stethoscope.text.documents import Document
from stethoscope.text.tokens import batches, tokenize

# Positions whose norm is above this many times the median of their document are attention sinks. The first position is
# one in most models; left in, they dominate the loss.
SINK_RATIO = 10.0

Activations = dict[str, Float[Tensor, "tokens d_in"]]


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
            activations = read_activations(self.model, self.points, batch.input_ids)
            keep = batch.countable & ~attention_sinks(activations.values(), batch.attention_mask)
            keep[:, 0] = False
            yield {name: hidden[keep.to(hidden.device)] for name, hidden in activations.items()}

    def shuffled(
        self,
        rows: Sequence[Sequence[int]],
        *,
        batch: int,
        buffer: int,
        seed: int,
        start: "StreamPosition | None" = None,
    ) -> Iterator[tuple[Activations, "StreamPosition"]]:
        """Endless batches of single tokens, mixed over at least ``buffer`` tokens of shuffled documents.

        ``start`` is a position of an earlier stream of the same rows and settings. Yields batch and position after it.
        """
        generator = torch.Generator().manual_seed(seed)
        at = start or StreamPosition(shuffle=generator.get_state())
        documents = _endless(rows, seed, at.taken)
        while True:
            held, fill = len(next(iter(at.rest.values()), ())), []
            while held < max(buffer, batch):
                fill.append(next(documents))
                held += len(fill[-1])
            parts = [*([at.rest] if at.rest else ()), *self.outputs(fill)]
            packed = {name: torch.cat([part[name].to(self.model.device) for part in parts]) for name in parts[0]}
            generator.set_state(at.shuffle)
            order = torch.randperm(len(next(iter(packed.values()))), generator=generator).to(self.model.device)
            *cuts, rest = order.tensor_split(tuple(range(batch, len(order) + 1, batch)))
            for given, chosen in enumerate(cuts, 1):
                if given > at.given:
                    yield {name: values[chosen] for name, values in packed.items()}, replace(at, given=given)
            left = {name: values[rest] for name, values in packed.items()}
            at = StreamPosition(shuffle=generator.get_state(), taken=at.taken + len(fill), rest=left)


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Position in a stream of shuffled batches: its state when it last filled its buffer, and batches since.

    Attributes:
        shuffle: state of the generator that mixes the buffer.
        taken: documents read before, over all passes.
        rest: tokens left over from the buffer before, fewer than a batch.
        given: batches cut from the buffer since.
    """

    shuffle: UInt8[Tensor, " bytes"]
    taken: int = 0
    rest: Activations = field(default_factory=dict)
    given: int = 0


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
