"""One matrix' change as a linear map: its outputs, its singular values and leading directions, low-rank where it is."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.sides import Side


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """How a change's energy is spread over its singular directions.

    Attributes:
        leading: the leading singular vectors on the residual stream's side.
        effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli, 2007).
        stable_rank: squared Frobenius over squared spectral norm.
    """

    leading: Float64[Tensor, "d leading"]
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True, kw_only=True)
class LinearChange:
    """tau = left @ right in (out, in), whichever way it is stored; ``right`` alone where it has full rank.

    Attributes:
        left: LoRA's B times its scaling, or None.
        right: LoRA's A, or the whole change.
    """

    left: Float[Tensor, "d_out rank"] | None
    right: Float[Tensor, "rank d_in"]

    @classmethod
    def of(cls, task_vector: TaskVector, name: str, side: Side) -> "LinearChange":
        """A tensor's change; for plain LoRA the factors, and the product is never formed."""
        factors = task_vector.factors(name) if isinstance(task_vector, AdapterTaskVector) else None
        if factors is not None and factors.magnitude is None:
            return cls(left=factors.scaling * factors.B, right=factors.A)
        delta = task_vector.delta(name)
        stored_as_linear = side.axis == (0 if side.writes else 1)
        return cls(left=None, right=delta if stored_as_linear else delta.T)

    def outputs(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """What the change adds to the matrix' outputs."""
        out = x @ self.right.T
        return out if self.left is None else out @ self.left.T

    def spectrum(self, side: Side, leading: int) -> Spectrum | None:
        """Singular values and leading directions; None where the change is zero.

        Singular values below 1e-5 of the largest are the rounding of float32, and count as 0.
        """
        if self.left is not None:
            outer, core_left = torch.linalg.qr(self.left.double())
            inner, core_right = torch.linalg.qr(self.right.double().T)
            u, values, v = torch.linalg.svd(core_left @ core_right.T)
            vectors = outer @ u if side.writes else inner @ v.T
        else:
            matrix = (self.right if side.writes else self.right.T).double()  # the residual stream's axis first
            tall = matrix.shape[0] > matrix.shape[1]
            # squared along its shorter side: an SVD of the whole costs ten times as much
            squares, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
            values, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
            if tall:
                vectors = matrix @ vectors[:, :leading] / values[:leading].clamp(min=1e-300)
        if not values[0] > 0:
            return None
        values = torch.where(values > 1e-5 * values[0], values, 0.0)
        shares = values / values.sum()
        return Spectrum(
            leading=vectors[:, : min(leading, int((values > 0).sum()))],
            effective_rank=float(torch.special.entr(shares).sum().exp()),
            stable_rank=float((values / values[0]).square().sum()),
        )


def principal_angles(one: Float[Tensor, "d first"], other: Float[Tensor, "d second"]) -> Float64[np.ndarray, " angles"]:
    """Angles between two subspaces given by orthonormal bases, in radians, smallest first."""
    cosines = torch.linalg.svdvals(one.double().T @ other.double())
    return np.arccos(cosines.clamp(max=1.0).numpy())
