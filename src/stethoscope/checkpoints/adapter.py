"""A PEFT adapter as a task vector: LoRA, rsLoRA, DoRA, biases, trained tokens and `modules_to_save`.

The change is scaling * B A, formed a chunk of rows at a time. The product is taken in float64 and rounded once to
float32, so that it does not depend on the BLAS or the number of threads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float

from stethoscope.checkpoints.checkpoint import Checkpoint, same_bytes
from stethoscope.checkpoints.files import read_json_object, refuse_pickle
from stethoscope.checkpoints.header import Entry, read_header
from stethoscope.checkpoints.names import ADAPTER_PREFIX, parse_name
from stethoscope.checkpoints.pair import fits, vocabulary_notes
from stethoscope.checkpoints.task_vector import TaskVector, is_finite, not_finite, require_float, row_chunks
from stethoscope.errors import CheckpointError
from stethoscope.lazy import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# what stands behind the module's name in an adapter's keys
PARTS: dict[tuple[str, ...], str] = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_embedding_A",): "A",
    ("lora_embedding_B",): "B",
    ("lora_magnitude_vector",): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
    ("lora_B", "bias"): "bias",
    ("token_adapter", "trainable_tokens_delta"): "tokens",
}
# options that change what the matrices mean, and are not reproduced here
REFUSED = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "target_parameters",
           "arrow_config", "kasa_config", "velora_config", "monteclora_config")  # fmt: skip
# initialisations that also change the base: the adapter alone does not say what was trained
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """A low-rank change: scaling * B A; transposed, where the module stores its weight as (in, out).

    Attributes:
        A, B: float32.
        magnitude: DoRA's; with it the change is not low-rank.
    """

    A: Float[torch.Tensor, "rank d_in"]
    B: Float[torch.Tensor, "d_out rank"]
    scaling: float
    magnitude: Float[torch.Tensor, " d_out"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an adapter does to one base tensor.

    Attributes:
        parts: "A", "B", "magnitude", "bias", "tokens" for rows that replace some of the base's, or "whole" for a tensor
            that replaces it -> the adapter's key.
        tokens: the numbers of those rows.
    """

    module: str
    parts: dict[str, str]
    tokens: tuple[int, ...] = ()
    transposed: bool = False
    scaling: float = 1.0


