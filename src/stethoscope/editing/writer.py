"""An edit on disk: the whole checkpoint, a patch, or an adapter of the selected layers.

    write_edit(base, task_vector, EditPlan.for_layers([3, 4]), Path("edited"))

The output has the base's layout, so every byte's place is known before the first is written: tensors that the plan
leaves alone are the base's bytes, tensors at coefficient 1 are tuned's, and only the rest is computed. The folder
appears complete or not at all, and two runs give the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from stethoscope.artifacts import write_json
from stethoscope.checkpoints.adapter import CONFIG, WEIGHTS, AdapterTaskVector
from stethoscope.checkpoints.checkpoint import Checkpoint, hash_tensor
from stethoscope.checkpoints.header import DTYPES, Entry, build_header
from stethoscope.checkpoints.task_vector import TaskVector, bytes_finite, is_finite, not_finite
from stethoscope.editing.apply import edited_tensor
from stethoscope.editing.manifest import copy_side_files, describe_edit, describe_tensor, write_generated
from stethoscope.editing.patch import PATCH, exclusive_or
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.preview import preview
from stethoscope.editing.transfer import (
    Output,
    Progress,
    copy_tensor,
    in_parallel,
    output_folder,
    rewrite,
    send,
    tensor_bytes,
)
from stethoscope.errors import CheckpointError

OutputKind = Literal["checkpoint", "patch", "adapter"]
Record = dict[str, Any]
# A transform needs a tensor's whole change in float32: one at a time, whatever the number of threads.
_whole_tensor = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit on disk.

    Attributes:
        path: its folder.
        manifest: what manifest.json says.
        layers, tensors: the layers it changed, and how many tensors.
        bytes_written: bytes of weights written; 0 for what a reflink shares.
        bytes_read: bytes of weights read.
        warnings: what may not have been meant.
    """

    path: Path
    kind: OutputKind
    manifest: dict[str, Any]
    layers: tuple[int, ...]
    tensors: int
    bytes_written: int
    bytes_read: int
    warnings: tuple[str, ...] = ()


def write_edit(
    base: Checkpoint,
    task_vector: TaskVector,
    plan: EditPlan,
    out: Path,
    *,
    kind: OutputKind = "checkpoint",
    overwrite: bool = False,
    sync: bool = True,
    progress: Progress | None = None,
) -> Edit:
    """Write an edit, whole or not at all.

    Args:
        kind: "checkpoint" is a model that Transformers loads; "patch" holds the selected tensors only and turns the
            base into the edit and back; "adapter" is tuned's adapter restricted to the plan, for PEFT and vLLM.
        overwrite: replace ``out`` if it exists.
        sync: wait until everything is on the disk itself before ``out`` appears. Without it an edit survives the
            death of the process but, as after `cp`, not a power failure seconds later.
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: with every problem that the headers show, before anything is written; or the disk fills,
            or a tensor holds NaN or infinity. ``out`` does not exist then.
    """
    expected = preview(base, task_vector, plan, out, kind=kind, overwrite=overwrite)
    if expected.problems:
        raise CheckpointError("the edit cannot be written", problems=expected.problems, hint=expected.hint)
    writer = _Writer(task_vector, plan, progress)
    with output_folder(out, overwrite=overwrite, sync=sync) as folder:
        write = {"checkpoint": writer.checkpoint, "patch": writer.patch, "adapter": writer.adapter}[kind]
        tensors, written, read = write(folder)
        manifest = describe_edit(kind, task_vector, plan, writer.chosen, tensors)
        if kind == "checkpoint":
            copy_side_files(base.path, folder)
        write_generated(manifest, base.config, folder)
    return Edit(
        path=out,
        kind=kind,
        manifest=manifest,
        layers=tuple(manifest["layers"]),
        tensors=len(writer.chosen),
        bytes_written=written,
        bytes_read=read,
        warnings=expected.warnings,
    )


