"""The change from a base to a full checkpoint of the same model, in whatever layout it was saved."""

from __future__ import annotations

from collections.abc import Iterator

from stethoscope.checkpoints.checkpoint import Checkpoint, Entry, config_value, torch_dtype
from stethoscope.checkpoints.hashing import hash_tensor
from stethoscope.checkpoints.task_vector import (
    Chunk,
    TaskVector,
    is_finite,
    not_finite,
    require_finite,
    require_float,
    row_chunks,
)
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch


class FullTaskVector(TaskVector):
    """Against a full checkpoint of the same model, in whatever layout.

    Attributes:
        matches: the base's canonical name -> tuned's; they differ only where heads are tied.
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base = base
        self.source = tuned.source
        self.store = tuned
        self.matches = match(base, tuned)
        self.names = tuple(self.matches)

    def delta_chunks(self, name: str) -> Iterator[Chunk]:
        for start, stop, base, delta in self._both(name):
            if not is_finite(delta):
                raise not_finite(name, self.source if is_finite(base) else self.base.source)
            yield Chunk(start, stop, delta)

    def edited_chunks(self, name: str, coefficient: float) -> Iterator[Chunk]:
        if coefficient == 1:
            yield from self.tuned_chunks(name)
            return
        entry = self._entry(name)
        memory: torch.Tensor | None = None
        for start, stop, base, delta in self._both(name):
            if memory is None:
                memory = torch.empty(delta.numel(), dtype=torch_dtype(entry.dtype))
            result = memory[: delta.numel()].view_as(delta).copy_(delta.mul_(coefficient).add_(base))
            if not is_finite(result):
                # the chunk's delta is gone: look at the inputs again to say whose fault it is
                for checkpoint, key in ((self.base, name), (self.store, self.matches[name])):
                    require_finite(checkpoint.read_rows(key, start, stop), name, checkpoint.source)
                raise self.out_of_range(name, coefficient)
            yield Chunk(start, stop, result)

    def _both(self, name: str) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Base and change in float32, chunk by chunk, in memory that is used again."""
        entry, other = self._pair(name)
        require_float(entry, other)
        largest = max(((stop - start) * entry.columns for start, stop in row_chunks(entry)), default=0)
        # memory from the kernel costs more than the arithmetic, so it is asked for once per tensor
        raw = torch.empty(8 * largest, dtype=torch.uint8)
        base_memory, delta_memory = torch.empty(largest), torch.empty(largest)
        for start, stop in row_chunks(entry):
            size = (stop - start) * entry.columns
            shape = (stop - start, entry.columns)
            base = base_memory[:size].view(shape).copy_(self.base.read_rows(name, start, stop, buffer=raw))
            delta = delta_memory[:size].view(shape).copy_(self.store.read_rows(other.name, start, stop, buffer=raw))
            yield start, stop, base, delta.sub_(base)

    def tuned_chunks(self, name: str) -> Iterator[Chunk]:
        entry, other = self._pair(name)
        wanted = torch_dtype(entry.dtype)
        if entry.dtype != other.dtype:
            require_float(entry, other)
        for start, stop in row_chunks(entry):
            rows = self.store.read_rows(other.name, start, stop)
            if rows.is_floating_point():
                require_finite(rows, name, self.source)
            cast = rows.to(wanted)
            if cast is not rows and not is_finite(cast):
                raise CheckpointError(
                    f"`{name}` of `{self.source}` has values that `{entry.dtype}` cannot hold",
                    hint="convert the base to a wider dtype first",
                )
            yield Chunk(start, stop, cast)

    def _pair(self, name: str) -> tuple[Entry, Entry]:
        return self._entry(name), self.store.entries[self.matches[name]]

    def raw(self, name: str) -> tuple[Checkpoint, Entry] | None:
        entry = self.store.entries[self.matches[name]]
        return (self.store, entry) if entry.dtype == self.base.entries[name].dtype else None


def match(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """The base's canonical names -> tuned's, for every tensor that both have.

    A vision tower may be missing on either side, and so may constants and a tied head's copy.
    """
    problems = _config_problems(base, tuned)
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


# Heads are cut out of matrices whose shapes do not show how: a difference here would pass every check of shapes.
HEADS = (("num_attention_heads", "n_head"), ("num_key_value_heads", "num_kv_heads"), ("head_dim",))


def _config_problems(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    problems = []
    for keys in HEADS:
        one, two = config_value(base.config, *keys), config_value(tuned.config, *keys)
        if one is not None and two is not None and one != two:
            problems.append(f"`{keys[0]}` is {one} in `{base.source}`, {two} in `{tuned.source}`")
    return problems


def _same_bytes(checkpoint: Checkpoint, one: str, two: str) -> bool:
    first, second = checkpoint.entries.get(one), checkpoint.entries.get(two)
    if first is None or second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return hash_tensor(checkpoint, first) == hash_tensor(checkpoint, second)
