"""Commands on models alone: edit, apply, undo, verify, push, train-saes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stethoscope.cli.console import ConsoleReporter, command_line, conclude, warn
from stethoscope.cli.options import AsJSON, Device, Layers, Quiet, Seed, labelled, parse_layers
from stethoscope.display import listed
from stethoscope.errors import StethoscopeError

if TYPE_CHECKING:
    from stethoscope.editing.plan import EditPlan
    from stethoscope.keep import Wanted

Kind = Literal["checkpoint", "patch", "adapter"]
PatchFolder = Annotated[Path, typer.Argument(help="A patch that `edit --kind patch` wrote.")]


def edit(
    base: Annotated[str, typer.Option(help="Base checkpoint: a folder or a hub id.")],
    tuned: Annotated[str, typer.Option(help="Fine-tuned checkpoint or PEFT adapter.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    layers: Annotated[
        str, typer.Option(help="Layers, such as `3,5-8`, or `all`; everything if `--keep` is given.")
    ] = "",
    coefficient: Annotated[float, typer.Option(help="Factor of the change; negative removes a skill.")] = 1.0,
    modules: Annotated[Literal["all", "attention", "mlp"], typer.Option(help="Tensors to edit.")] = "all",
    kind: Annotated[Kind, typer.Option(help="What to write.")] = "checkpoint",
    keep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text that uses the skill: filter the change to keep it.")
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[=WEIGHT]", help="Text on which the model should stay as it is; repeatable."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, help="Strength of the filter; by default the strongest that keeps `--share`.")
    ] = None,
    share: Annotated[float | None, typer.Option(help="Share of the fine-tune's gain to keep; 0.95 by default.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens of each text; 20,000 by default.")] = None,
    field: Annotated[
        str | None, typer.Option(help="Field of the texts' rows that holds a text or a chat; `text` by default.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field with what precedes each text to keep; its loss is not counted."),
    ] = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be written.")] = False,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Add a fine-tune's weight change to its base and write the result: in some layers, or filtered by texts.

    `--keep` and `--protect` filter it: what the first text uses is kept, what the others would notice is left out.
    """
    from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
    from stethoscope.editing.plan import EditPlan
    from stethoscope.editing.writer import write_edit

    if keep is None and not layers:
        raise StethoscopeError("nothing says what to edit", hint="`--layers 3,5-8`, or `--keep` and `--protect` texts")
    settings: dict[str, Any] = {"strength": strength, "share": share, "tokens": tokens}
    lost = settings | {"protect": protect or None, "field": field, "prompt": prompt, "device": device}
    if keep is None and (given := [f"`--{name}`" for name, value in lost.items() if value is not None]):
        raise StethoscopeError(f"only `--keep` has a use for {listed(given)}", hint="name the text to keep, too")
    chosen = range(open_checkpoint(base).layers) if layers == "all" else parse_layers(layers) if layers else None
    reporter = ConsoleReporter(quiet=quiet)
    if keep is not None:
        from stethoscope.keep import keep_skill

        if coefficient != 1 or modules != "all" or dry_run:
            raise StethoscopeError(
                "`--coefficient`, `--modules` and `--dry-run` do not go with `--keep`",
                hint="`--strength` and `--layers` shape a filtered edit",
            )
        settings = {name: value for name, value in settings.items() if value is not None}
        wanted = _wanted(keep, protect or [], field or "text", prompt, layers=chosen and tuple(chosen), **settings)
        opened, on = open_checkpoint(base), device or "auto"
        change = open_task_vector(opened, tuned)
        made, kept = keep_skill(opened, change, wanted, out, kind=kind, device=on, reporter=reporter)
        value, rows, said = kept.model_dump(mode="json"), kept.table(), kept.verdict
    else:
        assert chosen is not None
        plan = EditPlan.for_layers(chosen, coefficient=coefficient, modules=modules)
        if dry_run:
            _preview(base, tuned, plan, out, kind=kind, reporter=reporter, as_json=as_json)
            return
        opened = open_checkpoint(base)
        with reporter.stage("Edit") as advance:
            made = write_edit(opened, open_task_vector(opened, tuned), plan, out, kind=kind, progress=advance)
        value, rows, said = made.manifest, [], f"{made.tensors} tensors of {len(made.layers)} layers changed"
    for text in made.warnings:
        reporter.note(f"warning: {text}")
    then = command_line("verify", out, *(["--base", base] if kind == "checkpoint" else []))
    conclude(value, as_json=as_json, rows=rows, says=[said], wrote=[out], then=then)


