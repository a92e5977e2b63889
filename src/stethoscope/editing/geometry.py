"""How much of a task vector lies in the subspace of SAE features, compared with chance.

    made = measure_geometry(task_vector, features, provenance=provenance, model=model, texts=texts)
    print(made.verdict)

Each weight is read once: energies along the basis vectors of all subspaces are taken together, and add up per subspace.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.energy import TensorEnergy, energy_curve, sum_energies
from stethoscope.editing.residual_axis import READERS, ResidualAxis, residual_axes
from stethoscope.editing.subspace import (
    FeatureProjection,
    LayerFeatures,
    LinearChange,
    bases_through_norms,
    energy_along,
    nested_basis,
    principal_angles,
    random_basis,
)
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.models.sites import HookPoint, hook_point, read_activations
from stethoscope.results.geometry import Geometry, LayerGeometry, TensorGeometry, Written
from stethoscope.text.tokens import TokenBatch

_FUNCTIONAL_DRAWS = 4  # random bases that functional energy is compared with
_SINK = 10.0  # times the median residual norm: an attention sink, which statistics leave out too
Texts = Mapping[str, Sequence[TokenBatch]]


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
        features: layer -> loads its SAE's directions; one layer's are held at a time.
        provenance: what the result is saved with; its seed drives the draws, and is 0 if None.
        model: the base, for functional energy; none is measured without it.
        texts: corpus -> batches.
        draws: random feature sets, and as many random bases.
        leading: singular directions of each matrix that principal angles are taken to.
        tokens: of each corpus, evenly spread, attention sinks left out.
        through_norms: use `bases_through_norms`, except for curves and ``written``.

    Raises:
        CheckpointError: with every matrix whose role is not known or does not fit.
        StethoscopeError: the task vector changes nothing in these layers.
    """
    provenance = provenance or Provenance()
    entries = task_vector.base.entries
    axes = residual_axes(task_vector, features, task_vector.base.hidden_size)
    matrices = [name for name, axis in axes.items() if axis and len(entries[name].shape) == 2]
    inputs: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, int] = {}
    for corpus, batches in (texts or {}).items():
        if model is not None:
            counts[corpus], inputs[corpus] = _matrix_inputs(model, matrices, batches, tokens)
    rng = np.random.default_rng(provenance.seed)
    layers: list[LayerGeometry] = []
    energies: list[TensorEnergy] = []
    for number, (layer, load) in enumerate(sorted(features.items())):
        own = {name: axis for name, axis in axes.items() if entries[name].layer == layer}
        subspaces = _Subspaces(task_vector, layer, load(), rng, draws=draws, through_norms=through_norms)
        if measured := subspaces.measure(own, inputs, leading):
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
        tokens=counts,
        layers=tuple(layers),
        kinds={kind: sum_energies(several, rng) for kind, several in kinds.items()},
        total=total,
        verdict=total.verdict,
    )


@torch.no_grad()
def _matrix_inputs(
    model: PreTrainedModel, names: Sequence[str], batches: Sequence[TokenBatch], tokens: int
) -> tuple[int, dict[str, Tensor]]:
    """How many tokens were taken, evenly spread, and what every matrix reads there: name -> one row a token.

    Left out are matrices that are no module of their own or see only some tokens, and the tokens of attention sinks.
    Readers of one part of a block share their input, which is kept once.
    """
    modules = {parse_name(f"{name}.weight").canonical: module for name, module in model.named_modules()}
    places: dict[str, tuple[int, str]] = {}
    points: dict[tuple[int, str], HookPoint] = {}
    for name in names:
        layer = parse_name(name).layer
        if name in modules and layer is not None and ".experts." not in name:
            module = name.removesuffix(".weight")
            part, _, last = module.rpartition(".")
            places[name] = (layer, part if last in READERS else module)
            points.setdefault(places[name], HookPoint(module=modules[name], reads_input=True))
            points.setdefault((layer, ""), hook_point(model, layer, "resid_pre"))
    countable = sum(int(batch.countable.sum()) for batch in batches)
    picked = np.unique(np.linspace(0, countable - 1, min(tokens, countable)).round().astype(int))
    kept: dict[tuple[int, str], list[Tensor]] = {key: [] for key in points}
    before = 0
    for batch in batches:
        count = int(batch.countable.sum())
        here = torch.from_numpy(picked[(picked >= before) & (picked < before + count)] - before)
        before += count
        if len(here) and points:
            for key, values in read_activations(model, points, batch.input_ids).items():
                kept[key].append(values[batch.countable.to(values.device)][here.to(values.device)].float().cpu())
    rows = {key: torch.cat(several) for key, several in kept.items() if several}
    norms = {layer: values.norm(dim=1) for (layer, place), values in rows.items() if not place}
    ordinary = {layer: values <= _SINK * values.median() for layer, values in norms.items()}
    rows = {(layer, place): values[ordinary[layer]] for (layer, place), values in rows.items()}
    return len(picked), {name: rows[key] for name, key in places.items() if key in rows}


