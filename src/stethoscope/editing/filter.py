"""The filter: the part of a task vector that target text uses and protected text does not notice.

    write_filters(model, task_vector, {"target": ..., "chat": ...}, Path("filters"), weights={"chat": 1.0})
    EditPlan(default=1.0, transform=FilteredChange(Path("filters"), 1.0, task_vector))

A tensor's change tau becomes D = tau F with F = C_T (C_T + strength C_P)^-1, which minimises
E_T |(D - tau) x|^2 + strength E_P |D x|^2: the Wiener filter, target the signal and protected text the noise. C_T and
C_P are the second moments of the tensor's input x on target and protected text; C_P sums all protected texts, weighted.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance, file_name, new_folder
from stethoscope.checkpoints.adapter import AdapterTaskVector, low_rank
from stethoscope.checkpoints.checkpoint import torch_dtype
from stethoscope.checkpoints.header import read_header
from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.few_tokens import FewTokens
from stethoscope.editing.moments import (
    Inputs,
    Moments,
    Progress,
    Role,
    Samples,
    Texts,
    collect_moments,
    not_definite,
    roles,
    shrinkage,
)
from stethoscope.editing.plan import followed
from stethoscope.errors import CheckpointError, StethoscopeError
from stethoscope.results.filtering import Effect, Filtering, LayerFiltering

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
TARGET = "target"  # the name of the text whose skill is kept; every other text is protected

Mean = Float64[Tensor, "d d"] | Float64[Tensor, " d"]


def shrunk(moments: Moments | Samples) -> Mean:
    """Moments per token, drawn toward a multiple of the identity as far as so few tokens demand.

    With fewer tokens than dimensions the result still has full rank, and inputs that no text has shown pass the filter
    at floor_T / (floor_T + strength floor_P), of what is added to the diagonals of target's and protected moments. A
    diagonal is estimated channel by channel and is not shrunk.

    Raises:
        CheckpointError: moments are not finite.
    """
    mean = moments.mean()
    if not mean.isfinite().all():
        raise not_definite()
    if mean.ndim == 1 or not moments.seen:
        return mean
    d = len(mean)
    scale, squares = float(mean.diagonal().mean()), float(mean.square().mean())
    amount = shrinkage(scale, squares, d, moments.seen)
    mean.mul_(1 - amount)  # in place: at 10,240 values each copy is 0.8 GB
    mean.diagonal().add_(amount * scale)
    return mean


def filtered(
    change: Float[Tensor, "rows d"], target: Mean, protected: Mean, strengths: Sequence[float]
) -> Iterator[Float[Tensor, "rows d"]]:
    """change F for each strength; each costs one Cholesky factorisation, a thirtieth of an eigendecomposition.

    Args:
        change: multiplies the input from the left: a matrix [out, in], or LoRA's A; [1, d] where moments are diagonal.
        target, protected: moments per token. Inputs that target text never has are not changed at all.

    Raises:
        CheckpointError: moments are not finite, or not of full rank.
    """
    if target.ndim == 1:
        for strength in strengths:
            total = target + strength * protected
            passed = torch.where(total > 0, target / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
            yield change * passed.to(change.dtype)
        return
    if not target.any():
        yield from (torch.zeros_like(change) for _ in strengths)
        return
    many = len(change) > len(target)  # then F itself is the smaller unknown
    wanted = target if many else (change.to(target.dtype) @ target).T
    for strength in strengths:
        factor, failed = torch.linalg.cholesky_ex(target + strength * protected)
        if failed or not factor.diagonal().isfinite().all():
            raise not_definite()
        solved = torch.cholesky_solve(wanted, factor).T
        yield change @ solved.to(change.dtype) if many else solved


def filtered_tied(
    change: Float[Tensor, "tokens d"],
    head: tuple[Float64[Tensor, "d d"], Float64[Tensor, "d d"]],
    counts: tuple[Float64[Tensor, " tokens"], Float64[Tensor, " tokens"]],
    strengths: Sequence[float],
) -> Iterator[Float[Tensor, "tokens d"]]:
    """The same for an embedding that is the head, too: the sum of both objectives is minimised, row by row.

    The row of token v solves D_v (C_T + s C_P + (n_T,v + s n_P,v) I) = tau_v (C_T + n_T,v I); one eigendecomposition of
    the head's moments serves all rows.

    Args:
        head: the last hidden state's moments on target and protected text.
        counts: each token's frequency in them.
    """
    (target, protected), (seen, protected_seen) = head, counts
    for strength in strengths:
        values, vectors = torch.linalg.eigh(target + strength * protected)
        wanted = change @ (target @ vectors).to(change.dtype)
        wanted += seen.to(change.dtype)[:, None] * (change @ vectors.to(change.dtype))
        wanted /= (values + (seen + strength * protected_seen)[:, None]).to(change.dtype)
        yield wanted @ vectors.T.to(change.dtype)


def write_filters(
    model: PreTrainedModel,
    task_vector: TaskVector,
    texts: Texts,
    out: Path,
    *,
    provenance: Provenance,
    strengths: Sequence[float] = STRENGTHS,
    weights: Mapping[str, float] | None = None,
    layers: Collection[int] | None = None,
    separable: bool = False,
    progress: Progress | None = None,
) -> Filtering:
    """Filter a task vector at several strengths; a layer's moments are dropped when it is done.

    Args:
        model: the base, live, whose activations are the inputs.
        texts: ``target`` and one or more protected texts -> batches.
        out: the folder to write or replace: `filter.json`, and per strength a file of each change. LoRA's are new A
            matrices in float32; others are cast to the base's dtype, which loses less than their sum with it does.
        strengths: of the filters; without one only the raw change is measured.
        weights: protected text -> its weight, 1 if not given.
        layers: those to filter; all, and the tensors outside the layers, if None.
        separable: also measure how far the texts can be told apart.

    Raises:
        CheckpointError: with every tensor whose input is not known; or moments or a change are not finite.
        StethoscopeError: a text is missing or has no token that counts, or a strength or weight makes no sense.
    """
    weights = dict.fromkeys((name for name in texts if name != TARGET), 1.0) | dict(weights or {})
    _check(texts, strengths, weights)
    names = [name for name in task_vector.names if _is_filtered(name, layers) and followed(task_vector, name) == name]
    met, found = roles(model, names), []
    with new_folder(out, overwrite=True) as folder:
        for layer, inputs in collect_moments(model, texts, names, samples=True, progress=progress):
            sums, apart = [Effect()] * (1 + len(strengths)), []
            for shared in _by_input(inputs, [name for name in names if parse_name(name).layer == layer]):
                if shared[0] not in inputs and met[shared[0]] != "added":
                    raise CheckpointError(f"`{shared[0]}` is never reached by a forward", hint="leave its layer out")
                at = inputs.get(shared[0])
                parts = [_Part.of(task_vector, name, met[name], model.device) for name in shared]
                rows = torch.cat([part.rows for part in parts]) if len(parts) > 1 else parts[0].rows
                pair: tuple[Mean, Mean] | FewTokens
                if samples := {text: one for text, one in (at or {}).items() if isinstance(one, Samples)}:
                    pair = FewTokens.of(samples, TARGET, weights)
                    changed = pair.filtered(rows, strengths)
                elif parts[0].role == "tied":
                    counts, pair = (_moments(one, weights, model.device) for one in (at, inputs["lm_head.weight"]))
                    changed = filtered_tied(rows, pair, counts, strengths)
                else:
                    pair = _moments(at, weights, model.device)
                    changed = filtered(rows, *pair, strengths)
                seen = isinstance(pair, FewTokens) or bool(pair[0].any() or pair[1].any())
                if separable and seen and parts[0].role in ("columns", "rows"):
                    value = pair.separability() if isinstance(pair, FewTokens) else separability(*pair)
                    apart.append((rows.shape[1], value))
                for place, change in enumerate(chain([rows], changed)):
                    for part, own in zip(parts, change.split([len(part.rows) for part in parts]), strict=True):
                        sums[place] = _sum(sums[place], part.effect(own, pair))
                        if place:
                            path = _path(folder, strengths[place - 1], part.name)
                            path.parent.mkdir(exist_ok=True)
                            save_file(part.stored(own, task_vector), path)
            total = sum(size for size, _ in apart)
            mean = sum(size * value for size, value in apart) / total if total else None
            found.append(LayerFiltering(layer=layer, separability=mean, raw=sums[0], filtered=tuple(sums[1:])))
        tokens = {name: sum(int(batch.countable.sum()) for batch in text) for name, text in texts.items()}
        filtering = Filtering(
            provenance=provenance,
            strengths=tuple(strengths),
            weights=weights,
            tokens=tokens,
            layers=tuple(found),
            tensors=len(names),
        )
        filtering.save(folder)
    return filtering


def separability(target: Float64[Tensor, "d d"], protected: Float64[Tensor, "d d"]) -> float:
    """How far two texts can be told apart at an input: 0 if their moments are equal, 1 if no direction is in both.

    The root mean square of (1 - mu) / (1 + mu) over the generalised eigenvalues mu, C_P v = mu C_T v, which are 2 F - 1
    for the filter F of strength 1: a norm, so that no eigenvalue is computed.
    """
    factor = torch.linalg.cholesky(target + protected)
    whitened = torch.linalg.solve_triangular(factor, target, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.T, upper=False)
    whitened.diagonal().sub_(0.5)  # its eigenvalues were 1 / (1 + mu)
    return float(2 * whitened.square().sum().div(len(whitened)).sqrt())


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One tensor's change as rows that the filter multiplies: the matrix itself, or LoRA's A.

    Attributes:
        B: LoRA's, times its scaling.
    """

    name: str
    role: Role
    rows: Float[Tensor, "rows d"]
    B: Float64[Tensor, "out rank"] | None

    @classmethod
    def of(cls, task_vector: TaskVector, name: str, role: Role, device: torch.device) -> "_Part":
        factors = low_rank(task_vector, name) if role in ("columns", "rows") else None
        if factors:
            A, B = factors.A.to(device).double(), factors.B.to(device).double()
            return cls(name=name, role=role, rows=A, B=B * factors.scaling)
        delta = task_vector.delta(name).to(device)
        if role in ("rows", "token"):
            rows = delta.T
        elif role == "added":
            rows = delta[:, None]
        else:
            rows = delta.reshape(-1, delta.shape[-1])
        return cls(name=name, role=role, rows=rows if role in ("token", "tied") else rows.double(), B=None)

    def effect(self, change: Float[Tensor, "rows d"], pair: "tuple[Mean, Mean] | FewTokens") -> Effect:
        """Of the change that these rows make; of an embedding that is the head, too, as the head."""

        def size(one: Tensor, other: Tensor) -> float:
            if self.B is None:
                return float((one * other).sum())
            return float(((self.B.T @ self.B) * (one @ other.T)).sum())

        energy = size(change, change)
        if isinstance(pair, FewTokens):
            seen = change @ pair.X.T
            found = [floor * energy + size(seen * weights, seen) for floor, weights in (pair.target, pair.protected)]
        else:
            means = [mean.to(change.dtype) for mean in pair]
            found = [size(change, change @ mean if mean.ndim == 2 else change * mean) for mean in means]
        return Effect(energy=energy, target=found[0], protected=found[1])

    def stored(self, change: Float[Tensor, "rows d"], task_vector: TaskVector) -> dict[str, Tensor]:
        """What is written to disk: LoRA's A in float32, or the change in the base's dtype and the tensor's layout."""
        if self.B is not None:
            return {"A": change.to("cpu", torch.float32).contiguous()}
        entry = task_vector.base.entries[self.name]
        change = change.T if self.role in ("rows", "token") else change
        return {"change": change.reshape(entry.shape).to("cpu", torch_dtype(entry.dtype)).contiguous()}