def _preview(
    base: str, tuned: str, plan: "EditPlan", out: Path, *, kind: Kind, reporter: ConsoleReporter, as_json: bool
) -> None:
    from dataclasses import asdict

    from stethoscope.editing.preview import check_edit

    found = check_edit(base, tuned, plan, out, kind=kind)
    for text in found.warnings:
        reporter.note(f"warning: {text}")
    said = (
        f"would change {found.tensors} tensors of {len(found.layers)} layers ({found.bytes_changed / 1e6:,.1f} MB) and"
        f" write {found.bytes_written / 1e6:,.1f} MB in about {found.seconds:.0f} s;"
        f" {found.disk_needed / 1e9:.2f} GB of {found.disk_free / 1e9:.2f} GB free are needed"
    )
    if as_json or not found.problems:
        conclude(asdict(found), as_json=as_json, says=[said])
    if found.problems:
        raise StethoscopeError("the edit cannot be written", problems=found.problems, hint=found.hint)


def extend_vocabulary(
    base: Annotated[str, typer.Option(help="Base checkpoint: a folder or a hub id.")],
    tuned: Annotated[str, typer.Option(help="Fine-tuned checkpoint or PEFT adapter with added tokens.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Write the base with the tokens that its fine-tune added: their rows and its tokenizer.

    Edits of that base have the fine-tune's vocabulary. Nothing else is changed.
    """
    from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
    from stethoscope.editing.vocabulary import extend_vocabulary

    opened = open_checkpoint(base)
    with ConsoleReporter(quiet=quiet).stage("Extend") as advance:
        rows = extend_vocabulary(opened, open_task_vector(opened, tuned), out, progress=advance)
    conclude(
        {"rows": rows},
        as_json=as_json,
        says=[f"`{opened.entries[name].stored}` has {count} rows" for name, count in rows.items()],
        wrote=[out],
        then=command_line("edit", "--base", out, "--tuned", tuned, "--layers", "all", "--out", "edited"),
    )


def _wanted(keep: Path, protect: Sequence[str], field: str, prompt: str | None, **settings: Any) -> "Wanted":
    """The texts of a filtered edit, read; every one that cannot be is named."""
    from stethoscope.keep import Wanted
    from stethoscope.text.documents import read_documents, read_prompted

    texts: dict[str, Any] = {}
    prompts: list[Any] = []
    weights: dict[str, float] = {}
    problems = []
    for given in (str(keep), *protect):
        path, weight = labelled(given) if texts else (given, None)
        name = Path(path).stem if texts else "target"
        try:
            if name in texts:
                problems.append(f"two texts are called `{name}`: rename the file `{path}`")
            if prompt and not texts:
                texts[name], prompts = read_prompted(path, field=field, prompt=prompt)
            else:
                texts[name] = read_documents(path, field=field)
            if weight is not None:
                weights[name] = float(weight)
        except StethoscopeError as error:
            texts.setdefault(name, [])
            problems += [error.message, *error.problems]
        except ValueError:
            problems.append(f"the weight `{weight}` of `{path}` is not a number")
    if problems:
        hint = "a text to protect is `FILE` or `FILE=WEIGHT`; `--field` and `--prompt` name the fields to read"
        raise StethoscopeError("the texts cannot be used", problems=problems, hint=hint)
    return Wanted(keep=texts.pop("target"), prompts=prompts, protect=texts, weights=weights, **settings)


def apply(
    patch: PatchFolder,
    base: Annotated[str, typer.Option(help="The checkpoint that the patch was made for.")],
    out: Annotated[Path, typer.Option(help="Folder to write the edited checkpoint to.")],
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Apply a patch to its base and write the edited checkpoint."""
    _patched(patch, base, out, undo=False, quiet=quiet, as_json=as_json)


def undo(
    patch: PatchFolder,
    edited: Annotated[str, typer.Option(help="The edited checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write the base to.")],
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Restore the base from an edited checkpoint and its patch, bit for bit."""
    _patched(patch, edited, out, undo=True, quiet=quiet, as_json=as_json)


def _patched(patch: Path, checkpoint: str, out: Path, *, undo: bool, quiet: bool, as_json: bool) -> None:
    from stethoscope.editing.patch import apply_patch

    with ConsoleReporter(quiet=quiet).stage("Undo the patch" if undo else "Apply the patch") as advance:
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
    shown = ("ok", "kind", "tensors", "untouched")
    value = {name: getattr(found, name) for name in shown} | {"problems": list(found.problems)}
    if as_json or found.ok:
        said = f"{found.tensors} tensors agree with the manifest, {found.untouched} of them are the base's"
        conclude(value, as_json=as_json, says=[said])
    if not found.ok:
        raise StethoscopeError(f"`{edited}` is not what its manifest says", problems=found.problems)


def push(
    edited: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run's folder, or one that `edit` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created if missing.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Send an edit and its card to the hub, after comparing it with its manifest and asking."""
    from stethoscope.checkpoints.files import refuse_links
    from stethoscope.editing.manifest import known_files, read_manifest
    from stethoscope.editing.publish import publish
    from stethoscope.editing.verify import verify as verify_edit

    folder = edited / "edited" if (edited / "edited").is_dir() else edited
    refuse_links(folder)
    sizes = {
        name: (folder / name).stat().st_size
        for name in sorted(known_files(read_manifest(folder)))
        if (folder / name).exists()
    }
    if not yes and not sys.stdin.isatty():
        raise StethoscopeError("nothing was sent: there is no terminal to ask on", hint="`--yes` sends without asking")
    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage("Verify") as advance:
        found = verify_edit(folder, progress=advance)
    if not found.ok:
        raise StethoscopeError(f"`{folder}` is not what its manifest says", problems=found.problems)
    kind = "public" if public else "private"
    (reporter.note if yes else warn)("\n".join(f"{size / 1e6:12,.1f} MB  {name}" for name, size in sizes.items()))
    asked = (
        f"Send `{folder}` ({sum(sizes.values()) / 1e6:,.1f} MB) to `{repository}`, a {kind} repository if it is new?"
    )
    if not yes and not typer.confirm(asked, err=True):
        warn("nothing was sent")
        return
    with reporter.stage("Send"):
        address = publish(folder, repository, private=not public)
    conclude({"commit": address}, as_json=as_json, says=[f"sent to {address}"])


def train_saes(
    base: Annotated[str, typer.Option(help="Model to train SAEs for: a checkpoint folder or a hub id.")],
    text: Annotated[Path, typer.Option(help="Training text: .jsonl, .parquet, .txt or a saved dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to write; checkpoints are kept in `OUT.training` meanwhile.")],
    field: Annotated[str, typer.Option(help="Field that holds the documents.")] = "text",
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[=NAME]", help="Text to measure health on; by default part of the training text."),
    ] = None,
    layers: Layers = "all",
    site: Annotated[str, typer.Option(help="Where in a layer: resid_post, mlp_out, attn_out, ...")] = "resid_post",
    width: Annotated[
        int | None, typer.Option(min=1, help="Features per SAE; by default four times the hidden size.")
    ] = None,
    k: Annotated[int, typer.Option(help="Features that fire per token, on average.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; shorter text is repeated.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Adam learning rate.")] = 4e-3,
    max_tokens: Annotated[int, typer.Option(help="Documents are cut to this many tokens.")] = 384,
    seed: Seed = 0,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Train an SAE for every layer of a model; the same command resumes a stopped training."""
    from stethoscope.artifacts import read_json
    from stethoscope.checkpoints.open import open_checkpoint
    from stethoscope.models.load import load_tokenizer
    from stethoscope.saes.health import health_rows
    from stethoscope.saes.train import TrainingSettings, hold_out, load_for_training
    from stethoscope.saes.train import train_saes as train
    from stethoscope.text.documents import read_documents

    chosen = None if layers == "all" else parse_layers(layers)
    documents = read_documents(text, field=field)
    if held_out:
        named = {name or Path(path).stem: path for path, name in map(labelled, held_out)}
        if len(named) < len(held_out):
            raise StethoscopeError("two held-out texts have the same name", hint="name them: `--held-out FILE=NAME`")
        held = {name: read_documents(path, field=field) for name, path in named.items()}
    else:
        documents, kept = hold_out(documents)
        held = {"held out": kept}
    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage("Load the model"):
        folder = open_checkpoint(base).path
        model, tokenizer = load_for_training(folder), load_tokenizer(folder)
    with reporter.stage("Train SAEs") as advance:
        train(
            model,
            tokenizer,
            documents,
            out,
            settings=TrainingSettings(
                width=width or 4 * model.config.get_text_config().hidden_size,
                k=k,
                tokens=tokens,
                batch=batch,
                learning_rate=learning_rate,
                max_tokens=max_tokens,
                seed=seed,
                layers=chosen,
                site=site,
            ),
            held_out=held,
            overwrite=overwrite,
            checkpoint_seconds=checkpoint_seconds,
            progress=advance,
        )
    found = read_json(out / "health.json")
    conclude(
        {"out": str(out), **found},
        as_json=as_json,
        rows=health_rows(found["layers"]),
        says=["Variance explained by kind of text; L0, dead and dense features over all of it."],
        wrote=[out],
    )
