"""Tuned minus base, one tensor at a time, whether tuned is a full checkpoint or a PEFT adapter (adapter.py).

    change = open_task_vector(open_checkpoint("base"), "tuned-or-adapter")    # of open.py
    change.delta("layers.3.mlp.up_proj.weight")    # float32
    change.energy_by_layer()                       # squared Frobenius norms

Everything is computed on a fixed grid of row chunks, so that a tensor read whole and a tensor written in pieces
have the same bytes, and no step needs more memory than it returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from stethoscope.checkpoints.checkpoint import Checkpoint, torch_dtype
from stethoscope.checkpoints.header import DTYPES, Entry
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

CHUNK_ELEMENTS = 1 << 19  # two float32 copies of a chunk stay in a core's caches
# What a task vector can be computed in. 8-bit floats come with scales in other tensors, so they are not among them.
ARITHMETIC = frozenset({"F16", "BF16", "F32", "F64"})


def row_chunks(entry: Entry) -> Iterator[tuple[int, int]]:
    """The grid that every computation over a tensor follows: (first row, last row + 1)."""
    step = max(1, CHUNK_ELEMENTS // max(1, entry.columns))
    for start in range(0, entry.rows, step):
        yield start, min(start + step, entry.rows)


class Chunk(NamedTuple):
    """Rows ``start`` to ``stop`` of a tensor seen as a matrix of its last dimension.

    The next chunk may lie in the same memory: use it before asking for that.
    """

    start: int
    stop: int
    rows: torch.Tensor


class TaskVector:
    """The change from base to tuned, lazily; made by `open_task_vector`.

    Attributes:
        base: the checkpoint that the change is relative to.
        store: tuned's files: the tuned checkpoint, or the adapter's matrices under their own keys.
        own: canonical name -> the tensor of ``store`` that takes the base's place; an adapter computes the others.
        source: what the user called tuned.
        names: canonical names of the tensors that tuned has a value for, in the base's order.
        rows: canonical name -> rows of tuned's tensor, where its vocabulary has more or fewer than the base's.
        notes: what of tuned does not get into an edit, in sentences.
    """

    def __init__(self, base: Checkpoint, store: Checkpoint, own: Mapping[str, str]) -> None:
        self.base = base
        self.store = store
        self.own = own
        self.source = store.source
        self.names = tuple(own)
        self.rows: dict[str, int] = {}
        self.notes: tuple[str, ...] = ()

    def delta(self, name: str) -> Float[torch.Tensor, "..."]:
        """tuned - base in float32.

        Raises:
            CheckpointError: there is no such tensor, it is not a float, or it holds NaN or infinity.
        """
        return self._assemble(name, self.delta_chunks(name), torch.float32)

    def edited(
        self, name: str, coefficient: float, *, A: Float[torch.Tensor, "rank d"] | None = None
    ) -> Shaped[torch.Tensor, "..."]:
        """base + coefficient * change in the base's dtype; at 1 tuned's very bytes where the dtypes agree.

        Args:
            A: takes the place of LoRA's own.
        """
        dtype = torch_dtype(self._entry(name).dtype)
        return self._assemble(name, self.edited_chunks(name, coefficient, A=A), dtype)

    def raw(self, name: str) -> tuple[Checkpoint, Entry] | None:
        """Where tuned's bytes lie if they can be copied as they are; None if they have to be computed."""
        entry, like = self.store.entries[self.own[name]], self.base.entries[name]
        return (self.store, entry) if (entry.dtype, entry.shape) == (like.dtype, like.shape) else None

    def energy(self, name: str) -> float:
        """The squared Frobenius norm of the tensor's change."""
        norms = (float(torch.linalg.vector_norm(rows, dtype=torch.float64)) for _, _, rows in self.delta_chunks(name))
        return math.fsum(norm**2 for norm in norms)

    def energy_by_layer(self) -> dict[int, float]:
        """Energy of every decoder layer: the sum over its float tensors, 0 where nothing changes."""
        return dict(self._layer_energies)

    @cached_property
    def _layer_energies(self) -> dict[int, float]:
        """Kept, so that a second summary does not read two models again."""
        groups: dict[int, list[float]] = {layer: [] for layer in range(self.base.layers)}
        for entry in (self.base.entries[name] for name in self.names):
            if entry.layer in groups and entry.dtype in ARITHMETIC:
                groups[entry.layer].append(self.energy(entry.name))
        return {layer: math.fsum(energies) for layer, energies in groups.items()}

    def delta_chunks(self, name: str) -> Iterator[Chunk]:
        """The change in float32, chunk by chunk, each [rows, columns], on the grid of `row_chunks`."""
        for start, stop, base, delta in self._both(self._entry(name)):
            if not is_finite(delta):
                raise not_finite(name, self.source if is_finite(base) else self.base.source)
            yield Chunk(start, stop, delta)

    def edited_chunks(
        self, name: str, coefficient: float, *, A: Float[torch.Tensor, "rank d"] | None = None
    ) -> Iterator[Chunk]:
        """What `edited` assembles, chunk by chunk."""
        entry = self._entry(name)
        if coefficient == 1 and name in self.own:
            yield from self._own_chunks(entry)
            return
        memory: torch.Tensor | None = None
        for start, stop, base, delta in self._both(entry, A):
            # two roundings on purpose: a fused multiply-add depends on where in a vector register an element falls
            values = delta.mul_(coefficient).add_(base)
            if memory is None:
                memory = torch.empty(values.numel(), dtype=torch_dtype(entry.dtype))
            result = memory[: values.numel()].view_as(values).copy_(values)
            yield Chunk(start, stop, self._in_range(name, result, coefficient))

    def add(
        self, name: str, base: Shaped[torch.Tensor, "..."], delta: Float[torch.Tensor, "..."], coefficient: float
    ) -> Shaped[torch.Tensor, "..."]:
        """base + coefficient * delta, rounded once to the base's dtype."""
        return self._in_range(name, (delta * coefficient).add_(base.float()).to(base.dtype), coefficient)

    def _in_range(self, name: str, result: torch.Tensor, coefficient: float) -> torch.Tensor:
        if not is_finite(result):
            for _ in self.delta_chunks(name):  # raises if base or tuned is not finite
                pass
            raise CheckpointError(
                f"`{name}` leaves the range of `{self.base.entries[name].dtype}` at coefficient {coefficient}",
                hint="choose a smaller coefficient",
            )
        return result

    def _both(
        self, entry: Entry, A: torch.Tensor | None = None
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Base and change in float32, chunk by chunk, in memory that is used again."""
        assert A is None  # only an adapter has one
        other = self.store.entries[self.own[entry.name]]
        require_float(entry, other)
        largest = max(((stop - start) * entry.columns for start, stop in row_chunks(entry)), default=0)
        # memory from the kernel costs more than the arithmetic, so it is asked for once per tensor
        raw = torch.empty(8 * largest, dtype=torch.uint8)
        base_memory, delta_memory = torch.empty(largest), torch.empty(largest)
        for start, stop in row_chunks(entry):
            shape = (stop - start, entry.columns)
            size = math.prod(shape)
            base = base_memory[:size].view(shape).copy_(self.base.read_rows(entry.name, start, stop, buffer=raw))
            delta = delta_memory[:size].view(shape).copy_(self._own_rows(entry, start, stop, buffer=raw))
            yield start, stop, base, delta.sub_(base)

    def _own_chunks(self, entry: Entry) -> Iterator[Chunk]:
        """Tuned's own tensor in the base's dtype."""
        other = self.store.entries[self.own[entry.name]]
        if entry.dtype != other.dtype:
            require_float(entry, other)
        for start, stop in row_chunks(entry):
            rows = self._own_rows(entry, start, stop)
            if rows.is_floating_point() and not is_finite(rows):
                raise not_finite(entry.name, self.source)
            cast = rows.to(torch_dtype(entry.dtype))
            if cast is not rows and not is_finite(cast):
                raise CheckpointError(
                    f"`{entry.name}` of `{self.source}` has values that `{entry.dtype}` cannot hold",
                    hint="convert the base to a wider dtype first",
                )
            yield Chunk(start, stop, cast)

    def _own_rows(
        self, entry: Entry, start: int, stop: int, *, buffer: torch.Tensor | None = None
    ) -> Shaped[torch.Tensor, "rows columns"]:
        """Rows of tuned's own tensor; those that a smaller vocabulary lacks are the base's."""
        other = self.store.entries[self.own[entry.name]]
        own = self.store.read_rows(other.name, min(start, other.rows), min(stop, other.rows), buffer=buffer)
        if other.shape == entry.shape:
            return own
        rows = self.base.read_rows(entry.name, start, stop)
        rows = rows.to(torch.promote_types(rows.dtype, own.dtype))
        rows[: len(own), : own.shape[1]] = own
        return rows

    def _assemble(self, name: str, chunks: Iterator[Chunk], dtype: torch.dtype) -> torch.Tensor:
        entry = self._entry(name)
        out = torch.empty(entry.rows, entry.columns, dtype=dtype)
        for start, stop, rows in chunks:
            out[start:stop] = rows
        return out.reshape(entry.shape)

    def _entry(self, name: str) -> Entry:
        if name not in self._changed:
            self.base.entry(name)
            raise CheckpointError(f"`{self.source}` does not change `{name}`")
        return self.base.entries[name]

    @cached_property
    def _changed(self) -> frozenset[str]:
        return frozenset(self.names)


def is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite; a sum is fast and can only be wrong in the safe direction."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def bytes_finite(piece: memoryview, dtype: str) -> bool:
    """Whether a piece of a tensor of this stored dtype holds neither NaN nor infinity; True for what is no float."""
    bits, _, exponent = DTYPES[dtype]
    if not exponent or not piece:
        return True
    values = np.frombuffer(piece, dtype=f"u{bits // 8}")
    return bool((values & values.dtype.type(exponent)).max() < exponent)


def not_finite(name: str, source: str) -> CheckpointError:
    """The error that names a tensor holding NaN or infinity."""
    return CheckpointError(
        f"`{name}` of `{source}` holds NaN or infinity", hint="the training run diverged or the file is damaged"
    )


def require_float(*entries: Entry) -> None:
    """Raise unless differences of these tensors mean something."""
    for entry in entries:
        if entry.dtype not in ARITHMETIC:
            raise CheckpointError(
                f"`{entry.stored}` has dtype `{entry.dtype}`, whose difference means nothing",
                hint="use the unquantised checkpoints of base and tuned",
            )
