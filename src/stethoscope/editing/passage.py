"""What the filter lets through along SAE features: which of a layer's inputs still meet the change."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.checkpoints.adapter import low_rank
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.change import LinearChange
from stethoscope.editing.filter import FilteredChange
from stethoscope.editing.residual_axis import residual_axes
from stethoscope.models.load import decoder_layers

# The first of these norms that a block has is the one before its MLP, and before its attention.
_BEFORE = {
    "mlp": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    "attention": ("input_layernorm", "ln_1"),
}


def passed_shares(
    model: PreTrainedModel,
    task_vector: TaskVector,
    transform: FilteredChange,
    layer: int,
    directions: Float[Tensor, "features d"],
) -> tuple[Float64[Tensor, " features"], Float64[Tensor, " features"]]:
    """|D d| / |tau d| for directions d of the residual stream at a layer's input, 1 is passed, 0 is muted; and |tau d|.

    Over the layer's matrices that read the stream, each behind the norm before it, whose gain scales d. NaN where the
    change does nothing along a direction. The ratio can exceed 1, and says little where |tau d| is small.
    """
    gains = _gains(model, layer)
    sums = torch.zeros(2, len(directions), dtype=torch.float64)
    for name, axis in residual_axes(task_vector, [layer], directions.shape[1]).items():
        if axis is None or axis.writes:
            continue
        inputs = directions.double() * gains.get(task_vector.base.entries[name].kind, 1.0)
        factors, A = low_rank(task_vector, name), transform.low_rank(name)
        if factors and A is not None:  # a hundredth of the work
            for place, right in enumerate((A, factors.A)):
                change = LinearChange(left=factors.scaling * factors.B, right=right, writes=False)
                sums[place] += change.along(inputs)
            continue
        delta = task_vector.delta(name)
        for place, whole in enumerate((transform.apply(name, delta), delta)):
            matrix = whole.double() if axis.dim == 1 else whole.double().T
            sums[place] += (inputs @ matrix.T).square().sum(1)
    return (sums[0] / sums[1]).sqrt(), sums[1].sqrt()


def _gains(model: PreTrainedModel, layer: int) -> Mapping[str, Float64[Tensor, " d"]]:
    """By what the norms before a block's attention and MLP multiply each channel."""
    block, found = decoder_layers(model)[layer], {}
    for kind, names in _BEFORE.items():
        norm = next((module for name in names if (module := getattr(block, name, None)) is not None), None)
        if norm is not None:  # some store their gain less 1
            norm = deepcopy(norm).float()
            signs = torch.ones_like(norm.weight)
            signs[1::2] = -1  # of mean 0, which a LayerNorm takes off; a bias falls out
            found[kind] = ((norm(signs) - norm(-signs)) / 2 * signs).double().cpu()
    if "attention" not in found:  # OLMo 2: its norms stand behind
        return {}
    return {"mlp": found["attention"], **found}  # Phi, Cohere: one norm before both
