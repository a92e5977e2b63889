"""How well an SAE reads a model: variance explained, L0, dead and dense features, as sums that merge."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stethoscope.display import number, percent
from stethoscope.results.diagnosis import SAEHealth


@dataclass(kw_only=True)
class HealthSums:
    """Sums over tokens from which an SAE's health follows; two of them add up.

    Attributes:
        tokens: tokens seen.
        total: sum of activations per dimension.
        square: sum of squared activations.
        residual: sum of squared differences between activation and reconstruction.
        fired: tokens on which each feature fired.
        mass: sum of each feature's activations.
    """

    tokens: int
    total: Float[Tensor, " d_in"]
    square: float
    residual: float
    fired: Int[Tensor, " width"]
    mass: Float[Tensor, " width"]

    def __add__(self, other: "HealthSums") -> "HealthSums":
        return HealthSums(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})

    def health(self) -> SAEHealth:
        """What the sums say; undefined values are None."""
        count = max(self.tokens, 1)
        variance = self.square - float(self.total.square().sum()) / count
        explained = 1 - self.residual / variance if variance > 0 else None
        rest = SAEHealth(tokens=0, variance_explained=explained, l0=None, dead=None, dense=None)
        return rest.on(self.fired.cpu().numpy() / count, self.tokens)


@torch.no_grad()
def measure_health(sae: Any, hidden: Float[Tensor, "tokens d_in"], *, chunk: int = 4096) -> HealthSums:
    """Encode and decode activations with an SAE, in chunks of tokens, and sum up how well it does."""

    def measure(part: Float[Tensor, "chunk d_in"]) -> HealthSums:
        values = part.to(sae.W_enc.dtype)
        features, wide = sae.encode(values), values.double()
        return HealthSums(
            tokens=len(wide),
            total=wide.sum(0),
            square=float(wide.square().sum()),
            residual=float((wide - sae.decode(features).double()).square().sum()),
            fired=(features > 0).sum(0),
            mass=features.double().sum(0),
        )

    return reduce(add, map(measure, hidden.split(chunk)))


def health_rows(layers: Mapping[Any, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """Plain health by layer and kind of text, ``all`` among them, as rows of text with a header."""
    kinds = [kind for kind in next(iter(layers.values())) if kind != "all"]
    kinds += ["all"] if len(kinds) > 1 else []
    rows = [["layer", *kinds, "L0", "dead, %", "dense, %"]]
    for layer, found in layers.items():
        explained, whole = [number(found[kind]["variance_explained"], ".3f") for kind in kinds], found["all"]
        shares = [percent(whole[name]) for name in ("dead", "dense")]
        rows.append([str(layer), *explained, number(whole["l0"], ".0f"), *shares])
    return rows
