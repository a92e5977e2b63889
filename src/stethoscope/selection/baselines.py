"""Scores of a layer that validation compares: those of text, and those of the edit with SAEs and without.

    scores = text_scores(statistics) | edit_scores(model, edits, saes, statistics, texts)

`gradient` is the first-order effect on the loss through weights; `injection` has that through activations.
`residual_shift` and `tuned_shift` compare base and tuned on the same text, so they accumulate over layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float, Float64
from sae_lens import SAE
from torch import Tensor, nn
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.diagnosis.attribution import attribute, attribution_scores
from stethoscope.diagnosis.scores import SCORES
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.diagnosis.uncertainty import assess
from stethoscope.editing.apply import STACKED, Swap, live_tensors, prepare
from stethoscope.editing.filter import TARGET, write_filters
from stethoscope.editing.layers import LayerEdits
from stethoscope.editing.plan import EditPlan
from stethoscope.models.forward import loss_gradient, run
from stethoscope.models.load import decoder_layers
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.results.validation import Kind
from stethoscope.saes.activations import attention_sinks, on_device
from stethoscope.selection.injection import Gains, Progress, Texts, local_effect
from stethoscope.text.tokens import TokenBatch

Scores = dict[str, tuple[Kind, dict[int, float]]]
PERMUTATIONS = 50  # enough for a null's mean
FEATURES = 64  # of the target, that `tuned_shift` looks at
CHUNK_TOKENS = 1024  # encoded at once
CHUNK_ELEMENTS = 1 << 20  # of a dot product, widened to float64 at once


def text_scores(statistics: Mapping[str, FeatureStatistics], *, control: str = "control", seed: int = 0) -> Scores:
    """The scores that need text alone, as excess over chance: of each layer, and what it adds to the one before."""
    found: Scores = {}
    for name, score in SCORES.items():
        made = assess(
            statistics["target"],
            statistics[control],
            score,
            permutations=PERMUTATIONS,
            resamples=2,
            rng=np.random.default_rng(seed),
        )
        for key, one in ((name, made), (f"{name} increment", made.increments())):
            found[key] = ("sae", dict(zip(one.layers, one.excess.tolist(), strict=True)))
    return found


def edit_scores(
    model: PreTrainedModel,
    edits: LayerEdits,
    saes: Mapping[int, SAE],
    statistics: Mapping[str, FeatureStatistics],
    texts: Texts,
    *,
    control: str = "control",
    site: str = "resid_post",
    tap: str | None = None,
    coefficient: float = 1.0,
    progress: Progress | None = None,
) -> Scores:
    """The scores that look at the fine-tune too, through SAEs and without them.

    Args:
        saes: by layer, reading ``site``.
        statistics: of target and control; the target-specific features are taken from them.
        texts: ``target`` and the control, as batches.
        coefficient: of the edit whose effects are estimated.
        progress: called with scores done and in all.
    """
    layers, task_vector = sorted(saes), edits.task_vector
    both = {"target": texts["target"], control: texts[control]}

    def rival(values: Mapping[int, float]) -> tuple[Kind, dict[int, float]]:
        return "rival", {layer: values.get(layer, 0.0) for layer in layers}  # an adapter may leave layers alone

    def attributions() -> Scores:
        made = {
            name: attribute(model, edits, saes, text, site=site, tap=tap, coefficient=coefficient)
            for name, text in both.items()
        }
        by_layer = attribution_scores(made["target"], made[control])
        return {
            "attribution": ("sae", {layer: by_layer[layer].score for layer in layers}),
            "attribution net": ("sae", {layer: by_layer[layer].explained for layer in layers}),
        }

    def shifts() -> Scores:
        features = {layer: _specific(statistics["target"], statistics[control], layer) for layer in layers}
        moved = tuned_shift(model, task_vector, saes, features, both["target"], site=site, tap=tap)
        return {"tuned_shift": ("sae", moved)}

    steps: tuple[Callable[[], Scores], ...] = (
        attributions,
        shifts,
        lambda: {"norm": rival(task_vector.energy_by_layer())},
        lambda: {"residual_shift": rival(residual_shift(model, task_vector, both["target"]))},
        lambda: {"gradient": rival(gradient(model, task_vector, both, coefficient=coefficient).by_layer(control))},
        lambda: {"local_effect": rival(local_effect(model, edits, both, coefficient=coefficient).by_layer(control))},
        lambda: {"functional_specificity": rival(functional_specificity(model, task_vector, both, control))},
    )
    found: Scores = {}
    for done, step in enumerate(steps, 1):
        found |= step()
        if progress:
            progress(done, len(steps))
    return found


def _specific(target: FeatureStatistics, control: FeatureStatistics, layer: int) -> dict[int, float]:
    """The features whose share of mass is largest on target against control, weighed by that difference."""
    ours, theirs = target.layers[layer], control.layers[layer]
    difference = ours.mass - theirs.mass
    return {int(i): float(difference[i]) for i in ours.toward(theirs)[:FEATURES] if difference[i] > 0}


def gradient(
    model: PreTrainedModel, task_vector: TaskVector, texts: Texts, *, coefficient: float = 1.0, memory: int = 8 << 30
) -> Gains:
    """-coefficient <dL/dW, tau> of every layer, to first order the effect through weights; one backward pass a batch.

    Each tensor's gradient is multiplied with its task vector and freed as soon as it is there, so no more than a few
    exist, whatever the model's depth.

    Args:
        memory: bytes of float32 task vector to keep between batches; what does not fit is read again.

    Returns:
        per batch, so give small ones for intervals; ``changes`` are the layers in order.
    """
    taus = _Taus(task_vector, memory)
    parameters: dict[str, nn.Parameter] = {}
    of: list[int] = []  # each one's layer
    for name, tensor in live_tensors(model).items():
        layer = parse_name(name).layer
        if isinstance(tensor, nn.Parameter) and layer is not None and taus.parts(name):
            parameters[name] = tensor
            of.append(layer)
    names = list(parameters)
    effects = {name: np.zeros((len(text), len(names))) for name, text in texts.items()}
    losses = {name: np.zeros(len(text)) for name, text in texts.items()}
    for corpus, text in texts.items():
        for i, batch in enumerate(text):

            def take(name: str, slope: Tensor, row: Float64[np.ndarray, " tensors"] = effects[corpus][i]) -> None:
                row[names.index(name)] = -coefficient * _dot(slope, taus[name])

            counted = batch.predicted[:, 1:].to(model.device)
            with torch.enable_grad(), _gradients_taken(parameters, take):
                output = run(model, batch.input_ids)
                found, slope = loss_gradient(model, output, batch.input_ids, counted)
                output.last_hidden_state.backward(slope)
            losses[corpus][i] = float(found.where(counted, 0.0).double().sum())
    layers = sorted(set(of))
    member = np.array([[own == layer for layer in layers] for own in of], dtype=float)
    return Gains(
        changes=tuple({layer: coefficient} for layer in layers),
        sums={corpus: found @ member for corpus, found in effects.items()},
        losses=losses,
        tokens={name: np.array([int(b.predicted.sum()) for b in text]) for name, text in texts.items()},
    )


@contextmanager
def _gradients_taken(parameters: Mapping[str, nn.Parameter], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Every parameter's gradient goes to ``take`` when it is complete, and is freed."""

    def taken(name: str, parameter: Tensor) -> None:
        slope, parameter.grad = parameter.grad, None
        if slope is not None:
            take(name, slope)

    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(partial(taken, name)))
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

    def parts(self, name: str) -> list[list[str]]:
        """The stored tensors of a live one: its own, or those of each expert where it holds all; none if unchanged."""
        if name in self._names:
            return [[name]]
        prefix, _, last = name.rpartition(".")
        experts: list[list[str]] = []
        while last in STACKED:
            stored = [f"{prefix}.{len(experts)}.{module}.weight" for module in STACKED[last]]
            if stored[0] not in self._names:
                break
            experts.append(stored)
        return experts

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        if name in self._kept:
            return self._kept[name]
        if name in self._names:
            tau = self._task_vector.delta(name)
        else:
            tau = torch.stack([torch.cat([self._task_vector.delta(one) for one in part]) for part in self.parts(name)])
        if tau.nbytes <= self._left:
            self._left -= tau.nbytes
            self._kept[name] = tau
        return tau


