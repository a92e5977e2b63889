"""The pass: one forward feeds every layer's SAE, whose activations go straight to sums and are never kept.

    heard = listen(model, tokenizer, open_saes("saes/"), {"target": texts, "control": others})
    heard["target"].statistics.layers[12].rate

A block of documents is forwarded on its own, so its sums are the same whichever worker computes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.corpus import Document, TokenBatch, Tokens, batches, counted_tokens, tokenize
from stethoscope.diagnosis.encoding import BlockSums, Encoder
from stethoscope.diagnosis.statistics import FeatureStatistics, LayerStatistics
from stethoscope.errors import SAEError
from stethoscope.saes.activations import loud_positions
from stethoscope.saes.health import HealthSums, SAEHealth, measure_health
from stethoscope.saes.sources import SAEFolder, load_sae
from stethoscope.sites import HookPoint, hear, hook_point

Progress = Callable[[int, int], None]
Heard = dict[int, Float[Tensor, "tokens d_in"]]


@dataclass(frozen=True, kw_only=True)
class Listening:
    """What `listen` heard on one corpus: feature statistics, and each SAE's health on it.

    Attributes:
        health: by layer; variance explained and encoding error are measured on a sample, the rest on all tokens.
    """

    statistics: FeatureStatistics
    health: dict[int, SAEHealth]


@torch.inference_mode()
def listen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[int, SAE | SAEFolder],
    corpora: Mapping[str, Sequence[Document]],
    *,
    site: str = "resid_post",
    block_size: int = 64,
    max_tokens: int = 1024,
    tokens: Tokens = "all",
    health_tokens: int = 2048,
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Listening]:
    """Feature statistics of every layer with an SAE on some corpora, and the SAEs' health there.

    Args:
        model: the base model; its head is never run, nor what lies behind the last layer with an SAE.
        tokenizer: the model's own.
        saes: by layer; those given as folders are loaded when their turn comes.
        corpora: documents by name; their order decides which share a block.
        site: what the SAEs read; those given as folders say so themselves.
        block_size: documents to a block.
        max_tokens: documents are cut here.
        tokens: which count, special and template tokens apart: all, those that an assistant says, or the last.
        health_tokens: SAE health is measured on about the first so many tokens of each corpus; 0 for none.
        memory: bytes that encoders may take. What does not fit waits for another forward over the corpora, so that
            each SAE is read once; all at once by default.
        dtype: of the encoders' products; by default bfloat16 if the model computes in it, else float32. SAE health
            says what it costs.
        progress: called with documents done and in all.

    Raises:
        SAEError: an SAE gave values that are not finite, or does not fit its site.
    """
    dtype = dtype or (torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32)
    rows = {name: _Rows.of(documents, tokenizer, max_tokens, tokens) for name, documents in corpora.items()}
    points = {layer: _point(model, layer, saes[layer], site) for layer in sorted(saes)}
    samples = {name: _sample(model, tokenizer, points, some, health_tokens) for name, some in rows.items()}
    groups = _groups(saes, dtype, memory)
    total, done = len(groups) * sum(len(some.ids) for some in rows.values()), 0
    health: dict[str, dict[int, SAEHealth]] = {name: {} for name in rows}
    found: dict[str, dict[int, LayerStatistics]] = {name: {} for name in rows}
    for group in groups:
        encoders = {}
        for layer in group:
            sae = _loaded(saes[layer])
            encoders[layer] = Encoder(sae, dtype=dtype, device=model.device)
            for name, sample in samples.items():
                health[name][layer] = _health(sae, encoders[layer], sample.get(layer))
        for name, some in rows.items():
            parts: list[FeatureStatistics] = []
            for start in range(0, len(some.ids), block_size):
                block = some.part(start, start + block_size)
                parts.append(_hear_block(model, tokenizer, points, encoders, block))
                done += len(block.ids)
                if progress:
                    progress(done, total)
            found[name] |= FeatureStatistics.merge(parts).layers
    return {
        name: Listening(
            statistics=FeatureStatistics(layers={layer: layers[layer] for layer in points}),
            health={n: health[name][n].on(layers[n].rate, int(layers[n].tokens.sum())) for n in points},
        )
        for name, layers in found.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Token ids per document, and which of them count."""

    ids: Sequence[Sequence[int]]
    counted: Sequence[Sequence[bool]]

    @classmethod
    def of(
        cls, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_tokens: int, tokens: Tokens
    ) -> "_Rows":
        return cls(
            ids=tokenize(documents, tokenizer, max_tokens=max_tokens),
            counted=counted_tokens(documents, tokenizer, max_tokens=max_tokens, tokens=tokens),
        )

    def part(self, start: int, stop: int) -> "_Rows":
        return _Rows(ids=self.ids[start:stop], counted=self.counted[start:stop])


