"""The scalpel: keep only the part of a task vector that lies in the span of chosen SAE features.

It is here to be measured against raw injection. What it keeps must be read beside the chance level r/d: that
many random directions would keep as much of a task vector that has nothing to do with them.

The rule: a matrix that writes to the residual stream keeps ``Q Q^T tau``, and so does its bias; one that reads from it
keeps ``tau Q Q^T``. Norms and readers' biases have no side in the residual stream: they are dropped, and kept by the
complement, so that raw = projected + complement in every tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from stethoscope.artifacts import sha256_bytes
from stethoscope.checkpoints.adapter import AdapterTaskVector, LoraFactors
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.sides import Side, residual_side, residual_sides
from stethoscope.models import preferred_dtype

# A unit direction nearer than this to the span of those before it adds nothing: bf16 is known to about 1e-3.
RANK_TOLERANCE = 1e-3
_BLOCK = 512  # directions orthogonalised by one QR, columns multiplied at once
_LARGE = 1 << 21  # elements from which energies are taken in the hardware's preferred dtype


def nested_basis(
    directions: Float[Tensor, "features d"], *, tolerance: float = RANK_TOLERANCE
) -> tuple[Float64[Tensor, "d rank"], Int[Tensor, " rank"]]:
    """An orthonormal basis whose first columns span the first directions, for every number of them.

    Args:
        directions: one row a feature, most wanted first; rows are scaled to unit norm, zero rows are ignored.
        tolerance: a unit row whose distance to the span of those before it is no larger adds no column.

    Returns:
        the basis, and which row each column came with.
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
        if block.shape[1] > width or bool((triangle.diagonal().abs() <= tolerance).any()):
            new, added = _one_by_one(block, tolerance)
        Q, came = torch.cat([Q, _without(new, Q)], 1), torch.cat([came, places[start + added]])
    return Q.contiguous(), came


def _without(columns: Tensor, Q: Tensor) -> Tensor:
    """Columns less their part in a basis; twice, or rounding leaves some of it."""
    for _ in range(2 if Q.shape[1] else 0):
        columns = columns - Q @ (Q.T @ columns)
    return columns


