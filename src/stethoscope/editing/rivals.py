"""Rivals of the filter: other ways to keep a fine-tune's skill at less cost, each over its one parameter.

Each does to one task vector what its authors' code does; for TIES and DARE, what PEFT's does.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import sha256_bytes
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.moments import collect_moments, roles
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.residual_axis import residual_axes
from stethoscope.editing.subspace import FeatureProjection, nested_basis
from stethoscope.text.tokens import TokenBatch

WHOLE = EditPlan(default=1.0, outside={"vision": 0.0})  # the whole fine-tune of the text model
SMALL = 1024  # elements: DG-Hard leaves smaller tensors alone

Delta = Float[Tensor, "..."]


class Method(NamedTuple):
    """A way to edit: a plan for each value of its parameter, from the most change to the least; None is the base."""

    name: str
    parameter: str
    plans: Mapping[float, EditPlan | None]


@dataclass(frozen=True)
class Changed:
    """The transform that applies a function to each tensor's name and change."""

    change: partial[Tensor]

    def apply(self, name: str, delta: Delta) -> Delta:
        """The new change."""
        return self.change(name, delta)

    def low_rank(self, name: str) -> None:
        """The new change is no product with LoRA's own B."""

    def describe(self) -> dict[str, Any]:
        """The function and its settings, tensors by their hash."""
        settings = dict(self.change.keywords)
        if tensors := settings.get("importance"):
            settings["importance"] = sha256_bytes(b"".join(t.numpy().tobytes() for _, t in sorted(tensors.items())))
        return {"kind": self.change.func.__name__, **settings}


def rivals(depth: int, importance: dict[str, Tensor], *, seed: int = 0) -> list[Method]:
    """The rivals that need no SAE, for a model of ``depth`` layers; the seed is DARE's, the importance AIM's."""

    def over(name: str, change: Callable[..., Tensor], parameter: str, *values: float, **more: Any) -> Method:
        changes = {value: Changed(partial(change, **{parameter: value}, **more)) for value in values[1:]}
        plans = {value: replace(WHOLE, transform=transform) for value, transform in changes.items()}
        return Method(name, parameter, {values[0]: WHOLE} | plans)

    tenths, densities = [n / 10 for n in range(9, -1, -1)], (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05)
    return [
        Method("scaled", "coefficient", {1.0: WHOLE} | {c: scaled(c) for c in tenths}),
        Method("LiNeS", "alpha", {1.0: WHOLE} | {alpha: layer_scaled(depth, alpha) for alpha in tenths[1::2]}),
        over("DG-Hard", hard_threshold, "scale", 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
        over("AIM", relaxed, "omega", 1.0, 0.8, 0.6, 0.4, 0.2, 0.0, importance=importance),
        over("TIES", trimmed, "density", *densities, 0.0),
        over("DARE", dropped, "density", *densities, seed=seed),
    ]


def scaled(coefficient: float) -> EditPlan:
    """The whole change times a coefficient: base and fine-tune interpolated (WiSE-FT, arXiv 2109.01903)."""
    return replace(WHOLE, default=coefficient)


def layer_scaled(depth: int, alpha: float) -> EditPlan:
    """A coefficient that rises linearly from ``alpha`` in the first layer to 1 in the last (LiNeS, arXiv 2410.17146).

    Tensors outside the layers, the head among them, get ``alpha``.
    """
    layers = {n: alpha + (1 - alpha) * n / max(depth - 1, 1) for n in range(depth)}
    return replace(EditPlan.for_layers(layers), outside=WHOLE.outside, default=alpha)


def hard_threshold(_: str, delta: Delta, *, scale: float) -> Delta:
    """Keep the singular values of a matrix that noise does not explain (DG-Hard, arXiv 2605.20296).

    Those over ``scale`` omega(beta) median(s) / mu(beta) are kept: Donoho and Gavish's threshold for noise of unknown
    size (arXiv 1305.5870), beta the shorter side over the longer, with ``scale`` 1 in the paper. A low rank has the
    median 0, so all of it is kept.
    """
    if delta.ndim != 2 or delta.numel() < SMALL:
        return delta
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    squares, V = torch.linalg.eigh(tall.T.double() @ tall.double())
    values = squares.clamp(min=0).sqrt()
    kept = V[:, values > scale * _threshold_over_median(tall.shape[1] / tall.shape[0]) * values.median()].float()
    kept_change = (tall @ kept) @ kept.T
    return kept_change if tall is delta else kept_change.T


@cache
def _threshold_over_median(beta: float) -> float:
    """omega(beta) / mu(beta), 2.858 for a square; the squares of noise's singular values are Marchenko and Pastur's."""
    angle = np.linspace(0, math.pi, 100_002)[1:-1]
    eigenvalue = 1 + beta + 2 * math.sqrt(beta) * np.cos(angle)
    mass = np.cumsum(np.sin(angle) ** 2 / eigenvalue)
    median = float(np.interp(0.5, mass / mass[-1], eigenvalue))
    return math.sqrt((2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))) / median)


