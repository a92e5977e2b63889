"""How much of a task vector lies in the subspace of SAE features, compared with chance.

    made = measure_geometry(task_vector, features, provenance=provenance, model=model, texts=texts)
    print(made.verdict)

Each weight is read once, and all energies are taken from its Gram matrix on the residual stream's side, on the model's
device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.change import POOL, DrawnSpans, LinearChange
from stethoscope.editing.residual_axis import READERS, ResidualAxis, residual_axes
from stethoscope.editing.subspace import LayerFeatures, nested_basis, principal_angles, random_basis
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.models.sites import HookPoint, hook_point, read_activations
from stethoscope.results.geometry import Curve, Draws, Geometry, Kept, LayerGeometry, TensorGeometry, Written
from stethoscope.text.tokens import TokenBatch

NEEDED = (0.5, 0.9, 0.99)
_POINTS = 128  # of a curve that are saved
_RESAMPLES = 1000
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

    Raises:
        CheckpointError: with every matrix whose role is not known or does not fit.
        StethoscopeError: the task vector changes nothing in these layers.
    """
    provenance = provenance or Provenance()
    entries = task_vector.base.entries
    device = model.device if model else torch.device("cpu")
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
        subspaces = _Subspaces(task_vector, layer, load(), rng=rng, draws=draws, device=device)
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
                values = values.reshape(*batch.countable.shape, -1)  # routers see all tokens in one row
                kept[key].append(values[batch.countable.to(values.device)][here.to(values.device)].float().cpu())
    rows = {key: torch.cat(several) for key, several in kept.items() if several}
    norms = {layer: values.norm(dim=1) for (layer, place), values in rows.items() if not place}
    ordinary = {layer: values <= _SINK * values.median() for layer, values in norms.items()}
    rows = {(layer, place): values[ordinary[layer]] for (layer, place), values in rows.items()}
    return len(picked), {name: rows[key] for name, key in places.items() if key in rows}


@dataclass(frozen=True, kw_only=True)
class TensorEnergy:
    """One tensor's energies; arrays are over draws."""

    layer: int
    kind: str
    energy: float
    kept: float
    chance: float
    features: np.ndarray
    bases: np.ndarray


