"""An edit on disk: the whole checkpoint, a patch, or an adapter of the selected layers.

    write_edit(base, task_vector, EditPlan.for_layers([3, 4]), Path("edited"))

The output has the base's layout, so every byte's place is known before the first is written: tensors that the plan
leaves alone are the base's bytes, tensors at coefficient 1 are tuned's, and only the rest is computed. The folder
appears complete or not at all, and two runs give the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stethoscope.artifacts import write_json
from stethoscope.checkpoints.adapter import CONFIG, WEIGHTS, AdapterTaskVector
from stethoscope.checkpoints.checkpoint import Checkpoint, Entry
from stethoscope.checkpoints.hashing import hash_tensor, new_digest
from stethoscope.checkpoints.header import DTYPE_BITS, build_header
from stethoscope.checkpoints.task_vector import TaskVector, bytes_finite, not_finite
from stethoscope.editing.apply import edited_tensor
from stethoscope.editing.manifest import copy_side_files, describe_edit, write_generated
from stethoscope.editing.patch import PATCH, exclusive_or
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.editing.preview import preview
from stethoscope.editing.transfer import (
    Output,
    Progress,
    copy_tensor,
    in_parallel,
    output_file,
    output_folder,
    rewrite,
    send,
    stored_pieces,
    tensor_bytes,
)
from stethoscope.errors import CheckpointError

OutputKind = Literal["checkpoint", "patch", "adapter"]
INTEGERS = {8: "U8", 16: "U16", 32: "U32", 64: "U64"}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit on disk.

    Attributes:
        path: its folder.
        manifest: what manifest.json says.
        layers: the layers it changed.
        tensors: how many tensors it changed.
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
    writers: dict[str, Callable[..., _Written]] = {
        "checkpoint": _write_checkpoint, "patch": _write_patch, "adapter": _write_adapter,
    }  # fmt: skip
    chosen = coefficients(task_vector, plan)
    with output_folder(out, overwrite=overwrite, sync=sync) as folder:
        written = writers[kind](base, task_vector, plan, chosen, folder, progress=progress)
        manifest = describe_edit(kind, base, task_vector, plan, chosen, written.tensors)
        if kind == "checkpoint":
            copy_side_files(base.path, folder)
        write_generated(manifest, base.config, folder)
    return Edit(
        path=out,
        kind=kind,
        manifest=manifest,
        layers=tuple(manifest["layers"]),
        tensors=len(chosen),
        bytes_written=written.bytes_written,
        bytes_read=written.bytes_read,
        warnings=expected.warnings,
    )


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What a writer did: a record per tensor by stored name, bytes written and read."""

    tensors: dict[str, dict[str, Any]]
    bytes_written: int
    bytes_read: int


def _write_checkpoint(
    base: Checkpoint,
    task_vector: TaskVector,
    plan: EditPlan,
    chosen: dict[str, float],
    folder: Path,
    *,
    progress: Progress | None,
) -> _Written:
    lock = threading.Lock()
    written = read = 0

    def fill(entry: Entry, output: Output, shared: bool) -> dict[str, Any]:
        nonlocal written, read
        digest = new_digest()
        record: dict[str, Any] = {"file": entry.file, "dtype": entry.dtype, "shape": list(entry.shape)}
        if entry.name in chosen:
            origin, pieces = _new_pieces(task_vector, plan, entry, chosen[entry.name])
            send(pieces, digest, output, entry.start)
            record |= {"from": origin, "coefficient": chosen[entry.name], "hash": digest.hexdigest()}
            if origin == "computed":
                # read again while its pages are still in memory
                record["base_hash"] = hash_tensor(base, entry)
                if raw := task_vector.raw(entry.name):
                    record["tuned_hash"] = hash_tensor(*raw)
        else:
            copy_tensor(base, entry, digest, output, shared=shared)
            record |= {"from": "base", "hash": digest.hexdigest()}
        with lock:
            written += 0 if shared and record["from"] == "base" else entry.nbytes
            read += entry.nbytes * (2 if record["from"] == "computed" else 1)
        return record

    tensors = rewrite(base, folder, fill, progress=progress, arithmetic=_computes(task_vector, plan, chosen))
    return _Written(tensors=tensors, bytes_written=written, bytes_read=read)


def _computes(task_vector: TaskVector, plan: EditPlan, chosen: Mapping[str, float]) -> bool:
    """Whether any tensor needs arithmetic; else PyTorch is not even imported."""
    return plan.transform is not None or any(c != 1 or task_vector.raw(name) is None for name, c in chosen.items())


def _new_pieces(
    task_vector: TaskVector, plan: EditPlan, entry: Entry, coefficient: float
) -> tuple[str, Iterator[memoryview]]:
    """Where a selected tensor's new bytes come from ("tuned" or "computed"), and the bytes."""
    if plan.transform is not None:
        return "computed", _transformed(task_vector, plan, entry.name)
    raw = task_vector.raw(entry.name)
    if coefficient == 1 and raw is not None:
        return "tuned", _checked(stored_pieces(*raw), raw[1], task_vector.source)
    chunks = task_vector.edited_chunks(entry.name, coefficient)
    return "computed", (tensor_bytes(rows) for _, _, rows in chunks)


