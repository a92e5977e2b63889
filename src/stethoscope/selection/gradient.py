"""The first-order effect of every layer's task vector on the loss, from one backward pass a batch.

    gradient(model, task_vector, texts).gains.score()

The memory that a gradient takes is that of a few tensors, whatever the model's depth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import STACKED, live_tensors
from stethoscope.losses import loss_gradient, run
from stethoscope.selection.rivals import Gains, Texts

_CHUNK = 1 << 20  # elements of a dot product widened to float64 at once


@dataclass(frozen=True, kw_only=True)
class GradientEffects:
    """The first-order effect of the task vector, -<dL/dW, tau>, whole layers and tensor by tensor.

    Attributes:
        gains: per batch; ``changes`` are the layers in order.
        tensors: corpus -> canonical name -> nats per predicted token.
    """

    gains: Gains
    tensors: Mapping[str, Mapping[str, float]]


def gradient(
    model: PreTrainedModel, task_vector: TaskVector, texts: Texts, *, memory: int = 8 << 30
) -> GradientEffects:
    """-<dL/dW, tau> of every layer from one backward pass a batch.

    Each tensor's gradient is met with its task vector and freed as soon as it is there, so no more than a few exist.

    Args:
        texts: corpus -> batches; a batch is the smallest unit whose effect is known, so give small ones for intervals.
        memory: bytes of float32 task vector to keep between batches; what does not fit is read again.
    """
    taus = _Taus(task_vector, memory)
    parameters = {
        name: tensor
        for name, tensor in live_tensors(model).items()
        if isinstance(tensor, nn.Parameter) and parse_name(name).layer is not None and name in taus
    }
    names = list(parameters)
    effects = {name: np.zeros((len(text), len(names))) for name, text in texts.items()}
    losses = {name: np.zeros(len(text)) for name, text in texts.items()}
    for corpus, text in texts.items():
        for i, batch in enumerate(text):

            def meet(name: str, slope: Tensor, row: Float64[np.ndarray, " tensors"] = effects[corpus][i]) -> None:
                row[names.index(name)] = -_dot(slope, taus[name])

            counted = batch.predicted[:, 1:].to(model.device)
            with torch.enable_grad(), _gradients_met(parameters, meet):
                output = run(model, batch.input_ids)
                found, slope = loss_gradient(model, output, batch.input_ids, counted)
                output.last_hidden_state.backward(slope)
            losses[corpus][i] = float(found.where(counted, 0.0).double().sum())
    layers = sorted({_layer(name) for name in names})
    member = np.array([[_layer(name) == layer for layer in layers] for name in names], dtype=float)
    tokens = {name: np.array([int(b.predicted.sum()) for b in text]) for name, text in texts.items()}
    per_token = {corpus: found.sum(0) / tokens[corpus].sum() for corpus, found in effects.items()}
    return GradientEffects(
        gains=Gains(
            changes=tuple({layer: 1.0} for layer in layers),
            sums={corpus: found @ member for corpus, found in effects.items()},
            losses=losses,
            tokens=tokens,
        ),
        tensors={corpus: dict(zip(names, found.tolist(), strict=True)) for corpus, found in per_token.items()},
    )


@contextmanager
def _gradients_met(parameters: Mapping[str, nn.Parameter], meet: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Every parameter's gradient goes to ``meet`` when it is complete, and is freed."""
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    handles = []

    def hook(name: str) -> Callable[[Tensor], None]:
        def met(parameter: Tensor) -> None:
            slope, parameter.grad = parameter.grad, None
            if slope is not None:
                meet(name, slope)

        return met

    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
            parameter.grad = None


class _Taus:
    """The task vector by the names of a live model's tensors, kept as far as it fits."""

    def __init__(self, task_vector: TaskVector, memory: int) -> None:
        self._task_vector, self._left = task_vector, memory
        self._names = frozenset(task_vector.names)
        self._kept: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names or bool(self._experts(name))

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        if name in self._kept:
            return self._kept[name]
        experts = self._experts(name)
        tau = torch.stack([self._joined(parts) for parts in experts]) if experts else self._task_vector.delta(name)
        if tau.nbytes <= self._left:
            self._left -= tau.nbytes
            self._kept[name] = tau
        return tau

    def _experts(self, name: str) -> list[list[str]]:
        """The stored tensors of each expert, where the live model has all experts in one."""
        prefix, _, last = name.rpartition(".")
        if name in self._names or last not in STACKED:
            return []
        experts: list[list[str]] = []
        while (parts := [f"{prefix}.{len(experts)}.{module}.weight" for module in STACKED[last]])[0] in self._names:
            experts.append(parts)
        return experts

    def _joined(self, parts: Sequence[str]) -> Tensor:
        return torch.cat([self._task_vector.delta(part) for part in parts])


def _dot(one: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> float:
    pairs = zip(one.flatten().split(_CHUNK), other.flatten().split(_CHUNK), strict=True)
    return sum(float(torch.dot(a.double(), b.to(a.device).double())) for a, b in pairs)


def _layer(name: str) -> int:
    layer = parse_name(name).layer
    assert layer is not None
    return layer
