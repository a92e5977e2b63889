"""How well an SAE reads a model: variance explained, L0, dead and dense features, as sums that merge."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stethoscope.display import NONE
from stethoscope.results.diagnosis import DENSE_RATE, SAEHealth


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
        if not self.tokens:
            return SAEHealth(tokens=0, variance_explained=None, l0=None, dead=None, dense=None)
        variance = self.square - float(self.total.square().sum()) / self.tokens
        rate = self.fired.double() / self.tokens
        return SAEHealth(
            tokens=self.tokens,
            variance_explained=1 - self.residual / variance if variance > 0 else None,
            l0=float(rate.sum()),
            dead=float((self.fired == 0).double().mean()),
            dense=float((rate > DENSE_RATE).double().mean()),
        )


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
        whole = found["all"]
        values = [(found[kind]["variance_explained"], ".3f") for kind in kinds]
        values += [(whole["l0"], ".0f")]
        values += [(whole[name] and 100 * whole[name], ".1f") for name in ("dead", "dense")]
        rows.append([str(layer), *(NONE if value is None else format(value, form) for value, form in values)])
    return rows
