"""Commands on checkpoints alone: edit, take back, verify."""

import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from stethoscope.cli.console import AsJSON, ConsoleReporter, Quiet, command_line, conclude, warn
from stethoscope.cli.values import parse_layers
from stethoscope.errors import StethoscopeError

PatchFolder = Annotated[Path, typer.Argument(help="A patch that `edit --kind patch` wrote.")]


class Modules(StrEnum):
    """Which tensors of a layer an edit takes."""

    all = "all"
    attention = "attention"
    mlp = "mlp"


class OutputKind(StrEnum):
    """What an edit is written as."""

    checkpoint = "checkpoint"
    patch = "patch"
    adapter = "adapter"


def edit(
    base: Annotated[str, typer.Option(help="Base checkpoint: a folder or a hub id.")],
    tuned: Annotated[str, typer.Option(help="Fine-tuned checkpoint or PEFT adapter.")],
    layers: Annotated[str, typer.Option(help="Layers to edit, such as `3,5-8`, or `all`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    coefficient: Annotated[float, typer.Option(help="How much of the change; negative takes a skill away.")] = 1.0,
    modules: Annotated[Modules, typer.Option(help="Which tensors of those layers.")] = Modules.all,
    kind: Annotated[OutputKind, typer.Option(help="What to write.")] = OutputKind.checkpoint,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do, from headers alone.")] = False,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Put a fine-tune's raw weight change into some layers and write the result."""
    from dataclasses import asdict

    from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
    from stethoscope.editing.plan import EditPlan
    from stethoscope.editing.preview import check_edit
    from stethoscope.editing.writer import write_edit

    wanted = range(open_checkpoint(base).layers) if layers == "all" else parse_layers(layers)
    plan = EditPlan.for_layers(wanted, coefficient=coefficient, modules=modules.value)
    if dry_run:
        found = check_edit(base, tuned, plan, out, kind=kind.value)
        _caution(found.warnings, quiet=quiet)
        if as_json or not found.problems:
            conclude(
                asdict(found),
                as_json=as_json,
                says=[
                    f"would change {found.tensors} tensors of {len(found.layers)} layers"
                    f" ({found.bytes_changed / 1e6:,.1f} MB) and write {found.bytes_written / 1e6:,.1f} MB"
                    f" in about {found.seconds:.0f} s; {found.disk_needed / 1e9:.2f} GB of"
                    f" {found.disk_free / 1e9:.2f} GB free are needed"
                ],
            )
        if found.problems:
            raise StethoscopeError("the edit cannot be written", problems=found.problems, hint=found.hint)
        return
    opened = open_checkpoint(base)
    with ConsoleReporter(quiet=quiet).stage("Edit") as advance:
        made = write_edit(opened, open_task_vector(opened, tuned), plan, out, kind=kind.value, progress=advance)
    _caution(made.warnings, quiet=quiet)
    conclude(
        made.manifest,
        as_json=as_json,
        says=[f"{made.tensors} tensors of {len(made.layers)} layers changed"],
        wrote=[out],
        then=command_line("verify", out, *(["--base", base] if kind is OutputKind.checkpoint else [])),
    )


def _caution(warnings: Iterable[str], *, quiet: bool) -> None:
    for text in () if quiet else warnings:
        warn(f"warning: {text}")


def apply(
    patch: PatchFolder,
    base: Annotated[str, typer.Option(help="The checkpoint that the patch was made for.")],
    out: Annotated[Path, typer.Option(help="Folder to write the edited checkpoint to.")],
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Write the edited checkpoint that a patch and its base make."""
    _patched("apply", patch, base, out, quiet=quiet, as_json=as_json)


def undo(
    patch: PatchFolder,
    edited: Annotated[str, typer.Option(help="The edited checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write the base to.")],
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Write the base again from an edited checkpoint and its patch, bit for bit."""
    _patched("undo", patch, edited, out, quiet=quiet, as_json=as_json)


def _patched(
    direction: Literal["apply", "undo"], patch: Path, checkpoint: str, out: Path, *, quiet: bool, as_json: bool
) -> None:
    from stethoscope.editing.patch import apply_patch

    undo = direction == "undo"
    with ConsoleReporter(quiet=quiet).stage(f"{direction.capitalize()} the patch") as advance:
        path = apply_patch(patch, checkpoint, out, undo=undo, progress=advance)
    made = "The base, bit for bit" if undo else "The edited checkpoint"
    then = "" if undo else command_line("verify", out, "--base", checkpoint)
    said = f"{made}: every tensor was checked against its hash before it changed and after"
    conclude({"out": str(path)}, as_json=as_json, says=[said], wrote=[path], then=then)


def verify(
    edited: Annotated[Path, typer.Argument(help="A folder that `edit` or `run` wrote.")],
    base: Annotated[str | None, typer.Option(help="Compare untouched tensors with this base itself.")] = None,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Compare every tensor and file of an edit with its manifest."""
    from stethoscope.checkpoints.open import open_checkpoint
    from stethoscope.editing.verify import verify as verify_edit

    with ConsoleReporter(quiet=quiet).stage("Verify") as advance:
        found = verify_edit(edited, base=open_checkpoint(base) if base else None, progress=advance)
    value = {
        "ok": found.ok,
        "kind": found.kind,
        "tensors": found.tensors,
        "untouched": found.untouched,
        "problems": list(found.problems),
    }
    if as_json or found.ok:
        said = f"{found.tensors} tensors agree with the manifest, {found.untouched} of them are the base's"
        conclude(value, as_json=as_json, says=[said])
    if not found.ok:
        raise StethoscopeError(f"`{edited}` is not what its manifest says", problems=found.problems)


def push(
    edited: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run's folder, or one that `edit` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub; made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For a new repository; private otherwise.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Send an edit and its card to the hub, after comparing it with its manifest and asking."""
    from stethoscope.editing.manifest import known_files, read_manifest
    from stethoscope.editing.publish import publish
    from stethoscope.editing.verify import verify as verify_edit

    folder = edited / "edited" if (edited / "edited").is_dir() else edited
    paths = [folder / name for name in known_files(read_manifest(folder))]
    size = sum(path.stat().st_size for path in paths if path.exists())
    if not yes and not sys.stdin.isatty():
        raise StethoscopeError("nothing was sent: there is no terminal to ask on", hint="`--yes` sends without asking")
    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage("Verify") as advance:
        found = verify_edit(folder, progress=advance)
    if not found.ok:
        raise StethoscopeError(f"`{folder}` is not what its manifest says", problems=found.problems)
    kind = "public" if public else "private"
    asked = f"Send `{folder}` ({size / 1e6:,.1f} MB) to `{repository}`, a {kind} repository if it is new?"
    if not yes and not typer.confirm(asked, err=True):
        warn("nothing was sent")
        return
    with reporter.stage("Send"):
        address = publish(folder, repository, private=not public)
    conclude({"commit": address}, as_json=as_json, says=[f"sent to {address}"])
