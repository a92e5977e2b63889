"""How a task vector lies to SAE features: what their span keeps of it beside what chance keeps, and what that does.

    made = measure_geometry(task_vector, features, provenance=provenance, model=model, texts=texts)
    print(made.verdict)

One pass over the weights per layer: every subspace is a group of unit directions, and energy along them adds up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.corpus import TokenBatch
from stethoscope.editing.energy import TensorEnergy, energy_curve, sum_energies
from stethoscope.editing.inputs import matrix_inputs
from stethoscope.editing.projection import (
    FeatureProjection,
    bases_through_norms,
    energy_along,
    nested_basis,
    random_basis,
)
from stethoscope.editing.sides import Side, residual_sides
from stethoscope.editing.spectrum import LinearChange, Spectrum, principal_angles
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.results.geometry import Geometry, LayerGeometry, TensorGeometry, Written

_FUNCTIONAL_DRAWS = 4
Texts = Mapping[str, Sequence[TokenBatch]]


@dataclass(frozen=True, kw_only=True)
class LayerFeatures:
    """One SAE's directions in the residual stream.

    Attributes:
        decoder, encoder: one row a feature.
        order: features, most specific first.
        chosen: how many from the top span the subspace.
    """

    decoder: Float[Tensor, "features d"]
    encoder: Float[Tensor, "features d"]
    order: Sequence[int]
    chosen: int

    @property
    def directions(self) -> Float[Tensor, "features d"]:
        """Decoder directions, most specific first."""
        return self.decoder[list(self.order)]


def measure_geometry(
    task_vector: TaskVector,
    features: Mapping[int, Callable[[], LayerFeatures]],
    *,
    provenance: Provenance | None = None,
    model: PreTrainedModel | None = None,
    texts: Texts | None = None,
    draws: int = 100,
    leading: int = 16,
    tokens: int = 512,
    through_norms: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Geometry:
    """Measure every layer that has features.

    Args:
        features: layer -> what loads its SAE's directions; one layer's are held at a time.
        provenance: what the result is saved with; its seed drives the draws, and is 0 if None.
        model: the base, for functional energy; none is measured without it.
        texts: corpus -> batches.
        draws: random feature sets, and as many random bases.
        leading: singular directions of each matrix that principal angles are taken to.
        tokens: of each corpus, evenly spread, attention sinks left out.
        through_norms: take directions as each matrix meets them, see `bases_through_norms`; curves and ``written`` take
            them as they are.

    Raises:
        CheckpointError: with every matrix whose role is not known or does not fit.
        StethoscopeError: the task vector changes nothing in these layers.
    """
    provenance = provenance or Provenance()
    width = task_vector.base.hidden_size
    sides = residual_sides(task_vector, features, width)
    projected = [name for name, side in sides.items() if side and len(task_vector.base.entries[name].shape) == 2]
    inputs = {
        corpus: matrix_inputs(model, projected, batches, tokens)
        for corpus, batches in (texts or {}).items()
        if model is not None
    }
    rng = np.random.default_rng(provenance.seed)
    layers: list[LayerGeometry] = []
    energies: list[TensorEnergy] = []
    for number, (layer, load) in enumerate(sorted(features.items())):
        mine = {name: sides[name] for name in sides if task_vector.base.entries[name].layer == layer}
        heard = {corpus: found.layers.get(layer, {}) for corpus, found in inputs.items()}
        measured = _Layer(task_vector, layer, load(), draws, leading, through_norms, rng).measure(mine, heard)
        if measured:
            layers.append(measured[0])
            energies += measured[1]
        if progress:
            progress(number + 1, len(features))
    if not energies:
        raise StethoscopeError("the task vector changes no matrix of the layers that have SAEs")
    total = sum_energies(energies, rng)
    kinds = {kind: [one for one in energies if one.kind == kind] for kind in sorted({one.kind for one in energies})}
    return Geometry(
        provenance=provenance,
        draws=draws,
        leading=leading,
        through_norms=through_norms,
        tokens={corpus: found.tokens for corpus, found in inputs.items()},
        layers=tuple(layers),
        kinds={kind: sum_energies(several, rng) for kind, several in kinds.items()},
        total=total,
        verdict=total.verdict,
    )


class _Layer:
    def __init__(
        self,
        task_vector: TaskVector,
        layer: int,
        found: LayerFeatures,
        draws: int,
        leading: int,
        through_norms: bool,
        rng: np.random.Generator,
    ) -> None:
        self.task_vector, self.layer, self.found = task_vector, layer, found
        self.leading, self.rng = leading, rng
        width = task_vector.base.hidden_size
        if {found.decoder.shape[1], found.encoder.shape[1]} != {width}:
            raise SAEError(
                f"the features of layer {layer} are no directions of the residual stream: they have"
                f" {found.decoder.shape[1]} values to write and {found.encoder.shape[1]} to read, it has {width}",
                hint="geometry needs SAEs of the residual stream, or of what attention or MLP add to it",
            )
        self.ordered = found.directions
        self.whole, self.came = nested_basis(self.ordered)

        def subspace(rows: Tensor) -> FeatureProjection:
            placed = {layer: bases_through_norms(task_vector.base, layer, rows)} if through_norms else {}
            return FeatureProjection(bases={layer: nested_basis(rows)[0]}, placed=placed)

        self.projection = subspace(self.ordered[: found.chosen])
        Q = self.projection.bases[layer]
        self.encoder, _ = nested_basis(found.encoder[list(found.order)[: found.chosen]])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        self.bases = [random_basis(len(Q), Q.shape[1], generator) for _ in range(draws)]
        every = len(found.decoder)
        sets = [rng.choice(every, min(found.chosen, every), replace=False) for _ in range(draws)]
        self.sets = [subspace(found.decoder[torch.from_numpy(one)]) for one in sets]
        self.along = torch.zeros(self.whole.shape[1], dtype=torch.float64)

    def measure(
        self, sides: Mapping[str, Side | None], heard: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[LayerGeometry, list[TensorEnergy]] | None:
        """The layer and its tensors' energies; None where nothing changes."""
        tensors: list[TensorGeometry] = []
        energies: list[TensorEnergy] = []
        outside = read = writers = 0.0
        squares: dict[str, np.ndarray] = {corpus: np.zeros(3) for corpus in heard}
        for name, side in sides.items():
            if side is None:
                outside += self.task_vector.energy(name)
                continue
            energy, written = self._energy(name, side)
            if energy.energy == 0:
                continue
            energies.append(energy)
            if side.writes:
                writers, read = writers + energy.energy, read + written
            change = None
            if len(self.task_vector.base.entries[name].shape) == 2:
                change = LinearChange.of(self.task_vector, name, side)
            functional = {}
            for corpus, found in heard.items():
                if change is not None and name in found:
                    functional[corpus] = self._functional(change, side, found[name])
                    squares[corpus] += functional[corpus]
            tensors.append(self._tensor(name, side, energy, change, functional))
        if not energies:
            return None
        total = sum(one.energy for one in energies)
        Q = self.projection.bases[self.layer]
        made = LayerGeometry(
            layer=self.layer,
            features=self.found.chosen,
            rank=Q.shape[1],
            kept=sum_energies(energies, self.rng),
            unprojected=outside / (outside + total),
            **_shares(squares),
            curve=energy_curve(self.along / total, self.came, len(self.ordered), len(Q)),
            written=Written(share=read / writers, chance=self.encoder.shape[1] / len(Q)) if writers else None,
            tensors=tuple(tensors),
        )
        return made, energies

    def _energy(self, name: str, side: Side) -> tuple[TensorEnergy, float]:
        """A tensor's energies, and what of it lies along the encoder directions."""
        Q = self.projection.basis(self.layer, side)
        drawn = [one.basis(self.layer, side) for one in self.sets]
        groups = [self.whole, Q, self.encoder, *drawn, *self.bases]
        energy, along = energy_along(self.task_vector, name, side, torch.cat(groups, 1))
        parts = along.split([group.shape[1] for group in groups])
        self.along += parts[0]
        sums = np.array([float(part.sum()) for part in parts[1:]])
        count = len(self.sets)
        found = TensorEnergy(layer=self.layer, kind=side.place.split(".")[0], energy=energy, kept=sums[0],
                        chance=Q.shape[1] / len(Q), features=sums[2 : 2 + count], bases=sums[2 + count :])  # fmt: skip
        return found, float(sums[1])

    def _functional(self, change: LinearChange, side: Side, x: Tensor) -> np.ndarray:
        """Sums over tokens of |tau x|^2, of |tau' x|^2, and of the latter for random bases on average."""
        raw = change.outputs(x)

        def kept(Q: Tensor) -> float:
            Q = Q.float()
            values = raw @ Q if side.writes else change.outputs((x @ Q) @ Q.T)
            return float(values.double().square().sum())

        drawn = [kept(Q) for Q in self.bases[:_FUNCTIONAL_DRAWS]]
        return np.array([float(raw.double().square().sum()), kept(self.projection.basis(self.layer, side)),
                         float(np.mean(drawn))])  # fmt: skip

    def _tensor(
        self,
        name: str,
        side: Side,
        energy: TensorEnergy,
        change: LinearChange | None,
        functional: Mapping[str, np.ndarray],
    ) -> TensorGeometry:
        spectrum: Spectrum | None = change.spectrum(side, self.leading) if change else None
        Q = self.projection.basis(self.layer, side)
        angles = principal_angles(Q, spectrum.leading) if spectrum else np.zeros(0)
        return TensorGeometry(
            name=name,
            kind=energy.kind,
            writes=side.writes,
            kept=sum_energies([energy], self.rng),
            **_shares(functional),
            angles=tuple(np.degrees(angles).tolist()),
            overlap=float((np.cos(angles) ** 2).sum() / spectrum.leading.shape[1]) if spectrum else None,
            effective_rank=spectrum.effective_rank if spectrum else None,
            stable_rank=spectrum.stable_rank if spectrum else None,
        )


def _shares(squares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    there = {corpus: sums for corpus, sums in squares.items() if sums[0] > 0}
    return {
        "functional": {corpus: float(sums[1] / sums[0]) for corpus, sums in there.items()},
        "functional_chance": {corpus: float(sums[2] / sums[0]) for corpus, sums in there.items()},
    }
