"""Tuned minus base, one tensor at a time, whether tuned is a checkpoint or a PEFT adapter.

    change = open_task_vector(open_checkpoint("base"), "tuned-or-adapter")
    change.delta("layers.3.mlp.up_proj.weight")    # float32
    change.energy_by_layer()                       # squared Frobenius norms

Everything is computed on a fixed grid of row chunks, so that a tensor read whole and a tensor written in pieces
have the same bytes, and no step needs more memory than it returns.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from stethoscope.checkpoints.checkpoint import ARITHMETIC, TORCH_DTYPES, Checkpoint, Entry, open_checkpoint
from stethoscope.checkpoints.names import Kind
from stethoscope.errors import CheckpointError

Key = TypeVar("Key")
CHUNK_ELEMENTS = 1 << 20  # a few float32 copies of a chunk stay in the second-level cache


def row_chunks(entry: Entry) -> Iterator[tuple[int, int]]:
    """The grid that every computation over a tensor follows: (first row, last row + 1)."""
    columns = entry.shape[-1] if entry.shape else 1
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, entry.rows, step):
        yield start, min(start + step, entry.rows)


class TaskVector(ABC):
    """The change from base to tuned, lazily; made by `open_task_vector`.

    Attributes:
        base: the checkpoint that the change is relative to.
        source: what the user called tuned.
        names: canonical names of the tensors that tuned has a value for, in the base's order.
    """

    base: Checkpoint
    source: str
    names: tuple[str, ...]

    @abstractmethod
    def delta_rows(self, name: str, start: int, stop: int) -> Float[Tensor, "rows columns"]:
        """Rows of the change in float32; ``start`` and ``stop`` come from `row_chunks`."""

    @abstractmethod
    def tuned_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows columns"]:
        """Rows of the tuned tensor in the base's dtype."""

    def raw(self, name: str) -> tuple[Checkpoint, Entry] | None:
        """Where tuned's bytes lie if they can be copied as they are; None if they have to be computed."""
        return None

    def delta(self, name: str) -> Float[Tensor, "..."]:
        """tuned - base in float32.

        Raises:
            CheckpointError: there is no such tensor, it is not a float, or it holds NaN or infinity.
        """
        entry = self._entry(name)
        out = torch.empty(entry.rows, entry.shape[-1] if entry.shape else 1)
        for start, stop in row_chunks(entry):
            out[start:stop] = self.delta_rows(name, start, stop)
        return out.reshape(entry.shape)

    def tuned(self, name: str) -> Shaped[Tensor, "..."]:
        """The tuned tensor in the base's dtype: its very bytes where the dtypes agree, else cast once."""
        entry = self._entry(name)
        out = torch.empty(entry.rows, entry.shape[-1] if entry.shape else 1, dtype=TORCH_DTYPES[entry.dtype])
        for start, stop in row_chunks(entry):
            out[start:stop] = self.tuned_rows(name, start, stop)
        return out.reshape(entry.shape)

    def energy(self, name: str) -> float:
        """The squared Frobenius norm of the tensor's change."""
        entry = self._entry(name)
        chunks = (self.delta_rows(name, start, stop) for start, stop in row_chunks(entry))
        return math.fsum(float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2 for chunk in chunks)

    def energies(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Energy per tensor; by default of all float tensors but vision's."""
        if names is None:
            names = [name for name in self.names if self._counts(self.base.entries[name])]
        return {name: self.energy(name) for name in names}

    def energy_by_layer(self) -> dict[int, float]:
        """Energy per decoder layer: the sum over its tensors."""
        return dict(sorted(_sum_by(self.base, self._energies(), lambda entry: entry.layer).items()))

    def energy_by_kind(self) -> dict[Kind, float]:
        """Energy per kind of module."""
        return _sum_by(self.base, self._energies(), lambda entry: entry.kind)

    def _energies(self) -> dict[str, float]:
        # reading two whole models for the second of two summaries would be a waste
        if not hasattr(self, "_energy_cache"):
            self._energy_cache: dict[str, float] = self.energies()
        return self._energy_cache

    def _counts(self, entry: Entry) -> bool:
        return entry.dtype in ARITHMETIC and entry.kind != "vision"

    def _entry(self, name: str) -> Entry:
        if name not in self._name_set:
            self.base.entry(name)
            raise CheckpointError(f"`{self.source}` does not change `{name}`")
        return self.base.entries[name]

    @property
    def _name_set(self) -> frozenset[str]:
        if not hasattr(self, "_names_cached"):
            self._names_cached = frozenset(self.names)
        return self._names_cached


class FullTaskVector(TaskVector):
    """Against a full checkpoint of the same model, in whatever layout.

    Attributes:
        tuned_checkpoint: the other checkpoint.
        matches: the base's canonical name -> tuned's; they differ only where heads are tied.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base = base
        self.source = tuned.source
        self.tuned_checkpoint = tuned
        self.matches = match(base, tuned)
        self.names = tuple(self.matches)

    def delta_rows(self, name: str, start: int, stop: int) -> Float[Tensor, "rows columns"]:
        require_float(self.base.entries[name])
        require_float(self.tuned_checkpoint.entries[self.matches[name]])
        base = self.base.read_rows(name, start, stop).float()
        delta = self.tuned_checkpoint.read_rows(self.matches[name], start, stop).float().sub_(base)
        if not is_finite(delta):
            guilty = self.base.source if not is_finite(base) else self.source
            raise not_finite(name, guilty)
        return delta

    def tuned_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows columns"]:
        rows = self.tuned_checkpoint.read_rows(self.matches[name], start, stop)
        if rows.is_floating_point() and not is_finite(rows):
            raise not_finite(name, self.source)
        wanted = TORCH_DTYPES[self.base.entries[name].dtype]
        if rows.dtype == wanted:
            return rows
        require_float(self.base.entries[name])
        require_float(self.tuned_checkpoint.entries[self.matches[name]])
        cast = rows.to(wanted)
        if not is_finite(cast):
            raise CheckpointError(
                f"`{name}` of `{self.source}` has values that `{self.base.entries[name].dtype}` cannot hold",
                hint="convert the base to a wider dtype first",
            )
        return cast

    def raw(self, name: str) -> tuple[Checkpoint, Entry] | None:
        entry = self.tuned_checkpoint.entries[self.matches[name]]
        return (self.tuned_checkpoint, entry) if entry.dtype == self.base.entries[name].dtype else None


def open_task_vector(
    base: Checkpoint, tuned: str | Path, *, revision: str | None = None, cache: Path | None = None
) -> TaskVector:
    """The change from ``base`` to a full checkpoint or a PEFT adapter (folder or hub id); reads headers only.

    Raises:
        CheckpointError: with every tensor that is missing, extra or of another shape.
    """
    from stethoscope.checkpoints.adapter import AdapterTaskVector, find_adapter

    folder = find_adapter(tuned, revision=revision, cache=cache)
    if folder is not None:
        return AdapterTaskVector(base, folder)
    return FullTaskVector(base, open_checkpoint(tuned, revision=revision, cache=cache))


def match(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """The base's canonical names -> tuned's, for every tensor that both have.

    A vision tower may be missing on either side, and so may constants and a tied head's copy.
    """
    problems = []
    matches: dict[str, str] = {}
    for name, entry in base.entries.items():
        other = name if name in tuned.entries else None
        if other is None and name == "lm_head.weight" and base.tied:
            other = "embed_tokens.weight" if "embed_tokens.weight" in tuned.entries else None
        if entry.kind == "buffer" or (other is None and entry.kind == "vision"):
            continue
        if other is None:
            problems.append(f"`{entry.stored}` is missing in `{tuned.source}`")
        elif tuned.entries[other].shape != entry.shape:
            shape = list(tuned.entries[other].shape)
            problems.append(f"`{entry.stored}` is {list(entry.shape)} in `{base.source}`, {shape} in `{tuned.source}`")
        else:
            matches[name] = other
    for name, entry in tuned.entries.items():
        if name in base.entries or entry.kind in ("buffer", "vision"):
            continue
        if not (name == "lm_head.weight" and (tuned.tied or _same_bytes(tuned, name, "embed_tokens.weight"))):
            problems.append(f"`{entry.stored}` of `{tuned.source}` is missing in `{base.source}`")
    if problems:
        raise CheckpointError(
            f"`{tuned.source}` is not a fine-tune of `{base.source}` as it stands",
            problems=problems,
            hint="base and tuned must be the same architecture with the same vocabulary",
        )
    return matches


def _same_bytes(checkpoint: Checkpoint, one: str, two: str) -> bool:
    if not {one, two} <= set(checkpoint.entries):
        return False
    first, second = checkpoint.entries[one], checkpoint.entries[two]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(
        torch.equal(
            checkpoint.read_rows(one, *rows).view(torch.uint8), checkpoint.read_rows(two, *rows).view(torch.uint8)
        )
        for rows in row_chunks(first)
    )


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite; a sum is fast and can only be wrong in the safe direction."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def not_finite(name: str, source: str) -> CheckpointError:
    """The error that names a tensor holding NaN or infinity."""
    return CheckpointError(
        f"`{name}` of `{source}` holds NaN or infinity", hint="the training run diverged or the file is damaged"
    )


def require_float(entry: Entry) -> None:
    """Raise unless differences of this tensor mean something."""
    if entry.dtype not in ARITHMETIC:
        raise CheckpointError(
            f"`{entry.stored}` has dtype `{entry.dtype}`, whose difference means nothing",
            hint="use the unquantised checkpoints of base and tuned",
        )


def _sum_by(base: Checkpoint, energies: dict[str, float], key: Callable[[Entry], Key | None]) -> dict[Key, float]:
    groups: dict[Key, list[float]] = {}
    for name, energy in energies.items():
        group = key(base.entries[name])
        if group is not None:
            groups.setdefault(group, []).append(energy)
    return {group: math.fsum(values) for group, values in groups.items()}
