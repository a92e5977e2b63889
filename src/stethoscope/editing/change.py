"""A tensor's change as the residual stream sees it: its energy along directions and in random spans, and its spectrum.

All of it depends on the change's Gram matrix along the stream, which is computed once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, get_lapack_funcs
from torch import Tensor

from stethoscope.checkpoints.adapter import low_rank
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.residual_axis import ResidualAxis
from stethoscope.editing.subspace import RANK_TOLERANCE

POOL = 16  # times a set's size: the directions that random sets are drawn from where each costs a full matrix' product
_BLOCK = 512  # columns multiplied at once
_FEW = 256  # dimensions of a matrix of which all eigenvectors are found
_SMALL = 768  # matrices whose spectrum costs little in float64
_DOUBTFUL = 1e-5  # of the largest: a square below this may be the rounding of float32


class Spectrum(NamedTuple):
    """How a change's energy is spread over its singular directions.

    Attributes:
        leading: the leading singular vectors along the residual axis.
        effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli, 2007).
        stable_rank: squared Frobenius over squared spectral norm.
    """

    leading: Float[Tensor, "d leading"]
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True, kw_only=True)
class LinearChange:
    """One tensor's change as a linear map, tau = left @ right in (out, in), whichever way it is stored.

    Attributes:
        left: LoRA's B times its scaling, or None.
        right: LoRA's A, or the whole change; a bias is a map from one input.
        writes: whether the residual stream is what comes out, or what goes in.
    """

    left: Float[Tensor, "d_out rank"] | None
    right: Float[Tensor, "rank d_in"]
    writes: bool

    @classmethod
    def of(cls, task_vector: TaskVector, name: str, axis: ResidualAxis, device: Any = "cpu") -> "LinearChange":
        """A tensor's change; for plain LoRA the factors, and the product is never formed."""
        if factors := low_rank(task_vector, name):
            left, right = (factors.scaling * factors.B).to(device), factors.A.to(device)
            return cls(left=left, right=right, writes=axis.writes)
        delta = task_vector.delta(name).to(device)
        stored_as_linear = axis.dim == (0 if axis.writes else 1)
        right = delta[:, None] if delta.ndim == 1 else delta if stored_as_linear else delta.T
        return cls(left=None, right=right, writes=axis.writes)

    def outputs(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """What the change adds to the matrix' outputs."""
        out = x @ self.right.T
        return out if self.left is None else out @ self.left.T

    @cached_property
    def rows(self) -> Float[Tensor, "rows d"]:
        """Rows that have the change's energy along every direction of the residual stream; of LoRA, one a rank."""
        if self.left is None:
            return self.right.T if self.writes else self.right
        ours, other = (self.left.T, self.right.T) if self.writes else (self.right, self.left)
        return torch.linalg.qr(other.double(), mode="r")[1] @ ours.double()

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return float(self.gram.diagonal().double().sum())

    @property
    def tall(self) -> bool:
        """Whether there are more rows than the stream has values, so that `gram` is the smaller matrix."""
        return self.rows.shape[0] > self.rows.shape[1]

    @cached_property
    def gram(self) -> Float[Tensor, "n n"]:
        """The Gram matrix along the shorter side: an SVD of the whole would cost ten times as much."""
        return second_moment(self.rows if self.tall else self.rows.T)

    def halves(self, directions: Float[Tensor, "some d"]) -> tuple[Tensor, Tensor]:
        """Two matrices, a row a direction; the rows' products are the directions' in the Gram matrix."""
        directions = directions.to(self.rows)
        if self.tall:
            return directions @ self.gram, directions
        images = directions @ self.rows.T
        return images, images

    def along(self, directions: Float[Tensor, "some d"]) -> Float64[Tensor, " some"]:
        """The energy along each of some unit directions of the residual stream; a basis' add up to its span's."""
        ours, theirs = self.halves(directions)
        return (ours * theirs).sum(1).double()

    def spectrum(self, leading: int) -> Spectrum | None:
        """Singular values and leading directions; None where the change is zero.

        Singular values below 1e-5 of the largest are the rounding of float32, and count as 0.
        """
        sides = self.rows if self.tall else self.rows.T
        squares, vectors = _eigen(self.gram if len(self.gram) > _SMALL else second_moment(sides.double()), leading)
        if squares[0] < _DOUBTFUL * squares[-1] and vectors.dtype != torch.float64:
            squares, vectors = _eigen(second_moment(sides.double()), leading)
        values = squares.clamp(min=0).sqrt().flip(0)
        if not values[0] > 0:
            return None
        if not self.tall:
            vectors = (self.rows.T.to(vectors) @ vectors).double() / values[:leading].clamp(min=1e-300).to(
                vectors.device
            )
        values = torch.where(values > 1e-5 * values[0], values, 0.0)
        shares = values / values.sum()
        return Spectrum(
            leading=vectors[:, : min(leading, int((values > 0).sum()))],
            effective_rank=float(torch.special.entr(shares).sum().exp()),
            stable_rank=float((values / values[0]).square().sum()),
        )


def energy_along(
    task_vector: TaskVector, name: str, axis: ResidualAxis, columns: Float[Tensor, "d columns"]
) -> tuple[float, Float64[Tensor, " columns"]]:
    """The energy of a tensor's change, and along each of some unit directions of the residual stream."""
    change = LinearChange.of(task_vector, name, axis)
    along = (change.rows @ columns.to(change.rows)).square().sum(0)
    return float(change.rows.square().sum(dtype=torch.float64)), along.double()


def second_moment(x: Float[Tensor, "rows d"]) -> Float[Tensor, "d d"]:
    """``x.T @ x``, by blocks of its upper triangle."""
    d = x.shape[1]
    product = x.new_empty(d, d)
    for start in range(0, d, _BLOCK):
        rows = slice(start, min(start + _BLOCK, d))
        product[rows, start:] = x[:, rows].T @ x[:, start:]
        product[rows.stop :, rows] = product[rows, rows.stop :].T
    return product


def _eigen(matrix: Float[Tensor, "n n"], leading: int) -> tuple[Float64[Tensor, " n"], Float[Tensor, "n leading"]]:
    """All eigenvalues of a symmetric matrix, smallest first, and the leading eigenvectors, largest first."""
    size = len(matrix)
    if matrix.device.type != "cpu" or size <= max(_FEW, leading):
        values, vectors = torch.linalg.eigh(matrix)
        return values.double().cpu(), vectors.flip(1)[:, :leading]
    # eigh would find all vectors, at four times the cost
    functions: Any = get_lapack_funcs(("sytrd", "ormqr"), (matrix.numpy(),))
    reduce, turn = functions
    reflectors, *tridiagonal, scales, _ = reduce(matrix.numpy(), lower=1, lwork=32 * size)
    diagonal, beside = (part.astype(np.float64) for part in tridiagonal)
    _, vectors = eigh_tridiagonal(diagonal, beside, select="i", select_range=(size - leading, size - 1))
    vectors = np.asfortranarray(vectors[:, ::-1], matrix.numpy().dtype)
    vectors[1:] = turn("L", "N", reflectors[1:, :-1], scales, vectors[1:], lwork=64 * leading)[0]
    return torch.from_numpy(eigvalsh_tridiagonal(diagonal, beside)), torch.from_numpy(vectors)


@dataclass(frozen=True, kw_only=True)
class DrawnSpans:
    """Spans of random sets of directions.

    Attributes:
        pool: the directions that are in any set, of unit norm.
        sets: numbers of rows of the pool.
        weights: the inverse of each set's scalar products, a pseudo-inverse where rows depend on others.
    """

    pool: Float64[Tensor, "pool d"]
    sets: Int[Tensor, "draws size"]
    weights: Float64[Tensor, "draws size size"]

    @classmethod
    def draw(
        cls,
        directions: Float[Tensor, "some d"],
        size: int,
        draws: int,
        rng: np.random.Generator,
        among: int | None = None,
    ) -> "DrawnSpans":
        """Sets of a size from all directions, or from a random pool of ``among`` times a set's.

        A pool makes sets less independent. It is for full changes: what costs is to multiply each with every direction
        that is in any set.
        """
        size = min(size, len(directions))
        few = min(among * size, len(directions)) if among else len(directions)
        drawn = rng.choice(len(directions), few, replace=False)
        sets = np.stack([rng.choice(few, size, replace=False) for _ in range(draws)])
        used, places = np.unique(sets, return_inverse=True)
        pool = directions[torch.from_numpy(drawn[used]).to(directions.device)].double()
        pool /= pool.norm(dim=1, keepdim=True).clamp(min=1e-300)
        found = torch.from_numpy(places.reshape(sets.shape)).to(pool.device)
        return cls(pool=pool, sets=found, weights=torch.stack([_inverse_products(pool[one]) for one in found]))

    def energies(self, change: LinearChange) -> Float64[np.ndarray, " draws"]:
        """The energy of a change's component in each span."""
        ours, theirs = change.halves(self.pool)
        drawn = zip(self.sets, self.weights, strict=True)
        return torch.stack([(W * (ours[one] @ theirs[one].T)).sum() for one, W in drawn]).cpu().numpy()


def _inverse_products(rows: Float64[Tensor, "size d"]) -> Float64[Tensor, "size size"]:
    """The inverse of unit rows' scalar products, or the pseudo-inverse of dependent ones."""
    products = rows @ rows.T
    triangle, failed = torch.linalg.cholesky_ex(products)
    if not failed and bool((triangle.diagonal() > RANK_TOLERANCE).all()):
        return torch.cholesky_inverse(triangle)
    return torch.linalg.pinv(products, rtol=RANK_TOLERANCE**2, hermitian=True)