# A transform needs a tensor's whole change in float32: one at a time, whatever the number of threads.
_whole_tensor = threading.Lock()


def _transformed(task_vector: TaskVector, plan: EditPlan, name: str) -> Iterator[memoryview]:
    with _whole_tensor:
        yield tensor_bytes(edited_tensor(task_vector, plan, name))


def _checked(pieces: Iterator[memoryview], entry: Entry, source: str) -> Iterator[memoryview]:
    """The same pieces, after a look at each for NaN and infinity."""
    for piece in pieces:
        if not bytes_finite(piece, entry.dtype):
            raise not_finite(entry.name, source)
        yield piece


def _write_patch(
    base: Checkpoint,
    task_vector: TaskVector,
    plan: EditPlan,
    chosen: dict[str, float],
    folder: Path,
    *,
    progress: Progress | None,
) -> _Written:
    """Base XOR edited, tensor by tensor: it turns either into the other, and is as large as what it changes."""
    entries = [base.entries[name] for name in chosen]
    header = build_header({entry.stored: (INTEGERS[DTYPE_BITS[entry.dtype]], entry.shape) for entry in entries})
    jobs: list[tuple[int, Callable[[], dict[str, Any]]]] = []
    offset = len(header)
    with output_file(folder / PATCH, header, sum(entry.nbytes for entry in entries)) as output:
        for entry in entries:
            jobs.append((entry.nbytes, partial(_difference, entry, task_vector, plan, chosen, output, offset)))
            offset += entry.nbytes
        records = in_parallel(jobs, progress=progress, arithmetic=_computes(task_vector, plan, chosen))
    tensors = {entry.stored: record for entry, record in zip(entries, records, strict=True)}
    return _Written(tensors=tensors, bytes_written=offset, bytes_read=2 * (offset - len(header)))


def _difference(
    entry: Entry, task_vector: TaskVector, plan: EditPlan, chosen: dict[str, float], output: Output, offset: int
) -> dict[str, Any]:
    """Put one tensor of a patch in its place; return its record for the manifest."""
    before, after, digest = new_digest(), new_digest(), new_digest()
    origin, pieces = _new_pieces(task_vector, plan, entry, chosen[entry.name])
    send(exclusive_or(task_vector.base, entry, pieces, before, after), digest, output, offset)
    return {
        "file": PATCH, "dtype": entry.dtype, "shape": list(entry.shape), "from": origin,
        "coefficient": chosen[entry.name], "base_hash": before.hexdigest(), "edited_hash": after.hexdigest(),
        "hash": digest.hexdigest(),
    }  # fmt: skip


def _write_adapter(
    base: Checkpoint,
    task_vector: TaskVector,
    plan: EditPlan,
    chosen: dict[str, float],
    folder: Path,
    *,
    progress: Progress | None,
) -> _Written:
    """Tuned's adapter with the selected modules only; a coefficient is multiplied into B."""
    assert isinstance(task_vector, AdapterTaskVector)
    scaled: dict[str, float] = {}  # adapter key -> factor
    for name, coefficient in chosen.items():
        change = task_vector.changes[name]
        keys = {"whole": change.replaced_by} if change.replaced_by else change.parts
        scaled |= {key: coefficient if part in ("B", "bias") else 1.0 for part, key in keys.items() if key}
    slots = {key: task_vector.slots[key] for key in sorted(scaled)}
    header = build_header({key: (slot.dtype, slot.shape) for key, slot in slots.items()})
    records: dict[str, dict[str, Any]] = {}
    offset = len(header)
    with output_file(folder / WEIGHTS, header, sum(slot.nbytes for slot in slots.values())) as output:
        for key, slot in slots.items():
            digest, entry = new_digest(), task_vector.store.entries[key]
            pieces = _checked(stored_pieces(task_vector.store, entry), entry, task_vector.source)
            if scaled[key] != 1:
                tensor = task_vector.store.read(key)
                pieces = iter([tensor_bytes((tensor.float() * scaled[key]).to(tensor.dtype))])
            send(pieces, digest, output, offset)
            records[key] = {
                "file": WEIGHTS, "dtype": slot.dtype, "shape": list(slot.shape),
                "from": "tuned" if scaled[key] == 1 else "computed", "hash": digest.hexdigest(),
            }  # fmt: skip
            offset += slot.nbytes
    write_json(folder / CONFIG, restricted_config(task_vector, chosen))
    return _Written(tensors=records, bytes_written=offset, bytes_read=offset - len(header))


def restricted_config(task_vector: AdapterTaskVector, chosen: Mapping[str, float]) -> dict[str, Any]:
    """adapter_config.json for the chosen tensors: each module by its full name, so that no other is created."""
    changes = [task_vector.changes[name] for name in chosen]
    whole = {change.module.rsplit(".", 2)[-2] for change in changes if change.replaced_by}
    saved = [name for name in task_vector.config.get("modules_to_save") or [] if name.rsplit(".", 1)[-1] in whole]
    return task_vector.config | {
        "target_modules": sorted({change.module for change in changes if "A" in change.parts}),
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }
