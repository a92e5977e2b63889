"""What each layer's own edit does, read through its SAE and weighed by its first-order effect on the loss.

    edits = LayerEdits(model, task_vector)
    target = attribute(model, edits, saes, target_batches)
    control = attribute(model, edits, saes, control_batches)
    attribution_scores(target, control)[12].score      # nats per token, on features that help the target more

Attribution patching over SAE features with error terms (arXiv 2403.19647), applied to a weight edit: a block is run
with tuned weights on what the base gives it, and -dL/dh . dh is split into the features' parts and the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.diagnosis.statistics import FeatureStatistics, LayerStatistics
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import SAEError
from stethoscope.losses import loss_gradient
from stethoscope.models.sites import HookPoint, hook_point, read_activations, record_activations
from stethoscope.replay import Recording
from stethoscope.saes.activations import attention_sinks, on_device
from stethoscope.text.tokens import TokenBatch

Progress = Callable[[int, int], None]
_CHUNK = 1024  # tokens encoded at once


@dataclass(frozen=True, kw_only=True)
class OwnChange:
    """What one layer's edit alone does at a site of that layer, on the base model's input to the layer.

    Attributes:
        base: the site under the base's weights.
        tuned: the same under the layer's edited weights.
        gradient: of the batch's summed loss at ``base``.
    """

    base: Float[Tensor, "rows tokens d_in"]
    tuned: Float[Tensor, "rows tokens d_in"]
    gradient: Float[Tensor, "rows tokens d_in"]

    def gain(self) -> Float[Tensor, "rows tokens"]:
        """-dL/dh . dh: to first order, the nats by which the loss falls."""
        change = self.tuned.float() - self.base.float()
        return -(self.gradient.float() * change).double().sum(-1)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One batch: the base's loss of each row in nats, each layer's own change, and where attention sinks are."""

    losses: Float[Tensor, " rows"]
    changes: Mapping[int, OwnChange]
    sinks: Bool[Tensor, "rows tokens"]


def own_changes(
    model: PreTrainedModel,
    edits: LayerEdits,
    points: Mapping[int, HookPoint],
    batch: TokenBatch,
    *,
    coefficient: float = 1.0,
) -> Heard:
    """One forward and one backward of the base feed all layers; then each block of ``points`` runs once more, edited.

    The loss counts the tokens of ``batch.predicted``.
    """
    embedded = model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    try:
        with torch.enable_grad(), record_activations(points) as found:
            recording = Recording(model, batch.input_ids)
    finally:
        embedded.remove()
    counted = batch.predicted[:, 1:].to(model.device)
    losses, slope = loss_gradient(model, recording.output, batch.input_ids, counted)
    sites = [found[layer] for layer in points]
    gradients = torch.autograd.grad(recording.output.last_hidden_state, sites, slope)
    changes = {}
    with torch.no_grad():
        for (layer, point), base, gradient in zip(points.items(), sites, gradients, strict=True):
            with edits.entered({layer: coefficient}), recording.below(layer):
                tuned = read_activations(model, {layer: point}, batch.input_ids)[layer]
            changes[layer] = OwnChange(base=base.detach(), tuned=tuned, gradient=gradient)
        loud = attention_sinks((recording.after(layer) for layer in points), batch.attention_mask)
    return Heard(losses=losses.where(counted, 0.0).double().sum(1), changes=changes, sinks=loud)


@dataclass(frozen=True, kw_only=True)
class LayerAttribution:
    """One layer's edit on one corpus; all are sums, in nats by which the loss falls to first order.

    ``explained`` + ``unexplained`` is the exact first-order effect of the change at the site.

    Attributes:
        attribution: each feature's part, per block of documents.
        written: each feature's change of activation, summed over the tokens that count.
        explained: the features' parts together, per document.
        unexplained: the part of the change that the SAE does not decode, and all of it where tokens are masked.
        masked: how much of ``unexplained`` falls on masked tokens (special tokens and attention sinks).
    """

    attribution: Float64[np.ndarray, "blocks width"]
    written: Float64[np.ndarray, "blocks width"]
    explained: Float64[np.ndarray, " documents"]
    unexplained: Float64[np.ndarray, " documents"]
    masked: Float64[np.ndarray, " documents"]


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Every layer's edit on one corpus.

    Attributes:
        losses: the base's loss of each document, in nats.
        tokens: predicted tokens of each document; ``block_tokens`` are those of each block.
    """

    layers: Mapping[int, LayerAttribution]
    losses: Float64[np.ndarray, " documents"]
    tokens: Int64[np.ndarray, " documents"]
    block_tokens: Int64[np.ndarray, " blocks"]

    def statistics(self) -> FeatureStatistics:
        """The features' attribution in the place of activation sums, so that chance is known for it in the same way."""
        return FeatureStatistics(
            layers={
                layer: LayerStatistics(
                    sums=found.attribution,
                    fired=np.zeros(found.attribution.shape, dtype=np.int64),
                    maxima=np.zeros(found.attribution.shape, dtype=np.float32),
                    tokens=self.block_tokens,
                    sinks=np.zeros_like(self.block_tokens),
                )
                for layer, found in self.layers.items()
            }
        )


