"""What each layer's own edit does, read through its SAE and weighed by its first-order effect on the loss.

    edits = LayerEdits(model, task_vector)
    target = attribute(model, edits, saes, target_batches)
    control = attribute(model, edits, saes, control_batches)
    attribution_scores(target, control)[12].score      # nats per token, on features that help the target more

Attribution patching over SAE features (arXiv 2403.19647), applied to a weight edit: a block is run with tuned weights
on the base's input to it, and of -dL/dh . dh each feature has a part; the rest is what the SAE does not decode.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import SAEError
from stethoscope.models.forward import Recording, loss_gradient
from stethoscope.models.sites import HookPoint, hook_point, read_activations, record_activations
from stethoscope.saes.activations import attention_sinks, on_device
from stethoscope.text.tokens import TokenBatch

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
class OwnChanges:
    """Each layer's own change on one batch, the base's loss of each row in nats, and where attention sinks are."""

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
) -> OwnChanges:
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
            changes[layer] = OwnChange(base=base.detach(), tuned=tuned.detach(), gradient=gradient)
        sinks = attention_sinks((recording.after(layer) for layer in points), batch.attention_mask)
    return OwnChanges(losses=losses.where(counted, 0.0).double().sum(1), changes=changes, sinks=sinks)


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Every layer's edit on one corpus.

    Attributes:
        features: in place of its activation each feature's part, in nats by which the loss falls to first order, so
            that chance is known for it in the same way; special tokens and sinks have none. Tokens are those predicted.
        tokens: predicted tokens of each document.
    """

    features: FeatureStatistics
    tokens: Int64[np.ndarray, " documents"]


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
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Attribute every layer's own edit to the features of its SAE, on one corpus.

    Costs two forwards and a backward, and three products with an SAE's matrix per token and layer.

    Args:
        saes: by layer, reading ``site``.
        batches: the corpus; see `stethoscope.text.tokens.batches`.
        tap: the exact place, where the SAEs read the site elsewhere than most; see `hook_point`.
        coefficient: of the edits.
        block_size: documents to a block, in the corpus's order.
        progress: called with batches done and in all.

    Raises:
        SAEError: the model has no such site, an SAE is a transcoder, or gave values that are not finite.
    """
    if transcoders := [f"layer {n}" for n, sae in saes.items() if getattr(sae.cfg.metadata, "hook_name_out", None)]:
        said = "transcoders do not decode what they read, so that a change there has no parts along their features"
        raise SAEError(said, problems=transcoders, hint="choose SAEs, or another score")
    documents = 1 + max(i for batch in batches for i in batch.documents)
    points = {layer: hook_point(model, layer, site, tap) for layer in sorted(saes)}
    features = FeatureStatistics.zeros({n: saes[n].cfg.d_sae for n in points}, -(-documents // block_size))
    tokens = np.zeros(documents, dtype=np.int64)
    for done, batch in enumerate(batches, 1):
        tokens[np.array(batch.documents)] = batch.predicted.sum(1).numpy()
        own = own_changes(model, edits, points, batch, coefficient=coefficient)
        counted = batch.countable & ~own.sinks
        for layer, change in own.changes.items():
            with torch.no_grad(), on_device(saes[layer], change.base.device):
                for row, document in enumerate(batch.documents):
                    for parts in _parts(saes[layer], change, row, counted[row]):
                        features.layers[layer].sums[document // block_size] += parts
        if progress:
            progress(done, len(batches))
    if broken := [layer for layer, found in features.layers.items() if not np.isfinite(found.sums).all()]:
        raise SAEError("some layers' attributions are not finite", problems=[f"layer {layer}" for layer in broken])
    for statistics in features.layers.values():
        statistics.tokens[:] = np.add.reduceat(tokens, range(0, documents, block_size))
    return Attribution(features=features, tokens=tokens)


def _parts(
    sae: SAE, change: OwnChange, row: int, counted: Bool[Tensor, " tokens"]
) -> Iterator[Float64[np.ndarray, " width"]]:
    """Each feature's attribution, summed over some of a document's tokens at a time."""
    for chosen in counted.nonzero()[:, 0].split(_CHUNK):
        at = chosen.to(change.base.device)
        base, tuned, gradient = (x[row, at].float() for x in (change.base, change.tuned, change.gradient))
        after = sae.encode(tuned)
        written = after - sae.encode(base)  # [tokens, width]; the last to be encoded sets the scale of decoding
        # An SAE that normalises each token decodes into units of that token: the gradient is taken there, once.
        scaled, offset = sae.run_time_activation_norm_fn_out(torch.stack([gradient, torch.zeros_like(gradient)]))
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            written = written / sae.get_W_dec_norm()
        parts = -((scaled - offset) @ sae.W_dec.T) * written
        yield parts.sum(0, dtype=torch.float64).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class AttributionScore:
    """A layer's attribution: first-order effect in nats per predicted token, on target less control.

    Attributes:
        score: the positive features' parts together: `attribution` as a score of the layer.
        explained: all features' parts together.
    """

    score: float
    explained: float


def attribution_scores(target: Attribution, control: Attribution) -> dict[int, AttributionScore]:
    """Every layer's attribution: positive where the edit helps the target more than it helps the control."""
    share_t, share_c = 1 / target.tokens.sum(), 1 / control.tokens.sum()
    found = {}
    for layer, ours in target.features.layers.items():
        features = ours.sums.sum(0) * share_t - control.features.layers[layer].sums.sum(0) * share_c
        found[layer] = AttributionScore(score=float(np.maximum(features, 0).sum()), explained=float(features.sum()))
    return found