def _one_by_one(block: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt that skips columns, as a QR cannot: it would put a direction of its own in their place."""
    added: list[int] = []
    Q = torch.empty_like(block)
    for i, column in enumerate(block.T):
        rest = _without(column[:, None], Q[:, : len(added)])
        size = float(rest.norm())
        if size > tolerance and len(added) < len(block):
            Q[:, len(added)] = rest.squeeze(1) / size
            added.append(i)
    return Q[:, : len(added)], torch.tensor(added, dtype=torch.int64)


def feature_basis(
    directions: Float[Tensor, "features d"], *, tolerance: float = RANK_TOLERANCE
) -> Float64[Tensor, "d rank"]:
    """An orthonormal basis of the span of feature directions, see `nested_basis`."""
    return nested_basis(directions, tolerance=tolerance)[0]


def random_basis(width: int, rank: int, generator: torch.Generator) -> Float64[Tensor, "d rank"]:
    """An orthonormal basis of a random subspace, every direction equally likely."""
    return torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, generator=generator))[0].contiguous()


# Norms that multiply by 1 + weight.
_ONE_PLUS = {"gemma", "gemma2", "gemma3", "gemma3_text", "paligemma", "recurrent_gemma", "qwen3_next"}


def bases_through_norms(
    base: Checkpoint, layer: int, directions: Float[Tensor, "features d"]
) -> dict[str, Float64[Tensor, "d rank"]]:
    """Bases of feature directions as each part of a block meets them, through the norm that stands between.

    Behind a norm with scale s a direction f of the residual stream is s * f, which is what a reader meets. What a
    writer adds along f / s comes out of a norm behind it (Gemma 2 and 3, OLMo 2) along f.

    Returns:
        for `FeatureProjection.placed`: a basis for each of attention and MLP, reading and writing.
    """
    prefix = f"layers.{layer}."
    names = {name.removeprefix(prefix)[: -len(".weight")] for name in base if name.startswith(prefix)}
    after = "post_feedforward_layernorm" in names
    norms = {
        "attention.reads": ("input_layernorm", "ln_1"),
        "mlp.reads": ("pre_feedforward_layernorm", *(() if after else ("post_attention_layernorm", "ln_2")),
                      *(() if after else ("input_layernorm",))),
        "attention.writes": ("post_attention_layernorm",) if after else (),
        "mlp.writes": ("post_feedforward_layernorm",) if after else (),
    }  # fmt: skip
    one_plus = base.config.get("model_type") in _ONE_PLUS
    placed = {}
    for place, candidates in norms.items():
        rows = directions.detach().double()
        if norm := next((name for name in candidates if name in names), None):
            scale = base[f"{prefix}{norm}.weight"].double() + one_plus
            if f"{prefix}{norm}.bias" in base:  # a LayerNorm takes the mean off first
                rows = rows - rows.mean(1, keepdim=True)
            rows = rows * scale if place.endswith("reads") else rows * torch.where(scale == 0, 0.0, 1 / scale)
        placed[place] = feature_basis(rows)
    return placed


@dataclass(frozen=True, kw_only=True)
class FeatureProjection:
    """A plan's transform that keeps a task vector's part in each layer's feature subspace, or what is off it.

    Attributes:
        bases: an orthonormal basis per layer; a layer without one has the subspace {0}.
        placed: layer -> bases for parts of its block ("attention.reads", "mlp.writes", ...) that take the place of
            the layer's own; see `bases_through_norms`.
        complement: keep what is off the subspace instead.
        scale: layer -> factor of what is kept; 1 where there is none.
        raw: layers whose change goes in as it is.
    """

    bases: Mapping[int, Float[Tensor, "d rank"]]
    placed: Mapping[int, Mapping[str, Float[Tensor, "d rank"]]] = field(default_factory=dict)
    complement: bool = False
    scale: Mapping[int, float] = field(default_factory=dict)
    raw: frozenset[int] = frozenset()

    def apply(self, name: str, delta: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The projected change of one tensor, float32, same shape.

        Raises:
            CheckpointError: a matrix of a layer with a basis has no known role, or does not fit the basis.
        """
        layer = parse_name(name).layer
        if layer in self.raw:
            return delta
        kept = self._project(name, layer, delta) if layer is not None and layer in self.bases else None
        if self.complement:
            kept = delta if kept is None else delta - kept
        elif kept is None:
            return torch.zeros_like(delta)
        factor = 1.0 if layer is None else self.scale.get(layer, 1.0)
        return kept if factor == 1 else kept * factor

    def _project(self, name: str, layer: int, delta: Tensor) -> Tensor | None:
        side = residual_side(name, delta.shape, len(self.bases[layer]))
        if side is None:
            return None
        Q = self.basis(layer, side).to(delta)
        return (delta @ Q) @ Q.T if side.axis == delta.ndim - 1 else Q @ (Q.T @ delta)

    def basis(self, layer: int, side: Side) -> Float[Tensor, "d rank"]:
        """The basis that a layer's tensor is projected on."""
        return self.placed.get(layer, {}).get(side.place, self.bases[layer])

    def describe(self) -> dict[str, Any]:
        """What a manifest records: what is done, each layer's rank, and a hash of its basis."""
        return {
            "kind": "feature_projection",
            "keeps": "complement" if self.complement else "span",
            "bases": {str(layer): _described(Q) for layer, Q in sorted(self.bases.items())},
            "placed": {
                str(layer): {place: _described(Q) for place, Q in sorted(placed.items())}
                for layer, placed in sorted(self.placed.items())
            },
            "scale": {str(layer): factor for layer, factor in sorted(self.scale.items())},
            "raw": sorted(self.raw),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every basis, by the hash that `describe` calls it by."""
        bases = [*self.bases.values(), *(Q for placed in self.placed.values() for Q in placed.values())]
        return {_described(Q)["sha256"]: Q.contiguous() for Q in bases}

    @classmethod
    def from_description(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "FeatureProjection":
        """The projection that `describe` described, of the bases that `tensors` gave.

        Raises:
            KeyError: a basis is missing.
        """
        return cls(
            bases={int(layer): tensors[Q["sha256"]] for layer, Q in described["bases"].items()},
            placed={
                int(layer): {place: tensors[Q["sha256"]] for place, Q in placed.items()}
                for layer, placed in described["placed"].items()
            },
            complement=described["keeps"] == "complement",
            scale={int(layer): factor for layer, factor in described["scale"].items()},
            raw=frozenset(described["raw"]),
        )


def _described(Q: Tensor) -> dict[str, Any]:
    return {"rank": Q.shape[1], "sha256": sha256_bytes(Q.contiguous().numpy().tobytes())}


def energy_along(
    task_vector: TaskVector, name: str, side: Side, columns: Float[Tensor, "d columns"]
) -> tuple[float, Float64[Tensor, " columns"]]:
    """The energy of a tensor's change, and of its component along each of some unit directions of the residual stream.

    What a subspace keeps is the sum over an orthonormal basis of it, so that one pass over the weights serves any
    number of subspaces and all that are nested in them. For LoRA the product is never formed.
    """
    factors = task_vector.factors(name) if isinstance(task_vector, AdapterTaskVector) else None
    if factors is not None and factors.magnitude is None:
        ours, other = _towards_residual(factors, side)
        along = ours.double() @ columns.double()
        energies = ((other.double() @ other.double().T) @ along * along).sum(0)
        return task_vector.energy(name), factors.scaling**2 * energies.clamp(min=0)
    energy, change = 0.0, None
    entry = task_vector.base.entries[name]
    size = entry.rows * entry.columns
    # rounding to bf16 is random: in a sum of millions of squares it leaves an error of 1e-5
    change = torch.empty(entry.rows, entry.columns, dtype=preferred_dtype() if size >= _LARGE else torch.float32)
    for start, stop, delta in task_vector.delta_chunks(name):
        energy += float(torch.linalg.vector_norm(delta)) ** 2
        change[start:stop] = delta
    along_rows = side.axis == len(entry.shape) - 1
    sums = []
    for part in columns.to(change.dtype).split(_BLOCK, dim=1):
        product = change @ part if along_rows else (part.T @ change).T
        sums.append(product.float().square_().sum(0).double())
    return energy, torch.cat(sums)


def _towards_residual(factors: LoraFactors, side: Side) -> tuple[Tensor, Tensor]:
    """(rank, d) on the residual stream's side, and (rank, other) on the other; DoRA has no such factors."""
    return (factors.B.T, factors.A) if side.writes else (factors.A, factors.B.T)


def energy_kept(task_vector: TaskVector, projection: FeatureProjection) -> dict[int, tuple[float, float]]:
    """Per layer of the projection: the share of the task vector's energy that it keeps, and the chance level r/d.

    Energy is the squared Frobenius norm over the layer's tensors that have a side in the residual stream.

    Raises:
        CheckpointError: with every matrix whose role is not known or does not fit.
    """
    kept: dict[int, tuple[float, float]] = {}
    for layer, Q in sorted(projection.bases.items()):
        before = after = 0.0
        for name, side in residual_sides(task_vector, [layer], len(Q)).items():
            if side:
                energy, along = energy_along(task_vector, name, side, projection.basis(layer, side))
                before, after = before + energy, after + float(along.sum())
        if before > 0:
            kept[layer] = (after / before, Q.shape[1] / Q.shape[0])
    return kept
