"""An edit on disk."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stethoscope.artifacts import new_folder, sha256_bytes, write_json
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.apply import edited_tensor
from stethoscope.editing.plan import EditPlan

OutputKind = Literal["checkpoint", "patch", "adapter"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit on disk: its folder, its manifest, the layers it changed and the bytes written."""

    path: Path
    kind: OutputKind
    manifest: dict[str, Any]
    layers: tuple[int, ...]
    bytes_written: int


def write_edit(
    base: Checkpoint, task_vector: TaskVector, plan: EditPlan, out: Path, *,
    kind: OutputKind = "checkpoint", overwrite: bool = False, progress: Progress | None = None,
) -> Edit:  # fmt: skip
    """Write an edit whole or not at all."""
    if kind != "checkpoint":
        raise NotImplementedError(kind)
    selected = [n for n in task_vector.names if plan.coefficient(n)]
    tensors = {}
    written = 0
    with new_folder(out, overwrite=overwrite) as folder:
        for path in base.path.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        for name in selected:
            entry = base.entries[name]
            data = edited_tensor(task_vector, plan, name).contiguous().flatten().view(torch.uint8).numpy().tobytes()
            with (folder / entry.file).open("r+b") as file:
                file.seek(entry.start)
                file.write(data)
            written += len(data)
            tensors[entry.stored] = sha256_bytes(data)
        manifest = {"schema": "stethoscope.edit/1", "kind": kind, "plan": plan.to_json(), "tensors": tensors}
        write_json(folder / "manifest.json", manifest)
    layers = tuple(sorted({x for n in selected if (x := base.entries[n].layer) is not None}))
    return Edit(path=out, kind=kind, manifest=manifest, layers=layers, bytes_written=written)
