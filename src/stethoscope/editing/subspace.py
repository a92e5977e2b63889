"""Feature subspaces: their bases, and projection of a task vector onto them.

A matrix that writes to the residual stream keeps ``Q Q^T tau``, and so does its bias; one that reads from it keeps
``tau Q Q^T``. Norms and readers' biases have no residual axis: the projection drops them and its complement keeps them,
so that raw = projected + complement in every tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from stethoscope.artifacts import sha256_bytes
from stethoscope.checkpoints.names import parse_name
from stethoscope.editing.residual_axis import residual_axis

# A unit direction nearer than this to the span of those before it adds nothing: bf16 is known to about 1e-3.
RANK_TOLERANCE = 1e-3
_BLOCK = 256  # directions orthogonalised by one QR
_FEW = 64  # missing dimensions


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
    norms = directions.norm(dim=1).double()
    width, left = directions.shape[1], norms.nonzero().squeeze(1)
    parts, came = [norms.new_empty(width, 0)], left[:0]
    while len(left) and (missing := width - len(came)):
        if missing <= _FEW:  # most rows left add nothing, as a look at the missing dimensions tells
            outside = torch.linalg.qr(_without(norms.new_ones(missing, width).normal_(), parts).T)[0]
            near = (directions @ outside.to(directions)).norm(dim=1) <= RANK_TOLERANCE / 2 * norms
            left = left[~near[left]]
        several, left = left[: min(_BLOCK, missing)], left[min(_BLOCK, missing) :]
        new, added = _independent(_without(directions[several].double() / norms[several, None], parts))
        parts, came = [*parts, new], torch.cat([came, several[added]])
    return torch.cat(parts, 1), came.cpu()


def _without(rows: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Rows less their part in the spans of orthonormal parts; of all at once rounding would leave more."""
    for part in parts:
        rows = torch.addmm(rows, rows @ part, part.T, alpha=-1)
    return rows


def _independent(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A nested basis of some rows, and the row that added each column; a QR alone would replace dependent ones."""
    new, triangle = torch.linalg.qr(rows.T)
    if len(triangle) == len(rows) and bool((triangle.diagonal().abs() > RANK_TOLERANCE).all()):
        return new, torch.arange(len(rows), device=rows.device)
    if len(rows) == 1:
        return new[:, :0], torch.arange(0, device=rows.device)
    half = len(rows) // 2
    first, ours = _independent(rows[:half])
    second, theirs = _independent(_without(rows[half:], [first]))
    return torch.cat([first, second], 1), torch.cat([ours, theirs + half])


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


def principal_angles(one: Float[Tensor, "d first"], other: Float[Tensor, "d second"]) -> Float64[np.ndarray, " angles"]:
    """Angles between two subspaces given by orthonormal bases, in radians, smallest first."""
    cosines = torch.linalg.svdvals(one.double().T @ other.double())
    return np.arccos(cosines.clamp(max=1.0).cpu().numpy())