class _Subspaces:
    """One layer's subspaces: of its features, of all features in order, of encoders, and at random."""

    def __init__(
        self,
        task_vector: TaskVector,
        layer: int,
        found: LayerFeatures,
        rng: np.random.Generator,
        *,
        draws: int,
        through_norms: bool,
    ) -> None:
        self.task_vector, self.layer, self.found, self.rng = task_vector, layer, found, rng
        width = task_vector.base.hidden_size
        if {found.decoder.shape[1], found.encoder.shape[1]} != {width}:
            raise SAEError(
                f"the features of layer {layer} are no directions of the residual stream: they have"
                f" {found.decoder.shape[1]} values to write and {found.encoder.shape[1]} to read, it has {width}",
                hint="geometry needs SAEs of the residual stream, or of what attention or MLP add to it",
            )

        def subspace(rows: Tensor) -> FeatureProjection:
            placed = {layer: bases_through_norms(task_vector.base, layer, rows)} if through_norms else {}
            return FeatureProjection(bases={layer: nested_basis(rows)[0]}, placed=placed)

        ordered, every = found.directions, len(found.decoder)
        self.whole, self.came = nested_basis(ordered)
        self.projection = subspace(ordered[: found.chosen])
        self.rank = self.projection.bases[layer].shape[1]
        self.encoder, _ = nested_basis(found.encoder[list(found.order)[: found.chosen]])
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        self.bases = [random_basis(width, self.rank, generator) for _ in range(draws)]
        sets = [rng.choice(every, min(found.chosen, every), replace=False) for _ in range(draws)]
        self.sets = [subspace(found.decoder[torch.from_numpy(one)]) for one in sets]
        self.along = torch.zeros(self.whole.shape[1], dtype=torch.float64)

    def measure(
        self, axes: Mapping[str, ResidualAxis | None], inputs: Mapping[str, Mapping[str, Tensor]], leading: int
    ) -> tuple[LayerGeometry, list[TensorEnergy]] | None:
        """The layer and its tensors' energies; None where nothing changes."""
        tensors: list[TensorGeometry] = []
        energies: list[TensorEnergy] = []
        outside = read = writers = 0.0
        squares: dict[str, np.ndarray] = {corpus: np.zeros(3) for corpus in inputs}
        for name, axis in axes.items():
            if axis is None:
                outside += self.task_vector.energy(name)
                continue
            energy, written = self._energy(name, axis)
            if energy.energy == 0:
                continue
            energies.append(energy)
            if axis.writes:
                writers, read = writers + energy.energy, read + written
            matrix = len(self.task_vector.base.entries[name].shape) == 2
            change = LinearChange.of(self.task_vector, name, axis) if matrix else None
            functional = {
                corpus: self._functional(change, axis, found[name])
                for corpus, found in inputs.items()
                if change is not None and name in found
            }
            for corpus, sums in functional.items():
                squares[corpus] += sums
            spectrum = change.spectrum(axis, leading) if change else None
            Q = self.projection.basis(self.layer, axis)
            angles = principal_angles(Q, spectrum.leading) if spectrum else np.zeros(0)
            tensors.append(
                TensorGeometry(
                    name=name,
                    kind=energy.kind,
                    writes=axis.writes,
                    kept=sum_energies([energy], self.rng),
                    **_shares(functional),
                    angles=tuple(np.degrees(angles).tolist()),
                    overlap=float((np.cos(angles) ** 2).sum() / spectrum.leading.shape[1]) if spectrum else None,
                    effective_rank=spectrum.effective_rank if spectrum else None,
                    stable_rank=spectrum.stable_rank if spectrum else None,
                )
            )
        if not energies:
            return None
        total = sum(one.energy for one in energies)
        width = len(self.whole)
        return LayerGeometry(
            layer=self.layer,
            features=self.found.chosen,
            rank=self.rank,
            kept=sum_energies(energies, self.rng),
            unprojected=outside / (outside + total),
            **_shares(squares),
            curve=energy_curve(self.along / total, self.came, len(self.found.order), width),
            written=Written(share=read / writers, chance=self.encoder.shape[1] / width) if writers else None,
            tensors=tuple(tensors),
        ), energies

    def _energy(self, name: str, axis: ResidualAxis) -> tuple[TensorEnergy, float]:
        """A tensor's energies, and how much of it lies in the span of the encoder directions."""
        Q = self.projection.basis(self.layer, axis)
        drawn = [one.basis(self.layer, axis) for one in self.sets]
        groups = [self.whole, Q, self.encoder, *drawn, *self.bases]
        energy, along = energy_along(self.task_vector, name, axis, torch.cat(groups, 1))
        parts = along.split([group.shape[1] for group in groups])
        self.along += parts[0]
        kept, read, *random = (float(part.sum()) for part in parts[1:])
        features, bases = np.array(random[: len(drawn)]), np.array(random[len(drawn) :])
        kind, chance = axis.place.split(".")[0], Q.shape[1] / len(Q)
        return TensorEnergy(
            layer=self.layer, kind=kind, energy=energy, kept=kept, chance=chance, features=features, bases=bases
        ), read

    def _functional(self, change: LinearChange, axis: ResidualAxis, x: Tensor) -> np.ndarray:
        """Sums over tokens of |tau x|^2, of |tau' x|^2, and of the latter for random bases on average."""
        raw = change.outputs(x)

        def kept(Q: Tensor) -> float:
            Q = Q.float()
            values = raw @ Q if axis.writes else change.outputs((x @ Q) @ Q.T)
            return float(values.double().square().sum())

        drawn = [kept(Q) for Q in self.bases[:_FUNCTIONAL_DRAWS]]
        basis = self.projection.basis(self.layer, axis)
        return np.array([float(raw.double().square().sum()), kept(basis), float(np.mean(drawn))])


def _shares(squares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    there = {corpus: sums for corpus, sums in squares.items() if sums[0] > 0}
    return {
        "functional": {corpus: float(sums[1] / sums[0]) for corpus, sums in there.items()},
        "functional_chance": {corpus: float(sums[2] / sums[0]) for corpus, sums in there.items()},
    }