class _Writer:
    """The three kinds of output. Each returns a record per tensor by stored name, and bytes written and read."""

    def __init__(self, task_vector: TaskVector, plan: EditPlan, progress: Progress | None) -> None:
        self.base, self.task_vector, self.plan = task_vector.base, task_vector, plan
        self.chosen = coefficients(task_vector, plan)
        # else PyTorch is not even imported
        computes = any(c != 1 or task_vector.raw(name) is None for name, c in self.chosen.items())
        self.threads: dict[str, Any] = {"progress": progress, "arithmetic": plan.transform is not None or computes}

    def checkpoint(self, folder: Path) -> tuple[dict[str, Record], int, int]:
        """The base's files with the selected tensors changed."""
        shared: list[int] = []

        def fill(entry: Entry, output: Output) -> Record:
            if entry.name not in self.chosen:
                shared.append(entry.nbytes if output.shared else 0)
                return copy_tensor(self.base, entry, output)
            origin, pieces = self._new_pieces(entry)
            digest = send(pieces, output, entry.start)
            record = {"from": origin, "coefficient": self.chosen[entry.name], "hash": digest}
            if origin == "computed":
                # read again while its pages are still in memory
                record["base_hash"] = hash_tensor(self.base, entry)
                if raw := self.task_vector.raw(entry.name):
                    record["tuned_hash"] = hash_tensor(*raw)
            return describe_tensor(entry, record)

        tensors = rewrite(self.base, folder, fill, **self.threads)
        entries = self.base.entries.values()
        twice = sum(entry.nbytes for entry in entries if tensors[entry.stored]["from"] == "computed")
        return tensors, self.base.nbytes - sum(shared), self.base.nbytes + twice

    def patch(self, folder: Path) -> tuple[dict[str, Record], int, int]:
        """Base XOR edited, tensor by tensor: it turns either into the other, and is as large as what it changes."""
        entries = [self.base.entries[name] for name in self.chosen]
        header = build_header({entry.stored: (f"U{DTYPES[entry.dtype].bits}", entry.shape) for entry in entries})
        jobs: list[tuple[int, Callable[[], Record]]] = []
        offset = len(header)
        size = len(header) + sum(entry.nbytes for entry in entries)
        with closing(Output(folder / PATCH, size, header)) as output:
            for entry in entries:
                jobs.append((entry.nbytes, partial(self._difference, entry, output, offset)))
                offset += entry.nbytes
            records = in_parallel(jobs, **self.threads)
        tensors = {entry.stored: record for entry, record in zip(entries, records, strict=True)}
        return tensors, size, 2 * (size - len(header))

    def adapter(self, folder: Path) -> tuple[dict[str, Record], int, int]:
        """Tuned's adapter with the selected modules only; a coefficient is multiplied into B."""
        adapter = self.task_vector
        assert isinstance(adapter, AdapterTaskVector)
        scaled: dict[str, float] = {}  # adapter key -> factor
        replaced: dict[str, Any] = {}  # adapter key -> the filter's A
        for name, coefficient in self.chosen.items():
            parts = adapter.changes[name].parts
            for part, key in parts.items():
                scaled[key] = coefficient if part in ("B", "bias") else 1.0
            if self.plan.transform is not None and (A := self.plan.transform.low_rank(name)) is not None:
                replaced[parts["A"]] = A
        entries = {key: adapter.store.entries[key] for key in sorted(scaled)}
        header = build_header({key: (entry.dtype, entry.shape) for key, entry in entries.items()})
        records: dict[str, Record] = {}
        offset = len(header)
        size = len(header) + sum(entry.nbytes for entry in entries.values())
        with closing(Output(folder / WEIGHTS, size, header)) as output:
            for key, entry in entries.items():
                origin, pieces = "tuned", _checked(adapter.store, entry)
                if scaled[key] != 1 or key in replaced:
                    tensor = adapter.store.read(key)
                    changed = (replaced.get(key, tensor).float() * scaled[key]).to(tensor.dtype)
                    if not is_finite(changed):
                        raise CheckpointError(
                            f"`{key}` of `{adapter.source}` holds NaN or infinity, or would in `{entry.dtype}`",
                            hint="choose a smaller coefficient, unless the training run diverged",
                        )
                    origin, pieces = "computed", iter([tensor_bytes(changed)])
                records[key] = describe_tensor(entry, {"from": origin, "hash": send(pieces, output, offset)})
                offset += entry.nbytes
        write_json(folder / CONFIG, _restricted_config(adapter, self.chosen))
        return records, size, size - len(header)

    def _new_pieces(self, entry: Entry) -> tuple[str, Iterator[memoryview]]:
        """Where a selected tensor's new bytes come from ("tuned" or "computed"), and the bytes."""
        coefficient, raw = self.chosen[entry.name], self.task_vector.raw(entry.name)
        A = self.plan.transform.low_rank(entry.name) if self.plan.transform else None
        if self.plan.transform is not None and A is None:
            return "computed", self._transformed(entry.name)
        if coefficient == 1 and raw is not None:
            return "tuned", _checked(*raw)
        chunks = self.task_vector.edited_chunks(entry.name, coefficient, A=A)
        return "computed", (tensor_bytes(chunk.rows) for chunk in chunks)

    def _transformed(self, name: str) -> Iterator[memoryview]:
        with _whole_tensor:
            made = tensor_bytes(edited_tensor(self.task_vector, self.plan, name))
        yield made  # without the lock: a write may fail here, and nobody would give it back

    def _difference(self, entry: Entry, output: Output, offset: int) -> Record:
        """Put one tensor of a patch in its place; return its record."""
        before, after = blake3(), blake3()
        origin, pieces = self._new_pieces(entry)
        digest = send(exclusive_or(self.base, entry, pieces, before, after), output, offset)
        record = {"from": origin, "coefficient": self.chosen[entry.name], "base_hash": before.hexdigest()}
        record |= {"edited_hash": after.hexdigest(), "hash": digest}
        return describe_tensor(entry, record, file=PATCH)


def _checked(checkpoint: Checkpoint, entry: Entry) -> Iterator[memoryview]:
    """A tensor's pieces, after a look at each for NaN and infinity."""
    for piece in checkpoint.pieces(entry):
        if not bytes_finite(piece, entry.dtype):
            raise not_finite(entry.name, checkpoint.source)
        yield piece


def _restricted_config(adapter: AdapterTaskVector, chosen: dict[str, float]) -> dict[str, Any]:
    """adapter_config.json for the chosen tensors: each module by its full name, so that no other is created."""
    changes = [adapter.changes[name] for name in chosen]
    whole = {change.module.rsplit(".", 2)[-2] for change in changes if "whole" in change.parts}
    saved = [name for name in adapter.config.get("modules_to_save") or [] if name.rsplit(".", 1)[-1] in whole]
    return adapter.config | {
        "target_modules": sorted({change.module for change in changes if "A" in change.parts}),
        "modules_to_save": saved or None,
        "trainable_token_indices": {c.module: list(c.tokens) for c in changes if c.tokens} or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }
