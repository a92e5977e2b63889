"""Feature subspaces: their bases, projection of a task vector onto them, and the energy and spectrum of its changes.

A matrix that writes to the residual stream keeps ``Q Q^T tau``, and so does its bias; one that reads from it keeps
``tau Q Q^T``. Norms and readers' biases have no residual axis: the projection drops them and its complement keeps them,
so that raw = projected + complement in every tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from stethoscope.artifacts import sha256_bytes
from stethoscope.checkpoints.adapter import low_rank
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.residual_axis import ResidualAxis, residual_axis
from stethoscope.models.load import preferred_dtype

# A unit direction nearer than this to the span of those before it adds nothing: bf16 is known to about 1e-3.
RANK_TOLERANCE = 1e-3
_BLOCK = 512  # directions orthogonalised by one QR, columns multiplied at once
_LARGE = 1 << 21  # elements from which energies are taken in the hardware's preferred dtype


@dataclass(frozen=True, kw_only=True)
class LayerFeatures:
    """One SAE's directions in the residual stream.

    Attributes:
        decoder, encoder: one row a feature.
        order: features, most specific first.
        chosen: how many of the first span the subspace.
    """

    decoder: Float[Tensor, "features d"]
    encoder: Float[Tensor, "features d"]
    order: Sequence[int]
    chosen: int

    @property
    def directions(self) -> Float[Tensor, "features d"]:
        """Decoder directions, most specific first."""
        return self.decoder[list(self.order)]


def nested_basis(
    directions: Float[Tensor, "features d"],
) -> tuple[Float64[Tensor, "d rank"], Int[Tensor, " rank"]]:
    """An orthonormal basis whose first columns span the first directions, for every number of them.

    Args:
        directions: one row a feature, of any norm. A unit row nearer than `RANK_TOLERANCE` to the span of those before
            it adds no column, nor does a zero row.

    Returns:
        the basis, and the row that added each column.
    """
    rows = directions.detach().double()
    norms = rows.norm(dim=1)
    places = norms.nonzero().squeeze(1)
    rows = rows[places] / norms[places, None]
    width = rows.shape[1]
    Q, came = rows.new_empty(width, 0), places[:0]
    for start in range(0, len(rows), _BLOCK):
        if Q.shape[1] == width:
            break
        block = _without(rows[start : start + _BLOCK].T, Q)
        new, triangle = torch.linalg.qr(block)
        added = torch.arange(block.shape[1])
        if block.shape[1] > width or bool((triangle.diagonal().abs() <= RANK_TOLERANCE).any()):
            new, added = _one_by_one(block)
        Q, came = torch.cat([Q, _without(new, Q)], 1), torch.cat([came, places[start + added]])
    return Q.contiguous(), came


def _without(columns: Tensor, Q: Tensor) -> Tensor:
    """Columns less their part in the span of Q; done twice, because rounding leaves some of it."""
    for _ in range(2 if Q.shape[1] else 0):
        columns = columns - Q @ (Q.T @ columns)
    return columns


def _one_by_one(block: Tensor) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt that skips dependent columns; a QR would put arbitrary directions in their place."""
    added: list[int] = []
    Q = torch.empty_like(block)
    for i, column in enumerate(block.T):
        rest = _without(column[:, None], Q[:, : len(added)])
        size = float(rest.norm())
        if size > RANK_TOLERANCE and len(added) < len(block):
            Q[:, len(added)] = rest.squeeze(1) / size
            added.append(i)
    return Q[:, : len(added)], torch.tensor(added, dtype=torch.int64)


def feature_basis(directions: Float[Tensor, "features d"]) -> Float64[Tensor, "d rank"]:
    """An orthonormal basis of the span of feature directions, see `nested_basis`."""
    return nested_basis(directions)[0]


def random_basis(width: int, rank: int, generator: torch.Generator) -> Float64[Tensor, "d rank"]:
    """An orthonormal basis of a random subspace, every direction equally likely."""
    return torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, generator=generator))[0].contiguous()


@dataclass(frozen=True, kw_only=True)
class FeatureProjection:
    """A plan's transform that keeps the part of a task vector that lies in each layer's feature subspace.

    Attributes:
        bases: layer -> orthonormal basis; nothing is kept in a layer without one.
        complement: keep what lies outside the subspace instead.
        scale: layer -> factor of what is kept, 1 by default.
        raw: layers whose change is kept unprojected.
    """

    bases: Mapping[int, Float[Tensor, "d rank"]]
    complement: bool = False
    scale: Mapping[int, float] = field(default_factory=dict)
    raw: frozenset[int] = frozenset()

    def apply(self, name: str, delta: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The projected change of one tensor, float32, same shape.

        Raises:
            CheckpointError: a matrix of a layer with a basis has no known role, or does not fit the basis.
        """
        found = parse_name(name).layer
        layer = -1 if found is None else found
        if layer in self.raw:
            return delta
        Q, kept = self.bases.get(layer), None
        if Q is not None and (axis := residual_axis(name, delta.shape, len(Q))):
            Q = Q.to(delta)
            kept = (delta @ Q) @ Q.T if axis.dim == delta.ndim - 1 else Q @ (Q.T @ delta)
        if self.complement:
            kept = delta if kept is None else delta - kept
        elif kept is None:
            return torch.zeros_like(delta)
        factor = self.scale.get(layer, 1.0)
        return kept if factor == 1 else kept * factor

    def low_rank(self, name: str) -> None:
        """A projection of outputs is no change of A."""

    def describe(self) -> dict[str, Any]:
        """What a manifest records: the settings, and each basis' rank and hash."""
        return {
            "kind": "feature_projection",
            "keeps": "complement" if self.complement else "span",
            "bases": {str(layer): {"rank": Q.shape[1], "sha256": _hash(Q)} for layer, Q in sorted(self.bases.items())},
            "scale": {str(layer): factor for layer, factor in sorted(self.scale.items())},
            "raw": sorted(self.raw),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every basis, by its hash in `describe`."""
        return {_hash(Q): Q.contiguous() for Q in self.bases.values()}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "FeatureProjection":
        """The projection whose `describe` and `tensors` these are.

        Raises:
            KeyError: a basis is missing.
        """
        return cls(
            bases={int(layer): tensors[Q["sha256"]] for layer, Q in described["bases"].items()},
            complement=described["keeps"] == "complement",
            scale={int(layer): factor for layer, factor in described["scale"].items()},
            raw=frozenset(described["raw"]),
        )


def _hash(Q: Tensor) -> str:
    return sha256_bytes(Q.contiguous().numpy().tobytes())


def energy_along(
    task_vector: TaskVector, name: str, axis: ResidualAxis, columns: Float[Tensor, "d columns"]
) -> tuple[float, Float64[Tensor, " columns"]]:
    """The energy of a tensor's change, and of its component along each of some unit directions of the residual stream.

    A subspace keeps the sum over its orthonormal basis, so one pass over the weights serves any number of subspaces.
    For LoRA the product is never formed.
    """
    if factors := low_rank(task_vector, name):
        ours, other = (factors.B.T, factors.A) if axis.writes else (factors.A, factors.B.T)  # (rank, d), (rank, other)
        along = ours.double() @ columns.double()
        energies = ((other.double() @ other.double().T) @ along * along).sum(0)
        return task_vector.energy(name), factors.scaling**2 * energies.clamp(min=0)
    energy = 0.0
    entry = task_vector.base.entries[name]
    size = entry.rows * entry.columns
    # rounding to bf16 is random: in a sum of millions of squares it leaves an error of 1e-5
    change = torch.empty(entry.rows, entry.columns, dtype=preferred_dtype() if size >= _LARGE else torch.float32)
    for start, stop, delta in task_vector.delta_chunks(name):
        energy += float(torch.linalg.vector_norm(delta)) ** 2
        change[start:stop] = delta
    along_rows = axis.dim == len(entry.shape) - 1
    sums = []
    for part in columns.to(change.dtype).split(_BLOCK, dim=1):
        product = change @ part if along_rows else (part.T @ change).T
        sums.append(product.float().square_().sum(0).double())
    return energy, torch.cat(sums)


class Spectrum(NamedTuple):
    """How a change's energy is spread over its singular directions.

    Attributes:
        leading: the leading singular vectors along the residual axis.
        effective_rank: exp of the entropy of the singular values' shares (Roy and Vetterli, 2007).
        stable_rank: squared Frobenius over squared spectral norm.
    """

    leading: Float64[Tensor, "d leading"]
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True, kw_only=True)
class LinearChange:
    """One matrix' change as a linear map, tau = left @ right in (out, in), whichever way it is stored.

    Attributes:
        left: LoRA's B times its scaling, or None.
        right: LoRA's A, or the whole change.
    """

    left: Float[Tensor, "d_out rank"] | None
    right: Float[Tensor, "rank d_in"]

    @classmethod
    def of(cls, task_vector: TaskVector, name: str, axis: ResidualAxis) -> "LinearChange":
        """A tensor's change; for plain LoRA the factors, and the product is never formed."""
        if factors := low_rank(task_vector, name):
            return cls(left=factors.scaling * factors.B, right=factors.A)
        delta = task_vector.delta(name)
        stored_as_linear = axis.dim == (0 if axis.writes else 1)
        return cls(left=None, right=delta if stored_as_linear else delta.T)

    def outputs(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """What the change adds to the matrix' outputs."""
        out = x @ self.right.T
        return out if self.left is None else out @ self.left.T

    def spectrum(self, axis: ResidualAxis, leading: int) -> Spectrum | None:
        """Singular values and leading directions; None where the change is zero.

        Singular values below 1e-5 of the largest are the rounding of float32, and count as 0.
        """
        if self.left is not None:
            outer, core_left = torch.linalg.qr(self.left.double())
            inner, core_right = torch.linalg.qr(self.right.double().T)
            u, values, v = torch.linalg.svd(core_left @ core_right.T)
            vectors = outer @ u if axis.writes else inner @ v.T
        else:
            matrix = (self.right if axis.writes else self.right.T).double()  # the residual axis first
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
