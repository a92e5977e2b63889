"""What a model's matrices really read: their inputs on a sample of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.checkpoints.names import parse_name
from stethoscope.corpus import TokenBatch
from stethoscope.editing.sides import READERS
from stethoscope.sites import HookPoint, hear, hook_point

_SINK = 10.0  # times the median residual norm: an attention sink, which statistics leave out too


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Real inputs of matrices on one corpus: layer -> canonical name -> one row a token."""

    tokens: int
    layers: Mapping[int, Mapping[str, Tensor]]


@torch.no_grad()
def matrix_inputs(model: PreTrainedModel, names: Sequence[str], batches: Sequence[TokenBatch], tokens: int) -> Inputs:
    """Inputs of every named matrix that is a module of its own, on tokens spread evenly over a corpus.

    Readers of one part of a block share their input, which is kept once.
    """
    modules = {parse_name(f"{name}.weight").canonical: module for name, module in model.named_modules()}
    places: dict[str, tuple[int, str]] = {}
    points: dict[tuple[int, str], HookPoint] = {}
    for name in names:
        layer = parse_name(name).layer
        routed = ".experts." in name  # sees only some tokens
        if name in modules and layer is not None and not routed:
            module = name.removesuffix(".weight")
            shared = module.rpartition(".")[0] if module.rpartition(".")[2] in READERS else module
            places[name] = (layer, shared)
            points.setdefault(places[name], HookPoint(module=modules[name], reads_input=True))
            points.setdefault((layer, ""), hook_point(model, layer, "resid_pre"))
    countable = sum(int(batch.countable.sum()) for batch in batches)
    picked = np.unique(np.linspace(0, countable - 1, min(tokens, countable)).round().astype(int))
    kept: dict[tuple[int, str], list[Tensor]] = {key: [] for key in points}
    before = 0
    for batch in batches:
        count = int(batch.countable.sum())
        here = torch.from_numpy(picked[(picked >= before) & (picked < before + count)] - before)
        before += count
        if len(here) and points:
            for key, values in hear(model, points, batch.input_ids).items():
                kept[key].append(values[batch.countable.to(values.device)][here.to(values.device)].float().cpu())
    rows = {key: torch.cat(several) for key, several in kept.items() if several}
    sound = {layer: _sound(values) for (layer, place), values in rows.items() if not place}
    rows = {(layer, place): values[sound[layer]] for (layer, place), values in rows.items()}
    layers: dict[int, dict[str, Tensor]] = {}
    for name, key in places.items():
        if key in rows:
            layers.setdefault(key[0], {})[name] = rows[key]
    return Inputs(tokens=len(picked), layers=layers)


def _sound(residual: Float[Tensor, "tokens d"]) -> Bool[Tensor, " tokens"]:
    norms = residual.norm(dim=1)
    return norms <= _SINK * norms.median()
