"""Scores of a layer that need no SAE: what its edit does to the loss, to first order and in truth.

    texts = {"target": list(batches(...)), "control": list(batches(...))}
    edits = LayerEdits(model, task_vector)
    injection(model, edits, texts).score()       # the truth: each layer alone
    gradient(model, task_vector, texts).gains.score()
    local_effect(model, edits, texts).score()

The task vector's own norm is `TaskVector.energy_by_layer`; `shifts.py` compares the two models' activations.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.corpus import TokenBatch
from stethoscope.diagnosis.attribution import own_changes
from stethoscope.editing.apply import STACKED, live_tensors
from stethoscope.editing.layers import LayerEdits
from stethoscope.losses import loss_gradient, run, token_losses
from stethoscope.models import decoder_layers
from stethoscope.replay import Recording
from stethoscope.sites import hook_point

Texts = Mapping[str, Sequence[TokenBatch]]
Change = Mapping[int, float]  # layer -> coefficient
Progress = Callable[[int, int], None]
_CHUNK = 1 << 20  # elements of a dot product widened to float64 at once


@dataclass(frozen=True, kw_only=True)
class Gains:
    """By how much changes to a model lower the loss on texts; a text's unit is a document, or a batch of them.

    Attributes:
        changes: layer -> coefficient of each change.
        sums: corpus -> nats by which each unit's summed loss falls under each change; negative where it rises.
        losses: corpus -> the base's summed loss of each unit.
        tokens: corpus -> predicted tokens of each unit.
    """

    changes: tuple[Change, ...]
    sums: Mapping[str, Float64[np.ndarray, "units changes"]]
    losses: Mapping[str, Float64[np.ndarray, " units"]]
    tokens: Mapping[str, Int64[np.ndarray, " units"]]

    def mean(self, corpus: str) -> Float64[np.ndarray, " changes"]:
        """Nats per token by which each change lowers the loss."""
        return self.sums[corpus].sum(0) / self.tokens[corpus].sum()

    def error(self, corpus: str) -> Float64[np.ndarray, " changes"]:
        """The standard error of `mean` over units, paired with the base; NaN for one unit."""
        return standard_error(self.sums[corpus], self.tokens[corpus])

    def score(self, control: str = "control") -> Float64[np.ndarray, " changes"]:
        """Gain on target less gain on a control corpus."""
        return self.mean("target") - self.mean(control)


def standard_error(
    sums: Float64[np.ndarray, "units changes"], tokens: Int64[np.ndarray, " units"]
) -> Float64[np.ndarray, " changes"]:
    """Of sums.sum(0) / tokens.sum() over units that are drawn together with their tokens: a ratio's error."""
    units = len(tokens)
    if units < 2:
        return np.full(sums.shape[1], np.nan)
    rest = sums - tokens[:, None] * (sums.sum(0) / tokens.sum())
    return np.sqrt((rest**2).sum(0) * units / (units - 1)) / tokens.sum()


def injection(
    model: PreTrainedModel,
    edits: LayerEdits,
    texts: Texts,
    *,
    coefficient: float = 1.0,
    layers: Collection[int] | None = None,
    progress: Progress | None = None,
) -> Gains:
    """The truth: each layer edited alone, in memory, and the loss measured; a forward restarts at the edited layer.

    Args:
        texts: corpus -> batches; see `stethoscope.corpus.batches`.
        layers: all if None.

    Returns:
        per document; ``changes`` are the layers in order.
    """
    chosen = range(len(decoder_layers(model))) if layers is None else sorted(layers)
    return measure(model, edits, texts, [{layer: coefficient} for layer in chosen], progress=progress)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    edits: LayerEdits,
    texts: Texts,
    changes: Sequence[Change],
    *,
    progress: Progress | None = None,
) -> Gains:
    """The truth about any sets of layers, each at any coefficients; see `forwards` for what it costs.

    Args:
        progress: called with batches done and in all.

    Returns:
        per document.
    """
    depth = len(decoder_layers(model))
    starts = [_start(change, depth) for change in changes]
    # Neighbours share edited layers, so that few are read again where not all fit in memory.
    order = sorted((i for i, start in enumerate(starts) if start < depth), key=lambda i: sorted(changes[i].items()))
    sums = {name: np.zeros((_documents(text), len(changes))) for name, text in texts.items()}
    losses = {name: np.zeros(len(found)) for name, found in sums.items()}
    done, total = 0, sum(map(len, texts.values()))
    for name, text in texts.items():
        for batch in text:
            rows = list(batch.documents)
            recording = Recording(model, batch.input_ids, starts=set(starts) - {depth})
            losses[name][rows] = _loss(model, recording.output, batch)
            for i in order:
                with edits.entered({n: c for n, c in changes[i].items() if c}):
                    output = recording.replay(starts[i])
                sums[name][rows, i] = losses[name][rows] - _loss(model, output, batch)
            done += 1
            if progress:
                progress(done, total)
    tokens = {name: _tokens(text) for name, text in texts.items()}
    return Gains(changes=tuple(map(dict, changes)), sums=sums, losses=losses, tokens=tokens)