def check_files(folder: Path, filtering: Filtering) -> None:
    """Check by their headers that all changes are there that `write_filters` has written.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    for strength in filtering.strengths:
        files = [*(folder / f"{strength:g}").glob("*.safetensors")]
        for path in files:
            read_header(path)
        if len(files) != filtering.tensors:
            raise CheckpointError(
                f"`{folder}` has {len(files)} of {filtering.tensors} changes of strength {strength:g}"
            )


class FilteredChange:
    """A plan's transform that takes each tensor's change from what `write_filters` wrote at one strength.

    Attributes:
        filtering: what was written.
        strength: one of its strengths.
    """

    def __init__(self, folder: Path, strength: float, task_vector: TaskVector) -> None:
        """Open the changes.

        Raises:
            StethoscopeError: there is nothing of this strength in the folder.
        """
        self.filtering = Filtering.load(folder)
        if strength not in self.filtering.strengths:
            known = ", ".join(f"{one:g}" for one in self.filtering.strengths)
            raise StethoscopeError(f"`{folder}` has no filter of strength {strength:g}", hint=f"it has {known}")
        self.strength, self.task_vector = strength, task_vector
        self._folder = folder

    def apply(self, name: str, delta: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The filtered change of one tensor; zero for a tensor that was not filtered, such as a vision tower's."""
        stored = self._read(name)
        if (A := stored.get("A")) is None:
            return stored["change"].float() if stored else torch.zeros_like(delta)
        factors = low_rank(self.task_vector, name)
        assert factors is not None
        assert isinstance(self.task_vector, AdapterTaskVector)
        product = (factors.B.double() @ A.double()).mul_(factors.scaling).float()
        return product.T if self.task_vector.changes[name].transposed else product

    def low_rank(self, name: str) -> Float[Tensor, "rank d"] | None:
        """LoRA's new A of a tensor, whose B stays; None for a change that is not stored so."""
        return self._read(name).get("A") if isinstance(self.task_vector, AdapterTaskVector) else None

    def describe(self) -> dict[str, Any]:
        """Strength, weights and tokens of the texts, and the hash of everything the filter was made from."""
        found = self.filtering
        return {
            "kind": "filter",
            "strength": self.strength,
            "weights": found.weights,
            "tokens": found.tokens,
            "made_from": found.provenance.key,
        }

    def _read(self, name: str) -> dict[str, Tensor]:
        path = _path(self._folder, self.strength, followed(self.task_vector, name))
        return load_file(path) if path.exists() else {}


