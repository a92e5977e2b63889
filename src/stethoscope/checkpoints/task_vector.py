"""Tuned minus base, one tensor at a time, whether tuned is a checkpoint (full.py) or a PEFT adapter (adapter.py).

    change = open_task_vector(open_checkpoint("base"), "tuned-or-adapter")    # of open.py
    change.delta("layers.3.mlp.up_proj.weight")    # float32
    change.energy_by_layer()                       # squared Frobenius norms

Everything is computed on a fixed grid of row chunks, so that a tensor read whole and a tensor written in pieces
have the same bytes, and no step needs more memory than it returns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Shaped

from stethoscope.checkpoints.checkpoint import ARITHMETIC, Checkpoint, Entry, torch_dtype
from stethoscope.checkpoints.names import Kind
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

Key = TypeVar("Key")
CHUNK_ELEMENTS = 1 << 19  # two float32 copies of a chunk stay in a core's caches


def row_chunks(entry: Entry) -> Iterator[tuple[int, int]]:
    """The grid that every computation over a tensor follows: (first row, last row + 1)."""
    step = max(1, CHUNK_ELEMENTS // max(1, entry.columns))
    for start in range(0, entry.rows, step):
        yield start, min(start + step, entry.rows)


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of a tensor seen as a matrix of its last dimension."""

    start: int
    stop: int
    rows: torch.Tensor


class TaskVector(ABC):
    """The change from base to tuned, lazily; made by `open_task_vector`.

    Attributes:
        base: the checkpoint that the change is relative to.
        source: what the user called tuned.
        store: its files: the tuned checkpoint, or the adapter's matrices under their own keys.
        names: canonical names of the tensors that tuned has a value for, in the base's order.
    """

    base: Checkpoint
    source: str
    store: Checkpoint
    names: tuple[str, ...]

    @abstractmethod
    def delta_chunks(self, name: str) -> Iterator[Chunk]:
        """The change in float32, chunk by chunk, each [rows, columns], on the grid of `row_chunks`.

        A chunk may share its memory with the next: use it before asking for that.
        """

    @abstractmethod
    def tuned_chunks(self, name: str) -> Iterator[Chunk]:
        """The tuned tensor in the base's dtype, chunk by chunk."""

    def edited_chunks(self, name: str, coefficient: float) -> Iterator[Chunk]:
        """base + coefficient * change, rounded once to the base's dtype, chunk by chunk; at 1 exactly tuned."""
        if coefficient == 1:
            yield from self.tuned_chunks(name)
            return
        for start, stop, delta in self.delta_chunks(name):
            yield Chunk(start, stop, self.add(name, self.base.read_rows(name, start, stop), delta, coefficient))

    def add(
        self, name: str, base: Shaped[torch.Tensor, "..."], delta: Float[torch.Tensor, "..."], coefficient: float
    ) -> Shaped[torch.Tensor, "..."]:
        """base + coefficient * delta, rounded once to the base's dtype."""
        # two roundings on purpose: a fused multiply-add depends on where in a vector register an element falls
        result = (delta * coefficient).add_(base.float()).to(base.dtype)
        if not is_finite(result):
            raise self.out_of_range(name, coefficient)
        return result

    def out_of_range(self, name: str, coefficient: float) -> CheckpointError:
        """The error for a result that the base's dtype cannot hold."""
        return CheckpointError(
            f"`{name}` leaves the range of `{self.base.entries[name].dtype}` at coefficient {coefficient}",
            hint="choose a smaller coefficient",
        )

    def raw(self, name: str) -> tuple[Checkpoint, Entry] | None:
        """Where tuned's bytes lie if they can be copied as they are; None if they have to be computed."""
        return None

    def delta(self, name: str) -> Float[torch.Tensor, "..."]:
        """tuned - base in float32.

        Raises:
            CheckpointError: there is no such tensor, it is not a float, or it holds NaN or infinity.
        """
        return self._assemble(name, self.delta_chunks(name), torch.float32)

    def tuned(self, name: str) -> Shaped[torch.Tensor, "..."]:
        """The tuned tensor in the base's dtype: its very bytes where the dtypes agree, else cast once."""
        return self.edited(name, 1.0)

    def edited(self, name: str, coefficient: float) -> Shaped[torch.Tensor, "..."]:
        """base + coefficient * change in the base's dtype; at 1 exactly `tuned`."""
        dtype = torch_dtype(self._entry(name).dtype)
        return self._assemble(name, self.edited_chunks(name, coefficient), dtype)

    def energy(self, name: str) -> float:
        """The squared Frobenius norm of the tensor's change."""
        self._entry(name)
        norms = (float(torch.linalg.vector_norm(rows, dtype=torch.float64)) for _, _, rows in self.delta_chunks(name))
        return math.fsum(norm**2 for norm in norms)

    def energy_by_layer(self) -> dict[int, float]:
        """Energy per decoder layer: the sum over its tensors."""
        return dict(sorted(_sum_by(self.base, self._energies, lambda entry: entry.layer).items()))

    def energy_by_kind(self) -> dict[Kind, float]:
        """Energy per kind of module."""
        return _sum_by(self.base, self._energies, lambda entry: entry.kind)

    @cached_property
    def _energies(self) -> dict[str, float]:
        """Energy per float tensor but vision's; kept, so that a second summary does not read two models again."""
        entries = [self.base.entries[name] for name in self.names]
        return {e.name: self.energy(e.name) for e in entries if e.dtype in ARITHMETIC and e.kind != "vision"}

    def _assemble(self, name: str, chunks: Iterator[Chunk], dtype: torch.dtype) -> torch.Tensor:
        entry = self._entry(name)
        out = torch.empty(entry.rows, entry.columns, dtype=dtype)
        for start, stop, rows in chunks:
            out[start:stop] = rows
        return out.reshape(entry.shape)

    def _entry(self, name: str) -> Entry:
        if name not in self._name_set:
            self.base.entry(name)
            raise CheckpointError(f"`{self.source}` does not change `{name}`")
        return self.base.entries[name]

    @cached_property
    def _name_set(self) -> frozenset[str]:
        return frozenset(self.names)


def is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite; a sum is fast and can only be wrong in the safe direction."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


# Dtype -> an integer of its size, and the bits that are all set in NaN and infinity alone.
EXPONENTS = {
    "F64": (np.uint64, 0x7FF0 << 48), "F32": (np.uint32, 0x7F80 << 16), "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80), "F8_E5M2": (np.uint8, 0x7C), "F8_E4M3": (np.uint8, 0x7F),
}  # fmt: skip


def bytes_finite(piece: memoryview, dtype: str) -> bool:
    """Whether a piece of a tensor of this stored dtype holds neither NaN nor infinity; True for what is no float."""
    if dtype not in EXPONENTS or not piece:
        return True
    kind, mask = EXPONENTS[dtype]
    return bool((np.frombuffer(piece, dtype=kind) & kind(mask)).max() < mask)


def not_finite(name: str, source: str) -> CheckpointError:
    """The error that names a tensor holding NaN or infinity."""
    return CheckpointError(
        f"`{name}` of `{source}` holds NaN or infinity", hint="the training run diverged or the file is damaged"
    )


def require_finite(values: torch.Tensor, name: str, source: str) -> None:
    """Raise if a tensor's values hold NaN or infinity."""
    if not is_finite(values):
        raise not_finite(name, source)


def require_float(*entries: Entry) -> None:
    """Raise unless differences of these tensors mean something."""
    for entry in entries:
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