def forwards(changes: Sequence[Change], depth: int) -> float:
    """What `measure` costs in forwards of the whole text: one for the base, and each change's share of the blocks."""
    return 1 + sum(1 - _start(change, depth) / depth for change in changes)


def local_effect(
    model: PreTrainedModel, edits: LayerEdits, texts: Texts, *, site: str = "resid_post", coefficient: float = 1.0
) -> Gains:
    """-dL/dh . dh at every block's site, dh being what the block's own edit does on the base's input to it.

    The first-order effect through activations: one forward, one backward, and every block once more.

    Returns:
        per document; ``changes`` are the layers in order.
    """
    points = {layer: hook_point(model, layer, site) for layer in range(len(decoder_layers(model)))}
    sums = {name: np.zeros((_documents(text), len(points))) for name, text in texts.items()}
    losses = {name: np.zeros(len(found)) for name, found in sums.items()}
    for name, text in texts.items():
        for batch in text:
            heard = own_changes(model, edits, points, batch, coefficient=coefficient)
            losses[name][list(batch.documents)] = heard.losses.cpu().numpy()
            for layer, change in heard.changes.items():
                gain = change.gain().where(batch.attention_mask.to(change.gradient.device), 0.0)
                sums[name][list(batch.documents), layer] = gain.sum(1).cpu().numpy()
    tokens = {name: _tokens(text) for name, text in texts.items()}
    return Gains(changes=tuple({n: coefficient} for n in points), sums=sums, losses=losses, tokens=tokens)


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

            counted = batch.attention_mask[:, 1:].to(model.device)
            with torch.enable_grad(), _gradients_met(parameters, meet):
                output = run(model, batch.input_ids)
                found, slope = loss_gradient(model, output, batch.input_ids, counted)
                output.last_hidden_state.backward(slope)
            losses[corpus][i] = float(found.where(counted, 0.0).double().sum())
    layers = sorted({_layer(name) for name in names})
    member = np.array([[_layer(name) == layer for layer in layers] for name in names], dtype=float)
    tokens = {name: np.array([int(b.attention_mask[:, 1:].sum()) for b in text]) for name, text in texts.items()}
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


def _start(change: Change, depth: int) -> int:
    return min((layer for layer, coefficient in change.items() if coefficient), default=depth)


def _loss(model: PreTrainedModel, output: object, batch: TokenBatch) -> Float64[np.ndarray, " rows"]:
    found = token_losses(model, output, batch.input_ids)
    counted = batch.attention_mask[:, 1:].to(found.device)
    return found.where(counted, 0.0).double().sum(1).cpu().numpy()


def _documents(text: Sequence[TokenBatch]) -> int:
    return 1 + max(i for batch in text for i in batch.documents)


def _tokens(text: Sequence[TokenBatch]) -> Int64[np.ndarray, " documents"]:
    counts = np.zeros(_documents(text), dtype=np.int64)
    for batch in text:
        counts[list(batch.documents)] = batch.attention_mask[:, 1:].sum(1).numpy()
    return counts
