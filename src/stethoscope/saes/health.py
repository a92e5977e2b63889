"""How well an SAE reads a model: variance explained, L0, dead and dense features, as sums that merge."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

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

    @classmethod
    def of(
        cls,
        hidden: Float[Tensor, "tokens d_in"],
        features: Float[Tensor, "tokens width"],
        decoded: Float[Tensor, "tokens d_in"],
    ) -> "HealthSums":
        """The sums of one batch: activations, what the SAE encoded them to, and what it made of that."""
        wide = hidden.double()
        return cls(
            tokens=len(wide),
            total=wide.sum(0),
            square=float(wide.square().sum()),
            residual=float((wide - decoded.double()).square().sum()),
            fired=(features > 0).sum(0),
            mass=features.double().sum(0),
        )

    @classmethod
    def nothing(cls, width: int) -> "HealthSums":
        """The sums of no tokens."""
        return cls.of(torch.zeros(0, 1), torch.zeros(0, width), torch.zeros(0, 1))

    def __add__(self, other: "HealthSums") -> "HealthSums":
        return HealthSums(
            tokens=self.tokens + other.tokens,
            total=self.total + other.total,
            square=self.square + other.square,
            residual=self.residual + other.residual,
            fired=self.fired + other.fired,
            mass=self.mass + other.mass,
        )

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
    """Encode and decode activations with an SAE, in chunks of tokens, and sum up what it made of them."""
    sums = None
    for part in hidden.split(chunk) if len(hidden) else (hidden,):
        values = part.to(sae.W_enc.dtype)
        features = sae.encode(values)
        batch = HealthSums.of(values, features, sae.decode(features))
        sums = batch if sums is None else sums + batch
    assert sums is not None
    return sums


def health_rows(layers: Mapping[Any, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """Plain health by layer and kind of text, ``all`` among them, as rows of text with a header."""
    kinds = [kind for kind in next(iter(layers.values())) if kind != "all"]
    kinds += ["all"] if len(kinds) > 1 else []

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [["layer", *kinds, "L0", "dead, %", "dense, %"]]
    for layer, found in layers.items():
        whole = found["all"]
        shares = [None if whole[name] is None else 100 * whole[name] for name in ("dead", "dense")]
        rows.append(
            [
                str(layer),
                *(shown(found[kind]["variance_explained"], ".3f") for kind in kinds),
                shown(whole["l0"], ".0f"),
                *(shown(share, ".1f") for share in shares),
            ]
        )
    return rows