class _Subspaces:
    """One layer's subspaces: of its features, of all features in order, of encoders, and at random."""

    def __init__(
        self,
        task_vector: TaskVector,
        layer: int,
        found: LayerFeatures,
        *,
        rng: np.random.Generator,
        draws: int,
        device: torch.device,
    ) -> None:
        self.task_vector, self.layer, self.found, self.rng = task_vector, layer, found, rng
        self.width, self.device = task_vector.base.hidden_size, device
        if {found.decoder.shape[1], found.encoder.shape[1]} != {self.width}:
            raise SAEError(
                f"the features of layer {layer} are no directions of the residual stream: they have"
                f" {found.decoder.shape[1]} values to write and {found.encoder.shape[1]} to read, it has {self.width}",
                hint="geometry needs SAEs of the residual stream, or of what attention or MLP add to it",
            )
        decoder = found.decoder.to(device)
        self.whole, self.came = nested_basis(decoder[list(found.order)])
        self.chosen = self.whole[:, : int((self.came < found.chosen).sum())]
        self.encoder = nested_basis(found.encoder[list(found.order)[: found.chosen]].to(device))[0]
        rank, generator = self.chosen.shape[1], torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        random = [random_basis(self.width, rank, generator).to(device) for _ in range(_FUNCTIONAL_DRAWS)]
        self.compared = [Q.float() for Q in (self.chosen, *random)]
        pool = None if isinstance(task_vector, AdapterTaskVector) else POOL
        self.sets = DrawnSpans.draw(decoder, found.chosen, draws, rng, pool)
        gaussian = torch.randn((pool or draws) * rank, self.width, generator=generator).to(device)
        self.bases = DrawnSpans.draw(gaussian, rank, draws, rng)

    def measure(
        self, axes: Mapping[str, ResidualAxis | None], inputs: Mapping[str, Mapping[str, Tensor]], leading: int
    ) -> tuple[LayerGeometry, list[TensorEnergy]] | None:
        """The layer and its tensors' energies; None where nothing changes."""
        tensors: list[TensorGeometry] = []
        energies: list[TensorEnergy] = []
        outside = read = writers = 0.0
        gram, rows = self.chosen.new_zeros(0), [self.chosen.new_zeros(0, self.width)]  # of tall changes, of others
        squares: dict[str, np.ndarray] = {corpus: np.zeros(3) for corpus in inputs}
        for name, axis in axes.items():
            if axis is None:
                outside += self.task_vector.energy(name)
                continue
            change = LinearChange.of(self.task_vector, name, axis, self.device)
            if change.energy == 0:
                continue
            energies.append(energy := self._energy(name, change))
            if change.tall:
                gram = gram + change.gram if len(gram) else change.gram
            else:
                rows.append(change.rows.double())
            if axis.writes:
                writers, read = writers + energy.energy, read + float(change.along(self.encoder.T).sum())
            functional = self._functional(change, {n: found[name] for n, found in inputs.items() if name in found})
            for corpus, sums in functional.items():
                squares[corpus] += sums
            is_matrix = len(self.task_vector.base.entries[name].shape) == 2
            spectrum = change.spectrum(leading) if is_matrix else None
            angles = principal_angles(self.chosen, spectrum.leading) if spectrum else np.zeros(0)
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
        shares = (torch.cat(rows) @ self.whole).square().sum(0)
        if len(gram):
            whole = self.whole.to(gram)
            shares += (gram @ whole * whole).sum(0)
        return LayerGeometry(
            layer=self.layer,
            features=self.found.chosen,
            rank=self.chosen.shape[1],
            kept=sum_energies(energies, self.rng),
            unprojected=outside / (outside + total),
            **_shares(squares),
            curve=energy_curve(shares.cpu() / total, self.came, len(self.found.order), self.width),
            written=Written(share=read / writers, chance=self.encoder.shape[1] / self.width) if writers else None,
            tensors=tuple(tensors),
        ), energies

    def _energy(self, name: str, change: LinearChange) -> TensorEnergy:
        return TensorEnergy(
            layer=self.layer,
            kind=self.task_vector.base.entries[name].kind,
            energy=change.energy,
            kept=float(change.along(self.chosen.T).sum()),
            chance=self.chosen.shape[1] / self.width,
            features=self.sets.energies(change),
            bases=self.bases.energies(change),
        )

    def _functional(self, change: LinearChange, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """By corpus, sums over tokens of |tau x|^2, of |tau' x|^2, and of the latter for random bases on average."""
        found = {}
        products = [] if change.writes or not inputs else [_products(change, Q) for Q in self.compared]
        for corpus, x in inputs.items():
            x = x.to(self.device)
            if change.writes:
                raw = change.outputs(x)
                whole, kept = raw.square().sum(), [(raw @ Q).square().sum() for Q in self.compared]
            else:  # |tau Q Q^T x|^2 over all tokens, from two small matrices
                parts = [x @ Q for Q in self.compared]
                whole = change.along(x).sum()
                kept = [(P * (part.T @ part)).sum() for P, part in zip(products, parts, strict=True)]
            chosen, *drawn = map(float, kept)
            found[corpus] = np.array([float(whole), chosen, float(np.mean(drawn))])
        return found


def _products(change: LinearChange, Q: Tensor) -> Tensor:
    ours, theirs = change.halves(Q.T)
    return ours @ theirs.T


def _shares(squares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    there = {corpus: sums for corpus, sums in squares.items() if sums[0] > 0}
    return {
        "functional": {corpus: float(sums[1] / sums[0]) for corpus, sums in there.items()},
        "functional_chance": {corpus: float(sums[2] / sums[0]) for corpus, sums in there.items()},
    }


def energy_curve(shares: Float64[Tensor, " rank"], came: Int[Tensor, " rank"], features: int, width: int) -> Curve:
    """What 1, 2, ... features keep.

    Args:
        shares: of energy along the columns of a nested basis.
        came: the feature that each column came with.
        features: how many there are.
        width: of the residual stream.
    """
    gains, ranks = np.zeros(features), np.zeros(features)
    gains[came.numpy()], ranks[came.numpy()] = shares.numpy(), 1.0
    kept, chance = gains.cumsum(), ranks.cumsum() / width
    points = np.unique(np.linspace(0, features - 1, min(features, _POINTS)).round().astype(int))
    # a share that is whole but for rounding has been reached
    short = {share: int((kept < share - 1e-6).sum()) for share in NEEDED}
    return Curve(
        features=tuple((points + 1).tolist()),
        share=tuple(kept[points].tolist()),
        chance=tuple(chance[points].tolist()),
        needed={f"{share:.0%}"[:-1]: n + 1 if n < features else None for share, n in short.items()},
    )


def sum_energies(energies: Sequence[TensorEnergy], rng: np.random.Generator) -> Kept:
    """What subspaces keep of several tensors together; the bootstrap draws layers, or tensors of a single layer."""
    units = sorted({one.layer for one in energies})
    groups = [[one for one in energies if one.layer == n] for n in units] if len(units) > 1 else [[e] for e in energies]
    kept = np.array([sum(one.kept for one in group) for group in groups])
    chance = np.array([sum(one.energy * one.chance for one in group) for group in groups])
    energy = sum(one.energy for one in energies)
    features = sum((one.features for one in energies), np.zeros(1)) / energy
    share = kept.sum() / energy
    interval = None
    if len(groups) > 1:
        drawn = rng.integers(len(groups), size=(_RESAMPLES, len(groups)))
        low, high = np.percentile(kept[drawn].sum(1) / chance[drawn].sum(1), (2.5, 97.5))
        interval = (float(low), float(high))
    return Kept(
        energy=energy,
        share=share,
        chance=chance.sum() / energy,
        random_features=_draws(features),
        random_bases=_draws(sum((one.bases for one in energies), np.zeros(1)) / energy),
        over_chance=kept.sum() / chance.sum(),
        interval=interval,
        p=float((1 + (features >= share).sum()) / (1 + len(features))),
    )


def _draws(shares: Float64[np.ndarray, " draws"]) -> Draws:
    low, high = np.percentile(shares, (2.5, 97.5))
    return Draws(mean=float(shares.mean()), low=float(low), high=float(high))
