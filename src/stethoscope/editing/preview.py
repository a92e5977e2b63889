"""What an edit will do, from configs and headers alone: tensors, bytes, disk, time, and all that is wrong.

preview(base, task_vector, plan, Path("edited")).problems      # of opened checkpoints
check_edit("base", "tuned", plan, Path("edited")).problems     # opens them too, and keeps going
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from stethoscope.checkpoints.adapter import AdapterTaskVector
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import ARITHMETIC, TaskVector
from stethoscope.editing.manifest import MANIFEST, read_manifest
from stethoscope.editing.plan import EditPlan, coefficients
from stethoscope.errors import CheckpointError

# bytes per second on two cores and a disk that keeps up; a prediction, not a promise
COPY_RATE, ARITHMETIC_RATE = 1.2e9, 0.5e9
SMALL_FILES = 64 << 20  # what tokenizer, config, manifest and card may need


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What an edit will do.

    Attributes:
        layers, tensors: what it changes.
        bytes_changed: bytes of the tensors it changes.
        bytes_read, bytes_written: of weights, where no reflink saves them.
        disk_needed, disk_free: bytes, where the output will lie.
        seconds: predicted wall time.
        problems: everything that stands in the way, one line each.
        warnings: what does not, and may not be meant.
    """

    layers: tuple[int, ...] = ()
    tensors: int = 0
    bytes_changed: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    disk_needed: int = 0
    disk_free: int = 0
    seconds: float = 0.0
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    hint: str | None = None


def preview(
    base: Checkpoint,
    task_vector: TaskVector,
    plan: EditPlan,
    out: Path,
    *,
    kind: str = "checkpoint",
    overwrite: bool = False,
    resumes: bool = False,
) -> Preview:
    """What `write_edit` with the same arguments will do; reads no weights and writes nothing.

    Args:
        resumes: what ``out`` holds may be this edit already, so that a disk with no room for another is a warning.
    """
    chosen = coefficients(task_vector, plan)
    entries = {name: base.entries[name] for name in chosen}
    whole = {n for n, c in chosen.items() if c == 1 and plan.transform is None and task_vector.raw(n)}
    changed = sum(entry.nbytes for entry in entries.values())
    copied = sum(entries[name].nbytes for name in whole)
    store = task_vector.store.nbytes
    written = {"checkpoint": base.nbytes, "patch": changed}.get(kind, store)
    read = {"checkpoint": base.nbytes + changed - copied, "patch": 2 * changed}.get(kind, store)
    layers = tuple(sorted({entry.layer for entry in entries.values() if entry.layer is not None}))
    problems = [
        f"the plan names layer {layer}, `{base.source}` has layers 0 to {base.layers - 1}"
        for layer in plan.selected_layers
        if layer >= base.layers
    ]
    if kind not in ("checkpoint", "patch", "adapter"):
        problems.append(f"there is no output `{kind}`: choose checkpoint, patch or adapter")
    if kind == "patch" and not chosen:
        problems.append("the plan changes nothing, so there is nothing to patch")
    problems += [
        f"`{entry.stored}` is {entry.dtype}: its change can be copied whole, not scaled"
        for name, entry in entries.items()
        if name not in whole and entry.dtype not in ARITHMETIC
    ]
    problems += [
        f"the plan asks for `{base.entries[name].stored}`, of which tuned has {rows} rows: an edit has the base's"
        " vocabulary. Give the base tuned's first: `stethoscope extend-vocabulary`"
        for name, rows in task_vector.rows.items()
        if plan.outside.get(base.entries[name].kind)
    ]
    if kind == "adapter":
        problems += _adapter_problems(task_vector, plan, chosen)
    problems += output_problems(out, base.path, task_vector.store.path, overwrite=overwrite)
    needed, free = written + SMALL_FILES, _disk_free(out)
    warnings = (*task_vector.notes, *_code(base), *_taken_back(task_vector, layers))
    if needed > free:
        full = f"`{out}` needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        if resumes and out.exists():
            warnings = (*warnings, f"{full}: enough only if the edit there is this one")
        else:
            problems.append(full)
    return Preview(
        layers=layers,
        tensors=len(chosen),
        bytes_changed=changed,
        bytes_read=read,
        bytes_written=written,
        disk_needed=needed,
        disk_free=free,
        seconds=round(1.0 + written / COPY_RATE + (changed - copied) / ARITHMETIC_RATE, 1),
        problems=tuple(problems),
        warnings=warnings,
        hint="nothing has been written" if problems else None,
    )