def _is_filtered(name: str, layers: Collection[int] | None) -> bool:
    parsed = parse_name(name)
    return parsed.kind not in ("vision", "buffer") and (layers is None or parsed.layer in layers)


def _by_input(inputs: Inputs, names: Sequence[str]) -> list[list[str]]:
    """Tensors that share an input, together."""
    groups: dict[int | str, list[str]] = {}
    for name in names:
        groups.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return list(groups.values())


def _moments(
    at: Mapping[str, Moments | Samples] | None, weights: Mapping[str, float], device: torch.device
) -> tuple[Mean, Mean]:
    """Target's and protected moments of an input; a bias has the input 1."""
    if at is None:
        one = torch.ones(1, dtype=torch.float64, device=device)
        return one, one * sum(weights.values())
    found = {text: shrunk(moments) for text, moments in at.items()}
    protected = torch.zeros_like(found[TARGET])
    for text, weight in weights.items():
        protected.add_(found[text], alpha=weight)
    return found[TARGET], protected


def _sum(a: Effect, b: Effect) -> Effect:
    return Effect(energy=a.energy + b.energy, target=a.target + b.target, protected=a.protected + b.protected)


def _path(folder: Path, strength: float, name: str) -> Path:
    return folder / f"{strength:g}" / f"{file_name(name)}.safetensors"


def _check(texts: Texts, strengths: Sequence[float], weights: Mapping[str, float]) -> None:
    problems = [] if TARGET in texts else ["there is no target text"]
    problems += [] if weights else ["there is no protected text"]
    problems += [f"the weight of `{name}` is {w}" for name, w in weights.items() if not 0 < w < math.inf]
    problems += [
        f"`{name}` has a weight and is no protected text" for name in weights if name not in {*texts} - {TARGET}
    ]
    problems += [f"the strength {s} is not a number from 0 on" for s in strengths if not 0 <= s < math.inf]
    if problems:
        raise StethoscopeError("cannot filter", problems=problems, hint="give one target and one protected text")