def _hear_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    points: Mapping[int, HookPoint],
    encoders: Mapping[int, Encoder],
    rows: _Rows,
) -> FeatureStatistics:
    """A block's statistics at the layers that have an encoder."""
    sums = {layer: BlockSums(encoder.width, model.device) for layer, encoder in encoders.items()}
    for batch in batches(rows.ids, tokenizer, counted=rows.counted):
        heard, counted, sinks = _countable(hear(model, points, batch.input_ids), batch)
        for layer, encoder in encoders.items():
            sums[layer].sinks += sinks
            encoder.add(heard[layer][counted], sums[layer])
    frozen = {layer: sums[layer].freeze() for layer in encoders}
    for layer, block in frozen.items():
        if not np.isfinite(block.sums).all():
            raise SAEError(f"the SAE of layer {layer} gave activations that are not finite")
    return FeatureStatistics(layers=frozen)


def _countable(
    heard: dict[int, Tensor], batch: TokenBatch
) -> tuple[dict[int, Tensor], Bool[Tensor, "rows tokens"], int]:
    """What was heard, which positions count, and how many are left out as sinks.

    A sink's norm drops again in the last layers while it stays unlike any other token: once loud, always left out.
    """
    loud = loud_positions(heard.values(), batch.attention_mask)
    counted = batch.countable & ~loud
    device = next(iter(heard.values())).device
    return heard, counted.to(device), int((loud & batch.countable).sum())


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    points: Mapping[int, HookPoint],
    rows: _Rows,
    tokens: int,
) -> Heard:
    """Every layer's activations on about the first ``tokens`` tokens that count."""
    held = list(accumulate((sum(counted) for counted in rows.counted), initial=0))
    some = rows.part(0, next((i for i, count in enumerate(held) if count >= tokens), len(held)))
    parts: list[Heard] = []
    for batch in batches(some.ids, tokenizer, counted=some.counted):
        heard, counted, _ = _countable(hear(model, points, batch.input_ids), batch)
        parts.append({layer: hidden[counted] for layer, hidden in heard.items()})
    return {layer: torch.cat([part[layer] for part in parts])[:tokens] for layer in points} if parts else {}


def _health(sae: SAE, encoder: Encoder, sample: Float[Tensor, "tokens d_in"] | None) -> SAEHealth:
    """An SAE on a sample, and how far the encoder's activation mass lies from SAELens' own in float32."""
    if sample is None or not len(sample) or getattr(sae.cfg.metadata, "hook_name_out", None):
        # a transcoder has nothing to say of what it reads but features
        return HealthSums.nothing(encoder.width).health()
    exact = measure_health(sae, sample)
    fast = BlockSums(encoder.width, sample.device)
    encoder.add(sample, fast)
    shares = [sums.double() / sums.double().sum() for sums in (exact.mass, fast.sums)]
    error = float((shares[0] - shares[1]).abs().sum() / 2)
    return replace(exact.health(), encoding_error=error if np.isfinite(error) else None)


def _groups(saes: Mapping[int, SAE | SAEFolder], dtype: torch.dtype, memory: int | None) -> list[list[int]]:
    """The layers in order of depth, cut where the next encoder would not fit; each group has one at least."""
    groups: list[list[int]] = [[]]
    used = 0
    for layer, sae in sorted(saes.items()):
        width, d_in = (sae.width, sae.d_in) if isinstance(sae, SAEFolder) else (sae.cfg.d_sae, sae.cfg.d_in)
        size = width * d_in * dtype.itemsize
        if groups[-1] and memory is not None and used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += size
    return groups


def _point(model: PreTrainedModel, layer: int, sae: SAE | SAEFolder, site: str) -> HookPoint:
    if isinstance(sae, SAEFolder):
        return hook_point(model, layer, sae.site, sae.tap)
    return hook_point(model, layer, site)


def _loaded(sae: SAE | SAEFolder) -> SAE:
    return load_sae(sae) if isinstance(sae, SAEFolder) else sae