def relaxed(name: str, delta: Delta, *, omega: float, importance: Mapping[str, Tensor]) -> Delta:
    """Change those input channels less that protected text uses most (AIM, arXiv 2502.02421).

    A channel is scaled by 1 - (1 - ``omega``) importance; what has none is kept whole: embeddings, biases.
    """
    return delta * (1 - (1 - omega) * importance[name]) if name in importance else delta


def channel_importance(model: PreTrainedModel, text: Sequence[TokenBatch], names: Collection[str]) -> dict[str, Delta]:
    """The size of each weight's input channels on a text, relative to the largest; it broadcasts with the weight.

    The size is the root mean square without attention sinks, beside which no other channel would be important; in
    AIM's own code it is the mean of |x|.
    """
    met, found = roles(model, names), {}
    for _, inputs in collect_moments(model, {"text": text}, names):
        for name in (name for name in inputs if met.get(name) in ("columns", "rows", "channel")):
            mean = inputs[name]["text"].mean()
            squares = (mean.diagonal() if mean.ndim == 2 else mean).float()
            relative = (squares / squares.max().clamp(min=1e-30)).sqrt().cpu()
            found[name] = relative[:, None] if met[name] == "rows" else relative
    return found


def trimmed(_: str, delta: Delta, *, density: float) -> Delta:
    """Keep the largest share of a tensor's elements (TIES, arXiv 2306.01708); one task vector elects all signs."""
    from peft.utils.merge_utils import ties

    return ties([delta], torch.ones(1), density)


def dropped(name: str, delta: Delta, *, density: float, seed: int) -> Delta:
    """Keep a random share of a tensor's elements, scaled up to keep their mean (DARE, arXiv 2311.03099)."""
    # of its own, whatever the order of tensors, which several threads change at once
    generator = torch.Generator().manual_seed(int(sha256_bytes(f"{seed} {name}".encode())[:15], 16))
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def projected(task_vector: TaskVector, directions: Mapping[int, Callable[[], Float[Tensor, "features d"]]]) -> Method:
    """The change projected onto each layer's most specific features, over their number (arXiv 2605.28649).

    Args:
        directions: layer -> what loads its feature directions, most specific first.

    Raises:
        CheckpointError: with every matrix whose role is not known.
    """
    width = task_vector.base.hidden_size
    residual_axes(task_vector, directions, width)
    numbers = sorted({max(1, round(share * width)) for share in (1.0, 0.6, 0.3, 0.1, 0.03)}, reverse=True)
    bases = {layer: nested_basis(load()[:width]) for layer, load in directions.items()}
    plans: dict[float, EditPlan | None] = {}
    for number in numbers:
        first = {layer: Q[:, : int((row < number).sum())] for layer, (Q, row) in bases.items()}
        plans[float(number)] = EditPlan.for_layers(list(bases), transform=FeatureProjection(bases=first))
    return Method("SAE projection", "features", {**plans, 0.0: None})