def check_edit(base: str | Path, tuned: str | Path, plan: EditPlan, out: Path, *, kind: str = "checkpoint") -> Preview:
    """The same from names: what keeps base or tuned from being opened is among the problems, not raised."""
    problems: list[str] = []
    opened: Checkpoint | None = None
    change: TaskVector | None = None
    try:
        opened = open_checkpoint(base, headers_only=True)
    except CheckpointError as error:
        problems += _lines(error)
    try:
        if opened is not None:
            change = open_task_vector(opened, tuned, headers_only=True)
        elif not (Path(tuned) / "adapter_config.json").is_file():
            open_checkpoint(tuned, headers_only=True)
    except CheckpointError as error:
        problems += _lines(error)
    if opened is None or change is None:
        problems += output_problems(out, Path(base), Path(tuned))
        return Preview(problems=tuple(problems), disk_free=_disk_free(out))
    found = preview(opened, change, plan, out, kind=kind)
    return replace(found, problems=(*problems, *found.problems))


def output_problems(out: Path, *inputs: Path, overwrite: bool = False) -> list[str]:
    """Why a folder cannot be written, inputs considered."""
    place = out.resolve()
    problems = []
    for source in inputs:
        if source.exists() and place.is_relative_to(source.resolve()):
            problems.append(f"the output `{out}` lies in the input `{source}`")
        elif source.exists() and source.resolve().is_relative_to(place):
            problems.append(f"the input `{source}` lies in the output `{out}`")
    if place.exists() and not overwrite and not problems:
        problems.append(f"the output `{out}` exists")
    parent = _nearest(place)
    if not parent.is_dir():
        problems.append(f"`{parent}` is a file, so `{out}` cannot be made")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"`{parent}` cannot be written to")
    return problems


def _adapter_problems(task_vector: TaskVector, plan: EditPlan, chosen: dict[str, float]) -> list[str]:
    if not isinstance(task_vector, AdapterTaskVector):
        return [f"`{task_vector.source}` is not an adapter, so no adapter can be made of it"]
    transform = plan.transform
    problems = [
        f"the change of `{name}` is of another rank after the transform, or of none"
        for name in (chosen if transform else ())
        if transform and transform.low_rank(name) is None
    ]
    if not chosen:
        problems.append("the plan changes nothing that the adapter has")
    problems += [
        f"`{name}` of the adapter has another vocabulary's rows: edit layers, or write a checkpoint"
        for name in chosen
        if name in task_vector.rows
    ]
    return problems + [
        f"`{name}` cannot be scaled by {coefficient} in an adapter"
        for name, coefficient in chosen.items()
        if coefficient != 1 and task_vector.changes[name].parts.keys() & {"whole", "magnitude", "tokens"}
    ]


def _code(base: Checkpoint) -> tuple[str, ...]:
    names = ", ".join(f"`{path.name}`" for path in sorted(base.path.glob("*.py")))
    return (f"code of `{base.source}` is not copied into an edit: {names}",) if names else ()


def _taken_back(task_vector: TaskVector, layers: tuple[int, ...]) -> tuple[str, ...]:
    """A full checkpoint less an edited base holds the opposite of that edit; an adapter does not."""
    base = task_vector.base
    if isinstance(task_vector, AdapterTaskVector) or not (base.path / MANIFEST).is_file():
        return ()
    try:
        shared = sorted({*read_manifest(base.path)["layers"]} & set(layers))
    except CheckpointError:  # another program's file of that name
        return ()
    if not shared:
        return ()
    return (
        f"`{base.source}` is an edit itself: unless `{task_vector.source}` was trained from it, the change from it"
        f" takes that edit back in layers {', '.join(map(str, shared))}; an adapter's would not",
    )


def _lines(error: CheckpointError) -> list[str]:
    return [f"{error.message}: {problem}" for problem in error.problems] or [error.message]


def _nearest(path: Path) -> Path:
    """The nearest ancestor that exists."""
    return next(parent for parent in (*path.parents, path) if parent.exists())


def _disk_free(out: Path) -> int:
    return shutil.disk_usage(_nearest(out.resolve())).free
