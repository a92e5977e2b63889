"""The pass: one forward feeds every layer's SAE, whose activations go straight to sums and are never kept.

A block of documents is forwarded on its own, so its sums are the same whichever worker computes them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.corpus import TokenBatch, batches, tokenize
from stethoscope.diagnosis.statistics import FeatureStatistics, LayerStatistics
from stethoscope.errors import SAEError
from stethoscope.models import decoder, decoder_layers
from stethoscope.saes.activations import SINK_RATIO
from stethoscope.saes.health import HealthSums

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Listening:
    """What `listen` heard: feature statistics, and each layer's variance explained on a sample."""

    statistics: FeatureStatistics
    variance_explained: dict[int, float | None]


class _EnoughHeard(Exception):  # noqa: N818 - control flow: ends a forward after the last layer that is listened to
    pass


@torch.inference_mode()
def listen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[int, SAE],
    documents: Sequence[str],
    *,
    block_size: int = 64,
    max_tokens: int = 1024,
    health_tokens: int = 4096,
    progress: Progress | None = None,
) -> Listening:
    """Feature statistics of every layer with an SAE on a corpus, in one pass.

    Args:
        model: the base model; its head is never run.
        tokenizer: the model's own.
        saes: SAEs that read a layer's output (``resid_post``), by layer.
        documents: the corpus; its order decides which documents share a block.
        block_size: documents to a block.
        max_tokens: documents are cut here.
        health_tokens: variance explained is measured on about the first so many tokens.
        progress: called with documents done and in all.

    Raises:
        SAEError: an SAE gave values that are not finite.
    """
    rows = tokenize(documents, tokenizer, max_tokens=max_tokens)
    layers = sorted(saes)
    health: dict[int, HealthSums] = {}
    parts = []
    for start in range(0, len(rows), block_size):
        block = {layer: _BlockSums(saes[layer].cfg.d_sae) for layer in layers}
        for batch in batches(rows[start : start + block_size], tokenizer):
            outputs = _layer_outputs(model, layers, batch)
            # A sink's norm drops again in the last layers while it stays unlike any other token: once, always.
            loud = torch.stack([_sinks(hidden, batch) for hidden in outputs.values()]).any(0)
            counted = batch.countable & ~loud
            for layer, hidden in outputs.items():
                heard = hidden[counted.to(hidden.device)].float()
                sae = saes[layer]
                activations = sae.encode(heard)
                block[layer].add(activations, sinks=int((loud & batch.countable).sum()))
                if layer not in health or health[layer].tokens < health_tokens:
                    sums = HealthSums.of(heard, activations, sae.decode(activations))
                    health[layer] = health[layer] + sums if layer in health else sums
        parts.append(FeatureStatistics(layers={layer: block[layer].freeze(layer) for layer in layers}))
        if progress:
            progress(min(start + block_size, len(rows)), len(rows))
    return Listening(
        statistics=FeatureStatistics.merge(parts),
        variance_explained={layer: health[layer].health().variance_explained for layer in layers},
    )


class _BlockSums:
    def __init__(self, width: int) -> None:
        self.sums = np.zeros(width)
        self.fired = np.zeros(width, dtype=np.int64)
        self.maxima = np.zeros(width, dtype=np.float32)
        self.tokens = self.sinks = 0

    def add(self, activations: Float[Tensor, "tokens width"], *, sinks: int) -> None:
        self.sinks += sinks
        self.tokens += len(activations)
        if len(activations):
            self.sums += activations.sum(0).double().cpu().numpy()
            self.fired += (activations > 0).sum(0).cpu().numpy()
            self.maxima = np.maximum(self.maxima, activations.amax(0).cpu().numpy())

    def freeze(self, layer: int) -> LayerStatistics:
        if not np.isfinite(self.sums).all():
            raise SAEError(f"the SAE of layer {layer} gave activations that are not finite")
        return LayerStatistics(
            sums=self.sums[None],
            fired=self.fired[None],
            maxima=self.maxima[None],
            tokens=np.array([self.tokens]),
            sinks=np.array([self.sinks]),
        )


def _sinks(hidden: Float[Tensor, "rows tokens d_in"], batch: TokenBatch) -> Bool[Tensor, "rows tokens"]:
    """True at positions far louder than their document's median; the median is per document, so that it depends
    on nothing else in the batch."""
    norms = hidden.float().norm(dim=-1).cpu()
    median = norms.masked_fill(~batch.attention_mask, torch.nan).nanmedian(dim=1, keepdim=True).values
    return norms > SINK_RATIO * median


def _layer_outputs(
    model: PreTrainedModel, layers: Sequence[int], batch: TokenBatch
) -> dict[int, Float[Tensor, "rows tokens d_in"]]:
    """Each layer's output on a batch, in order of depth."""
    heard: dict[int, Tensor] = {}
    with _hooked(decoder_layers(model), layers, heard), suppress(_EnoughHeard):
        decoder(model)(
            input_ids=batch.input_ids.to(model.device),
            attention_mask=batch.attention_mask.to(model.device, torch.int64),
            use_cache=False,
        )
    return heard


@contextmanager
def _hooked(blocks: nn.ModuleList, layers: Sequence[int], heard: dict[int, Tensor]) -> Iterator[None]:
    def hook_of(layer: int) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            heard[layer] = output[0] if isinstance(output, tuple) else output
            if layer == layers[-1]:
                raise _EnoughHeard

        return hook

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(blocks[layer].register_forward_hook(hook_of(layer)).remove)
        yield
