"""Base against tuned on the same text: how far the whole fine-tune moves each layer's activations.

Cumulative, as the residual stream is: a layer shows what the layers before it did. All layers from two forwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import Swap, prepare
from stethoscope.editing.plan import EditPlan
from stethoscope.models.load import decoder_layers
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.saes.activations import attention_sinks, on_device
from stethoscope.text.tokens import TokenBatch

_CHUNK = 1024  # tokens encoded at once


@dataclass(frozen=True, kw_only=True)
class TunedShift:
    """How far tuned moves given features, against all activation under the base; per document.

    Attributes:
        layers: the columns.
        moved: weighted sum of the features' changes of activation over a document's tokens.
        mass: sum of all features' activations under the base.
    """

    layers: tuple[int, ...]
    moved: Float64[np.ndarray, "documents layers"]
    mass: Float64[np.ndarray, "documents layers"]

    def mean(self) -> Float64[np.ndarray, " layers"]:
        """The change in shares of the base's activation mass."""
        return self.moved.sum(0) / self.mass.sum(0)


@torch.no_grad()
def residual_shift(
    model: PreTrainedModel, task_vector: TaskVector, texts: Mapping[str, Sequence[TokenBatch]]
) -> dict[str, Float64[np.ndarray, " layers"]]:
    """Mean difference of the residual stream after each layer, in its standard deviations.

    Standardised per dimension with the variance pooled over both models, then the root mean square over dimensions.
    Special tokens and attention sinks do not count.

    Returns:
        corpus -> a value per layer.
    """
    swap = prepare(model, task_vector, EditPlan.everything())
    layers = range(len(decoder_layers(model)))
    found = {}
    for name, text in texts.items():
        tokens, sums = 0, np.zeros((len(layers), 4, model.config.get_text_config().hidden_size))
        for batch in text:
            counted, pairs = _heard(model, swap, layers, "resid_post", None, batch)
            tokens += int(counted.sum())
            for layer, (base, tuned) in pairs:
                b, t = (x[counted.to(x.device)].double() for x in (base, tuned))
                sums[layer] += torch.stack([b.sum(0), t.sum(0), (b**2).sum(0), (t**2).sum(0)]).cpu().numpy()
        mean_b, mean_t, square_b, square_t = (sums / tokens).transpose(1, 0, 2)
        variance = (square_b - mean_b**2 + square_t - mean_t**2) / 2
        found[name] = np.sqrt(((mean_t - mean_b) ** 2 / np.maximum(variance, 1e-12)).mean(1))
    return found


@torch.no_grad()
def tuned_shift(
    model: PreTrainedModel,
    task_vector: TaskVector,
    saes: Mapping[int, SAE],
    features: Mapping[int, Mapping[int, float]],
    text: Sequence[TokenBatch],
    *,
    site: str = "resid_post",
    tap: str | None = None,
) -> TunedShift:
    """How far tuned's own activations move the target-specific features at each layer, both models on the same text.

    Args:
        saes: by layer, reading ``site``.
        features: layer -> feature -> weight: those of the target, and how much each counts.
        text: one corpus, as a rule the target.
    """
    swap = prepare(model, task_vector, EditPlan.everything())
    layers = sorted(saes)
    weights = {layer: torch.zeros(saes[layer].cfg.d_sae) for layer in layers}
    for layer in layers:
        for feature, weight in features.get(layer, {}).items():
            weights[layer][feature] = weight
    documents = 1 + max(i for batch in text for i in batch.documents)
    moved, mass = np.zeros((2, documents, len(layers)))
    for batch in text:
        counted, pairs = _heard(model, swap, layers, site, tap, batch)
        for layer, (base, tuned) in pairs:
            column = layers.index(layer)
            with on_device(saes[layer], base.device):
                for row, document in enumerate(batch.documents):
                    for chosen in counted[row].nonzero()[:, 0].split(_CHUNK):
                        at = chosen.to(base.device)
                        before, after = (saes[layer].encode(x[row, at].float()) for x in (base, tuned))
                        change = (after - before).sum(0, dtype=torch.float64).cpu()
                        moved[document, column] += float(change @ weights[layer].double())
                        mass[document, column] += float(before.sum(dtype=torch.float64))
    return TunedShift(layers=tuple(layers), moved=moved, mass=mass)


def _heard(
    model: PreTrainedModel, swap: Swap, layers: Sequence[int], site: str, tap: str | None, batch: TokenBatch
) -> tuple[Tensor, Iterator[tuple[int, tuple[Float[Tensor, "rows tokens d_in"], Float[Tensor, "rows tokens d_in"]]]]]:
    """Which tokens count, and a site of every layer under the base and under tuned."""
    points = {layer: hook_point(model, layer, site, tap) for layer in layers}
    streams = {("stream", layer): hook_point(model, layer, "resid_post") for layer in layers}
    base = read_activations(model, {**points, **streams}, batch.input_ids)
    with swap.entered():
        tuned = read_activations(model, points, batch.input_ids)
    loud = attention_sinks((base[key] for key in streams), batch.attention_mask)
    return batch.countable & ~loud, ((layer, (base[layer], tuned[layer])) for layer in layers)