def attribute(
    model: PreTrainedModel,
    edits: LayerEdits,
    saes: Mapping[int, SAE],
    batches: Sequence[TokenBatch],
    *,
    site: str = "resid_post",
    tap: str | None = None,
    coefficient: float = 1.0,
    block_size: int = 8,
    progress: Progress | None = None,
) -> Attribution:
    """Attribute every layer's own edit to the features of its SAE, on one corpus.

    Costs two forwards and a backward, and four products with an SAE's matrix per token and layer.

    Args:
        edits: the layers' edited weights.
        saes: by layer, reading ``site``.
        batches: the corpus; see `stethoscope.text.tokens.batches`.
        tap: the exact place, where the SAEs read the site elsewhere than most; see `hook_point`.
        coefficient: of the edits.
        block_size: documents to a block, in the corpus's order.
        progress: called with batches done and in all.

    Raises:
        SAEError: the model has no such site, or an SAE gave values that are not finite.
    """
    documents = 1 + max(i for batch in batches for i in batch.documents)
    blocks = -(-documents // block_size)
    points = {layer: hook_point(model, layer, site, tap) for layer in sorted(saes)}
    sums = {layer: _Sums(documents, blocks, saes[layer].cfg.d_sae) for layer in points}
    losses, tokens = np.zeros(documents), np.zeros(documents, dtype=np.int64)
    for done, batch in enumerate(batches, 1):
        rows = list(batch.documents)
        heard = own_changes(model, edits, points, batch, coefficient=coefficient)
        losses[rows] = heard.losses.cpu().numpy()
        tokens[rows] = batch.predicted.sum(1).numpy()
        counted = batch.countable & ~heard.sinks
        for layer, change in heard.changes.items():
            with torch.no_grad(), on_device(saes[layer], change.base.device):
                sums[layer].add(saes[layer], change, batch, counted, block_size)
        if progress:
            progress(done, len(batches))
    if broken := [layer for layer in sums if not np.isfinite(sums[layer].attribution).all()]:
        raise SAEError("some layers' attributions are not finite", problems=[f"layer {layer}" for layer in broken])
    members = np.arange(documents) // block_size
    return Attribution(
        layers={layer: found.freeze() for layer, found in sums.items()},
        losses=losses,
        tokens=tokens,
        block_tokens=np.array([tokens[members == block].sum() for block in range(blocks)], dtype=np.int64),
    )


class _Sums:
    def __init__(self, documents: int, blocks: int, width: int) -> None:
        self.attribution, self.written = np.zeros((blocks, width)), np.zeros((blocks, width))
        self.explained, self.total, self.masked = np.zeros((3, documents))

    def add(
        self,
        sae: SAE,
        change: OwnChange,
        batch: TokenBatch,
        counted: Bool[Tensor, "rows tokens"],
        block_size: int,
    ) -> None:
        gain = change.gain().cpu()
        rows = np.array(batch.documents)
        self.total[rows] = gain.where(batch.attention_mask, 0.0).sum(1).numpy()
        self.masked[rows] = gain.where(batch.attention_mask & ~counted, 0.0).sum(1).numpy()
        for row, document in enumerate(batch.documents):
            block = document // block_size
            for written, attribution in _read(sae, change, row, counted[row]):
                self.attribution[block] += attribution
                self.written[block] += written
                self.explained[document] += attribution.sum()

    def freeze(self) -> LayerAttribution:
        return LayerAttribution(
            attribution=self.attribution,
            written=self.written,
            explained=self.explained,
            unexplained=self.total - self.explained,
            masked=self.masked,
        )


def _read(
    sae: SAE, change: OwnChange, row: int, counted: Bool[Tensor, " tokens"]
) -> Iterator[tuple[Float64[np.ndarray, " width"], Float64[np.ndarray, " width"]]]:
    """Each feature's change and its attribution, summed over some of a document's tokens at a time."""
    for chosen in counted.nonzero()[:, 0].split(_CHUNK):
        at = chosen.to(change.base.device)
        base, tuned, gradient = (x[row, at].float() for x in (change.base, change.tuned, change.gradient))
        after = sae.encode(tuned)
        written = after - sae.encode(base)  # [tokens, width]; the last to be encoded sets the scale of decoding
        # An SAE that normalises each token decodes into units of that token: the gradient is taken there, once.
        scaled, offset = sae.run_time_activation_norm_fn_out(torch.stack([gradient, torch.zeros_like(gradient)]))
        attribution = -((scaled - offset) @ sae.W_dec.T) * written
        yield tuple(x.sum(0, dtype=torch.float64).cpu().numpy() for x in (written, attribution))


@dataclass(frozen=True, kw_only=True)
class AttributionScore:
    """A layer's attribution: first-order effect in nats per predicted token, on target less control.

    Attributes:
        score: the positive features' parts together: `attribution` as a score of the layer.
        explained: all features' parts together.
        unexplained: what the SAE does not see; ``explained`` + ``unexplained`` is the exact first-order effect.
    """

    score: float
    explained: float
    unexplained: float


def attribution_scores(target: Attribution, control: Attribution) -> dict[int, AttributionScore]:
    """Every layer's attribution: positive where the edit helps the target more than it helps the control."""
    share_t, share_c = 1 / target.tokens.sum(), 1 / control.tokens.sum()
    found = {}
    for layer, on_target in target.layers.items():
        on_control = control.layers[layer]
        features = on_target.attribution.sum(0) * share_t - on_control.attribution.sum(0) * share_c
        found[layer] = AttributionScore(
            score=positive_part(features),
            explained=float(features.sum()),
            unexplained=float(on_target.unexplained.sum() * share_t - on_control.unexplained.sum() * share_c),
        )
    return found


def positive_part(features: Float64[np.ndarray, " width"]) -> float:
    """The score of a layer from its features' attribution."""
    return float(np.maximum(features, 0).sum())