class AdapterTaskVector(TaskVector):
    """The change that merging a PEFT adapter would make.

    Attributes:
        path, config: the adapter's folder and adapter_config.json.
        changes: canonical name -> Change.
    """

    def __init__(self, base: Checkpoint, path: Path, *, source: str | None = None) -> None:
        self.path = path
        self.config = read_json_object(path / CONFIG, hint="a PEFT adapter has one")
        if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
            refuse_pickle(path, "adapter_model.bin")
        entries = {key: replace(entry, name=key) for key, entry in read_header(path / WEIGHTS).items()}
        # an adapter is a checkpoint with names of its own: the same reader serves; a snapshot's folder is its commit
        store = Checkpoint(
            path, {}, entries, source=source or path.resolve().name, revision=path.name if source else None
        )
        super().__init__(base, store, {})
        self.changes = self._match()
        rows = {name: count for name, count in self.rows.items() if not self.changes[name].tokens}
        self.notes += vocabulary_notes(base, self.source, rows)
        self.own = {name: change.parts["whole"] for name, change in self.changes.items() if "whole" in change.parts}
        self.names = tuple(name for name in base.entries if name in self.changes)

    def factors(self, name: str) -> LoraFactors | None:
        """The low-rank factors of a tensor's change; None where the adapter replaces the tensor or adds to a bias."""
        self._entry(name)
        change = self.changes[name]
        if "A" not in change.parts:
            return None
        read = {part: self.store.read(key).float() for part, key in change.parts.items()}
        if name in self.rows:
            side, count = "A" if change.transposed else "B", self.base.entries[name].shape[0]
            rows = (read[side].T if change.transposed else read[side])[:count]
            rows = torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))
            read[side] = rows.T if change.transposed else rows
        for part, values in read.items():
            if not is_finite(values):
                raise not_finite(f"{change.module}, {part}", self.source)
        return LoraFactors(
            A=read["A"],
            B=read["B"],
            scaling=change.scaling,
            magnitude=read["magnitude"].flatten() if "magnitude" in read else None,
        )

    def raw(self, name: str) -> None:
        """An adapter's tensors are always computed."""

    def energy(self, name: str) -> float:
        """|scaling B A|^2 = scaling^2 <B'B, AA'>, without forming the product."""
        factors = self.factors(name)
        if factors is None or factors.magnitude is not None:
            return super().energy(name)
        A, B = factors.A.double(), factors.B.double()
        return factors.scaling**2 * float(((B.T @ B) * (A @ A.T)).sum())

    def _both(
        self, entry: Entry, A: torch.Tensor | None = None
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        change = self.changes[entry.name]
        if "whole" in change.parts:
            yield from super()._both(entry)
            return
        require_float(entry)
        if "tokens" in change.parts:
            yield from self._tokens(entry, change)
            return
        factors = self.factors(entry.name)
        if factors is None:  # the bias of a LoRA layer
            bias = self.store.read(change.parts["bias"]).double().mul(change.scaling).float().reshape(1, -1)
            yield 0, 1, self.base.read_rows(entry.name, 0, 1).float(), bias
            return
        A, B = (factors.A if A is None else A).double(), factors.B.double()
        left, right = (A.T, B.T) if change.transposed else (B, A)

        def product(start: int, stop: int) -> Float[torch.Tensor, "rows columns"]:
            return (left[start:stop] @ right).mul_(change.scaling).float()

        scale = None  # DoRA: its magnitude over the norm of base + change, one per output
        if factors.magnitude is not None:
            squares = torch.zeros(len(B), dtype=torch.float64)
            for start, stop in row_chunks(entry):
                moved = self.base.read_rows(entry.name, start, stop).double() + product(start, stop)
                if change.transposed:
                    squares += moved.square().sum(0)
                else:
                    squares[start:stop] = moved.square().sum(1)
            scale = factors.magnitude.double() / squares.sqrt()
        for start, stop in row_chunks(entry):
            base, delta = self.base.read_rows(entry.name, start, stop).float(), product(start, stop)
            if scale is not None:
                by = scale[None, :] if change.transposed else scale[start:stop, None]
                delta = (by * (base.double() + delta)).float() - base
            yield start, stop, base, delta

    def _tokens(self, entry: Entry, change: Change) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        values, at = self.store.read(change.parts["tokens"]).float(), torch.tensor(change.tokens)
        for start, stop in row_chunks(entry):
            base = self.base.read_rows(entry.name, start, stop).float()
            delta, here = torch.zeros_like(base), (at >= start) & (at < stop)
            rows = at[here] - start
            delta[rows] = values[here] - base[rows]
            yield start, stop, base, delta

    def _match(self) -> dict[str, Change]:
        """Adapter keys -> base tensors; raises with every key that fits none."""
        problems = self._check_config()
        understood, entries = not problems, self.base.entries
        modules: dict[str, dict[str, str]] = {}
        for stored in self.store.entries:
            module, part = _split_key(stored)
            if part != "frozen":
                modules.setdefault(module, {})[part] = stored
        changes: dict[str, Change] = {}
        for module, parts in modules.items():
            whole = parts.get("whole")
            key = whole or parts.get("tokens") or parts.get("A")
            if key is None or not (whole or "tokens" in parts or "B" in parts):
                problems.append(f"`{module}` has {' and '.join(sorted(parts))} but not both of A and B")
                continue
            name = _tensor(module)
            entry = entries.get(name)
            if name in changes:
                problems.append(f"`{key}` and `{changes[name].module}` both change `{name}`")
            elif entry is None:
                if name != "lm_head.weight" or "A" in parts:
                    problems.append(f"`{key}` fits no tensor of `{self.base.source}`")
                elif not self._head_is_embedding(key):
                    self.notes += (f"`{key}` is left out: the head of `{self.base.source}` is its embedding",)
            elif whole:
                if name == "embed_tokens.weight" and self.base.tied and "lm_head" not in modules:
                    self.notes += (
                        f"`{key}` changes the head of `{self.base.source}`, too, which PEFT leaves as it was",
                    )
                if not fits(entry, shape := self.store.entries[whole].shape):
                    problems.append(f"`{whole}` is {list(shape)}, the base's `{entry.stored}` {list(entry.shape)}")
                else:
                    self._cut(entry, shape[0], whole)
                changes[name] = Change(module=module, parts=parts)
            elif "tokens" in parts:
                tokens = self._token_numbers(module)
                if (shape := self.store.entries[key].shape) != (len(tokens), *entry.shape[1:]):
                    problems.append(f"`{key}` is {list(shape)}, adapter_config.json names {len(tokens)} tokens")
                if tokens and max(tokens) >= (own := entry.shape[0]):
                    self.rows[name] = max(tokens) + 1
                    self.notes += (f"`{key}`: tokens from number {own} on, which the base lacks, are left out",)
                changes[name] = Change(module=module, parts=parts, tokens=tokens)
            elif understood:
                A, B = (self.store.entries[parts[part]].shape for part in "AB")
                embedding = any(".lora_embedding_" in key for key in parts.values())
                transposed = embedding or bool(self.config.get("fan_in_fan_out"))
                made = (B[0], A[-1])[:: -1 if transposed else 1] if len(A) == len(B) == 2 and B[1] == A[0] else None
                if made is None or not A[0] or not fits(entry, made):
                    product = f"B {list(B)} times A {list(A)}"
                    problems.append(f"`{module}`: {product} does not make the base's {list(entry.shape)}")
                    continue
                bias, scaling, dora = parts.pop("bias", None), self._scaling(module, A[0]), self.config.get("use_dora")
                if bool(dora) != ("magnitude" in parts):
                    problems.append(f"`{module}`: use_dora is {dora}, its magnitude vector says otherwise")
                if dora and made[0] < entry.shape[0]:
                    problems.append(f"`{module}`: DoRA of a vocabulary that is smaller than the base's")
                if dora and "magnitude" in parts and math.prod(self.store.entries[parts["magnitude"]].shape) != B[0]:
                    problems.append(f"`{module}`: its magnitude vector does not have {B[0]} values")
                ours = () if transposed else ("B", "magnitude")  # an embedding's rows are the columns of its A
                self._cut(entry, made[0], *(parts[part] for part in ours if part in parts))
                changes[name] = Change(module=module, parts=parts, transposed=transposed, scaling=scaling)
                if bias is not None:
                    name = parse_name(f"{module}.bias").canonical
                    if name not in entries or entries[name].shape != self.store.entries[bias].shape:
                        problems.append(f"`{bias}` adds a bias that `{self.base.source}` does not have in this shape")
                    changes[name] = Change(module=module, parts={"bias": bias}, scaling=scaling)
        if problems:
            raise CheckpointError(
                f"the adapter `{self.source}` does not fit `{self.base.source}`",
                problems=problems,
                hint="it was made for another model or with an option that is not supported; merge it with PEFT "
                "and pass the merged checkpoint",
            )
        return changes

    def _cut(self, entry: Entry, rows: int, *keys: str) -> None:
        """Leave of a larger vocabulary the base's rows, and note how many it has."""
        if rows != entry.shape[0]:
            self.rows[entry.name] = rows
            self.store.entries |= {key: self.store.entries[key].first_rows(entry.shape[0]) for key in keys}

    def _token_numbers(self, module: str) -> tuple[int, ...]:
        """The rows that were trained of a module: a list is the input embedding's."""
        given = self.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((rows for name, rows in given.items() if f".{module}".endswith(f".{name}")), ())
        return tuple(row for row in given or () if type(row) is int and row >= 0)

    def _check_config(self) -> list[str]:
        problems = []
        if self.config.get("peft_type") != "LORA":
            problems.append(f"its peft_type is `{self.config.get('peft_type')}`, only LORA is understood")
        problems += [f"it uses `{key}`" for key in REFUSED if self.config.get(key)]
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(MOVES_BASE):
            problems.append(f"its init_lora_weights `{start}` also changed the base")
        patterns = self.config.get("alpha_pattern") or {}
        alphas = {"lora_alpha": self.config.get("lora_alpha", 8)}
        alphas |= patterns if isinstance(patterns, dict) else {"alpha_pattern": [patterns]}
        return problems + [f"its alpha `{key}` is {value!r}" for key, value in alphas.items() if not _is_number(value)]

    def _scaling(self, module: str, rank: int) -> float:
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            # PEFT's own rule: a pattern is matched at the end of the module's name
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error:
                fits = None  # PEFT would have failed on it
            if fits:
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _head_is_embedding(self, head: str) -> bool:
        """Whether what stands for a head that the base does not have is what stands for its embedding."""
        split = {key: _split_key(key) for key in self.store}
        same = [key for key, (module, part) in split.items() if part == split[head][1] and key != head]
        return any(
            _tensor(split[key][0]) == "embed_tokens.weight" and same_bytes(self.store, key, head) for key in same
        )


def low_rank(task_vector: TaskVector, name: str) -> LoraFactors | None:
    """The factors of a plain LoRA change; None for DoRA, whose change is not low-rank, and for other task vectors."""
    factors = task_vector.factors(name) if isinstance(task_vector, AdapterTaskVector) else None
    return factors if factors is not None and factors.magnitude is None else None


def _split_key(key: str) -> tuple[str, str]:
    """An adapter key -> (module, part), or (tensor name, "whole") for a tensor that replaces the base's.

    The part "frozen" is PEFT's copy of what lies below an adapted module: of an embedding, it saves that, too.
    """
    parts = tuple(key.removeprefix(ADAPTER_PREFIX).split("."))
    for length in (2, 1):
        if parts[-length:] in PARTS:
            return ".".join(parts[:-length]), PARTS[parts[-length:]]
    if parts[-2:] == ("base_layer", "weight") or "original_module" in parts[-2:-1]:
        return ".".join(parts[:-2]), "frozen"
    if len(parts) >= 2 and parts[-2] in ("base_layer", "modules_to_save"):
        parts = (*parts[:-2], parts[-1])
    return ".".join(parts), "whole"


def _tensor(module: str) -> str:
    """The canonical name of the weight of a module, or of a tensor that is called by its own name."""
    return parse_name(module if module.endswith((".weight", ".bias")) else f"{module}.weight").canonical


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
