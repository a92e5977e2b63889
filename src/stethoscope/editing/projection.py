"""The scalpel: keep only the part of a task vector that lies in the span of chosen SAE features.

It is here to be measured against raw injection. What it keeps must be read beside the chance level r/d: that
many random directions would keep as much of a task vector that has nothing to do with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stethoscope.artifacts import sha256_bytes
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector

# Singular values below this share of the largest count as 0: bf16 directions are known to about 1e-3.
RANK_TOLERANCE = 1e-3
_WRITERS = {"o_proj", "down_proj"}
_READERS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def feature_basis(
    directions: Float[Tensor, "features d"], *, tolerance: float = RANK_TOLERANCE
) -> Float[Tensor, "d rank"]:
    """An orthonormal basis of the span of feature directions; duplicates and near-parallel ones count once.

    Args:
        directions: one row a feature; rows are scaled to unit norm first, zero rows are ignored.
        tolerance: singular values of the unit rows below ``tolerance`` times the largest are dropped.
    """
    rows = directions.double()
    norms = rows.norm(dim=1, keepdim=True)
    rows = (rows / norms.clamp_min(torch.finfo(torch.float64).tiny))[norms.squeeze(1) > 0]
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > tolerance * values[:1]).sum())
    return right[:rank].T.contiguous()


@dataclass(frozen=True, kw_only=True)
class FeatureProjection:
    """A plan's transform that keeps a task vector's part in each layer's feature subspace.

    A matrix that writes to the residual stream keeps ``Q Q^T tau``, one that reads from it ``tau Q Q^T``. Norms
    and biases have no such side and are dropped.

    Attributes:
        bases: an orthonormal basis per layer.
    """

    bases: Mapping[int, Float[Tensor, "d rank"]]

    def apply(self, name: str, delta: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The projected change of one tensor, float32, same shape; 0 where its layer has no basis."""
        parsed = parse_name(name)
        layer = parsed.layer if parsed else None
        if layer is None or layer not in self.bases or delta.ndim != 2:
            return torch.zeros_like(delta)
        Q = self.bases[layer].to(delta)
        module = name.rsplit(".", 2)[-2]
        if module in _WRITERS:
            return Q @ (Q.T @ delta)
        if module in _READERS:
            return (delta @ Q) @ Q.T
        return torch.zeros_like(delta)

    def describe(self) -> dict[str, Any]:
        """What a manifest records: each layer's rank, and a hash of its basis."""
        return {
            "kind": "feature_projection",
            "bases": {
                str(layer): {"rank": Q.shape[1], "sha256": sha256_bytes(Q.contiguous().numpy().tobytes())}
                for layer, Q in sorted(self.bases.items())
            },
        }


def energy_kept(task_vector: TaskVector, projection: FeatureProjection) -> dict[int, tuple[float, float]]:
    """Per layer of the projection: the share of the task vector's energy that it keeps, and the chance level r/d.

    Energy is the squared Frobenius norm over the layer's matrices.
    """
    kept: dict[int, tuple[float, float]] = {}
    for layer, Q in sorted(projection.bases.items()):
        before = after = 0.0
        for name in task_vector.names:
            if task_vector.base.entries[name].layer == layer:
                delta = task_vector.delta(name)
                before += float(delta.double().square().sum())
                after += float(projection.apply(name, delta).double().square().sum())
        if before > 0:
            kept[layer] = (after / before, Q.shape[1] / Q.shape[0])
    return kept