def _dot(one: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> float:
    pairs = zip(one.flatten().split(CHUNK_ELEMENTS), other.flatten().split(CHUNK_ELEMENTS), strict=True)
    return sum(float(torch.dot(a.double(), b.to(a.device).double())) for a, b in pairs)


@torch.no_grad()
def functional_specificity(
    model: PreTrainedModel, task_vector: TaskVector, texts: Texts, control: str = "control"
) -> dict[int, float]:
    """E_T |tau x|^2 / E_C |tau x|^2 per layer: how much more its change does on target than on control text.

    x are the inputs of the layer's tensors in the base model; 0 where the change does nothing on control text.
    """
    both = {TARGET: texts["target"], control: texts[control]}
    with TemporaryDirectory() as folder:  # at strength 0 nothing is filtered
        found = write_filters(
            model,
            task_vector,
            both,
            Path(folder) / "filters",
            provenance=Provenance(),
            strengths=(0.0,),
            layers=range(task_vector.base.layers),
        )
    return {one.layer: one.raw.specificity or 0.0 for one in found.layers if one.layer is not None}


def residual_shift(model: PreTrainedModel, task_vector: TaskVector, text: Sequence[TokenBatch]) -> dict[int, float]:
    """Mean difference of the residual stream after each layer, tuned less base, in its standard deviations.

    Standardised per dimension with the variance pooled over both models, then the root mean square over dimensions.
    Special tokens and attention sinks do not count.
    """
    swap = prepare(model, task_vector, EditPlan.everything())
    layers = range(len(decoder_layers(model)))
    tokens, sums = 0, np.zeros((len(layers), 4, model.config.get_text_config().hidden_size))
    for batch in text:
        counted, pairs = _base_and_tuned(model, swap, layers, "resid_post", None, batch)
        tokens += int(counted.sum())
        for layer, (base, tuned) in pairs:
            b, t = (x[counted.to(x.device)].double() for x in (base, tuned))
            sums[layer] += torch.stack([b.sum(0), t.sum(0), (b**2).sum(0), (t**2).sum(0)]).cpu().numpy()
    mean_b, mean_t, square_b, square_t = (sums / tokens).transpose(1, 0, 2)
    variance = (square_b - mean_b**2 + square_t - mean_t**2) / 2
    return dict(enumerate(np.sqrt(((mean_t - mean_b) ** 2 / np.maximum(variance, 1e-12)).mean(1)).tolist()))


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
) -> dict[int, float]:
    """How far tuned moves given features at each layer, as a share of all activation under the base.

    Args:
        saes: by layer, reading ``site``.
        features: layer -> feature -> weight: those of the target, and how much each counts.
        text: one corpus, as a rule the target.
    """
    swap, layers = prepare(model, task_vector, EditPlan.everything()), sorted(saes)
    moved, mass = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for batch in text:
        counted, pairs = _base_and_tuned(model, swap, layers, site, tap, batch)
        for layer, pair in pairs:
            own = features.get(layer, {})
            weights = torch.tensor(list(own.values()), dtype=torch.float64)
            chunks = [x[counted.to(x.device)].split(CHUNK_TOKENS) for x in pair]
            with on_device(saes[layer], pair[0].device):
                for both in zip(*chunks, strict=True):
                    before, after = (saes[layer].encode(x.float()) for x in both)
                    change = (after - before).sum(0, dtype=torch.float64).cpu()
                    moved[layer] += float(change[list(own)] @ weights)
                    mass[layer] += float(before.sum(dtype=torch.float64))
    return {layer: moved[layer] / mass[layer] if mass[layer] else 0.0 for layer in layers}


def _base_and_tuned(
    model: PreTrainedModel, swap: Swap, layers: Sequence[int], site: str, tap: str | None, batch: TokenBatch
) -> tuple[Tensor, Iterator[tuple[int, tuple[Float[Tensor, "rows tokens d_in"], Float[Tensor, "rows tokens d_in"]]]]]:
    """Which tokens count, and a site of every layer under the base and under tuned, from two forwards."""
    points = {layer: hook_point(model, layer, site, tap) for layer in layers}
    streams = {("stream", layer): hook_point(model, layer, "resid_post") for layer in layers}
    base = read_activations(model, {**points, **streams}, batch.input_ids)
    with swap.entered():  # under another config its modules are others, too
        points = {layer: hook_point(model, layer, site, tap) for layer in layers}
        tuned = read_activations(model, points, batch.input_ids)
    sinks = attention_sinks((base[key] for key in streams), batch.attention_mask)
    return batch.countable & ~sinks, ((layer, (base[layer], tuned[layer])) for layer in layers)
