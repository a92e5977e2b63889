"""The command line: arguments in, progress and tables out; no mathematics.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a fault of this program, 2 something the
user can mend, 130 interrupted. Nothing heavy is imported before a command needs it.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stethoscope.errors import StethoscopeError

if TYPE_CHECKING:
    from stethoscope.evaluation.contrast import Comparison
    from stethoscope.pipeline import RunResult


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


app = typer.Typer(
    help="Find the layers where a fine-tune's skill lives, edit those only, and prove gain and cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

INTERRUPTED = 130

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to run.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


class ConsoleReporter:
    """One bar with the time left per stage on a terminal; one plain line per stage elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int], None]]:
        start = time.perf_counter()
        if self.quiet or not _err.is_terminal:
            yield lambda _done, _total: None
        else:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description:<34}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=_err, transient=True) as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        if not self.quiet:
            _err.print(f"{title:<34} {time.perf_counter() - start:6.1f} s", highlight=False)

    def note(self, text: str) -> None:
        if not self.quiet:
            _err.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an expected failure.")] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, stream=sys.stderr)


@app.command()
def run(
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option(help="Run folder; `runs/RECIPE` if not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `check`.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Run all stages of a recipe; run again, it goes on where it stopped."""
    from stethoscope.pipeline import run_recipe
    from stethoscope.recipe import Recipe

    folder = out or Path("runs") / recipe.stem
    if dry_run:
        check(recipe, out=folder)
        return
    _show(run_recipe(Recipe.from_yaml(recipe), folder, reporter=ConsoleReporter(quiet=quiet)), as_json=as_json)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Few items, under two minutes; small-sample numbers.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Run the embedded recipe on a real language model, end to end."""
    try:
        from stethoscope_demo.recipe import prepare_demo
    except ModuleNotFoundError as error:
        raise StethoscopeError(
            f"the demo's package is not installed: {error}", hint="`make install`, or `pip install -e demo`"
        ) from error
    from stethoscope.pipeline import run_recipe
    from stethoscope.recipe import Recipe

    reporter = ConsoleReporter(quiet=quiet)
    recipe = prepare_demo(cache_folder(), quick=quick, reporter=reporter)
    folder = out or Path("runs") / ("demo-quick" if quick else "demo")
    if quick:
        reporter.note("quick: few items and few documents, so every number is small-sample and intervals are wide")
    _show(run_recipe(Recipe.from_yaml(recipe), folder, reporter=reporter), as_json=as_json)


@app.command()
def check(
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option(help="Run folder; `runs/RECIPE` if not given.")] = None,
) -> None:
    """Say everything that is wrong with a recipe, or what it will take; from configs and headers alone."""
    from stethoscope.pipeline import preflight
    from stethoscope.recipe import Recipe

    found = preflight(Recipe.from_yaml(recipe), out or Path("runs") / recipe.stem, headers_only=True)
    _say(f"`{recipe}` can be run: {found.describe()}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write a run's report again, from what the run saved."""
    from stethoscope.report import render_report

    _say(f"report: {render_report(run)}")


@app.command()
def calibrate(
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option(help="Run folder; `runs/RECIPE` if not given.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Find layers and coefficient on the recipe's calibration text: target loss gained per control loss paid."""
    from stethoscope.pipeline import calibrate_recipe
    from stethoscope.recipe import Recipe

    folder = out or Path("runs") / recipe.stem
    found = calibrate_recipe(Recipe.from_yaml(recipe), folder, reporter=ConsoleReporter(quiet=quiet))
    if as_json:
        print(found.model_dump_json(indent=1))  # noqa: T201 - data goes to stdout
        return
    _print_rows(found.table(), left=1)
    _say(f"{found.rule}\n{found.reason}\n\nall figures: {folder / found.FILE}")


@app.command()
def hearing(
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option(help="Run folder; `runs/RECIPE` if not given.")] = None,
    control: Annotated[
        str, typer.Option(help="The control whose loss is the cost, by its name in the recipe.")
    ] = "control",
    documents: Annotated[int, typer.Option(min=2, help="Target and control documents to measure the truth on.")] = 32,
    random_sets: Annotated[int, typer.Option(min=10, help="Random layer sets of each size to beat.")] = 50,
    k: Annotated[int, typer.Option(min=1, help="Size of set that the table is about.")] = 5,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Does the stethoscope hear right? Every score of the layers against what injecting them truly does."""
    from stethoscope.pipeline import judge_recipe
    from stethoscope.recipe import Recipe

    chosen, folder = Recipe.from_yaml(recipe), out or Path("runs") / recipe.stem
    found = judge_recipe(
        chosen,
        folder,
        control=control,
        documents=documents,
        random_sets=random_sets,
        reporter=ConsoleReporter(quiet=quiet),
    )
    if as_json:
        print(found.model_dump_json(indent=1))  # noqa: T201 - data goes to stdout
        return
    sizes = next(iter(found.scores.values())).sets
    size = k if k in sizes else min(sizes, key=lambda other: abs(other - k))
    _print_rows(found.table(size), left=1)
    for score in dict.fromkeys((chosen.score, "attribution")):
        _say(found.verdict(score, size))
    _say(f"\nall figures: {folder / 'hearing' / control / found.FILE}")


@app.command()
def edit(
    base: Annotated[str, typer.Option(help="Base checkpoint: a folder or a hub id.")],
    tuned: Annotated[str, typer.Option(help="Fine-tuned checkpoint or PEFT adapter.")],
    layers: Annotated[str, typer.Option(help="Layers to edit, such as `3,5-8`, or `all`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    coefficient: Annotated[float, typer.Option(help="How much of the change; negative takes a skill away.")] = 1.0,
    modules: Annotated[Modules, typer.Option(help="Which tensors of those layers.")] = Modules.all,
    kind: Annotated[OutputKind, typer.Option(help="What to write.")] = OutputKind.checkpoint,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do, from headers alone.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Put a fine-tune's raw weight change into some layers and write the result."""
    from dataclasses import asdict

    from stethoscope.checkpoints.checkpoint import open_checkpoint
    from stethoscope.checkpoints.task_vector import open_task_vector
    from stethoscope.editing.plan import EditPlan
    from stethoscope.editing.preview import check_edit
    from stethoscope.editing.writer import write_edit

    if layers == "all":
        plan = EditPlan.for_layers(range(open_checkpoint(base).layers), coefficient=coefficient, modules=modules.value)
    else:
        plan = EditPlan.for_layers(parse_layers(layers), coefficient=coefficient, modules=modules.value)
    if dry_run:
        found = check_edit(base, tuned, plan, out, kind=kind.value)
        if as_json:
            print(json.dumps(asdict(found), indent=1))  # noqa: T201 - data goes to stdout
        elif not found.problems:
            _say(
                f"would change {found.tensors} tensors of {len(found.layers)} layers"
                f" ({found.bytes_changed / 1e6:,.1f} MB) and write {found.bytes_written / 1e6:,.1f} MB"
                f" in about {found.seconds:.0f} s; {found.disk_needed / 1e9:.2f} GB of"
                f" {found.disk_free / 1e9:.2f} GB free are needed"
            )
        if found.problems:
            raise StethoscopeError("the edit cannot be written", problems=found.problems, hint=found.hint)
        return
    opened = open_checkpoint(base)
    with ConsoleReporter(quiet=quiet).stage("Edit") as advance:
        made = write_edit(opened, open_task_vector(opened, tuned), plan, out, kind=kind.value, progress=advance)
    if as_json:
        print(json.dumps(made.manifest, indent=1))  # noqa: T201 - data goes to stdout
    else:
        _say(f"wrote {out}: {made.tensors} tensors of {len(made.layers)} layers changed")


@app.command()
def apply(
    patch: Annotated[Path, typer.Argument(help="A patch that `edit --kind patch` wrote.")],
    base: Annotated[str, typer.Option(help="The checkpoint that the patch was made for.")],
    out: Annotated[Path, typer.Option(help="Folder to write the edited checkpoint to.")],
) -> None:
    """Write the edited checkpoint that a patch and its base make."""
    from stethoscope.editing.patch import apply_patch

    with ConsoleReporter().stage("Apply the patch") as advance:
        _say(f"wrote {apply_patch(patch, base, out, progress=advance)}")


@app.command()
def undo(
    patch: Annotated[Path, typer.Argument(help="A patch that `edit --kind patch` wrote.")],
    edited: Annotated[str, typer.Option(help="The edited checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write the base to.")],
) -> None:
    """Write the base again from an edited checkpoint and its patch, bit for bit."""
    from stethoscope.editing.patch import undo_patch

    with ConsoleReporter().stage("Undo the patch") as advance:
        _say(f"wrote {undo_patch(patch, edited, out, progress=advance)}")


@app.command()
def verify(
    edited: Annotated[Path, typer.Argument(help="A folder that `edit` or `run` wrote.")],
    base: Annotated[str | None, typer.Option(help="Compare untouched tensors with this base itself.")] = None,
) -> None:
    """Compare every tensor and file of an edit with its manifest."""
    from stethoscope.checkpoints.checkpoint import open_checkpoint
    from stethoscope.editing.verify import verify as verify_edit

    with ConsoleReporter().stage("Verify") as advance:
        found = verify_edit(edited, base=open_checkpoint(base) if base else None, progress=advance)
    if not found.ok:
        raise StethoscopeError(f"`{edited}` is not what its manifest says", problems=found.problems)
    _say(f"{found.tensors} tensors agree with the manifest, {found.untouched} of them are the base's")


class Backend(StrEnum):
    """What generates the responses."""

    hf = "hf"
    vllm = "vllm"


class Correction(StrEnum):
    """How p-values are corrected for their number."""

    holm = "holm"
    bh = "bh"


@app.command()
def evaluate(
    model: Annotated[list[str], typer.Option(metavar="PATH[=NAME]", help="A checkpoint; repeat for more arms.")],
    tasks: Annotated[str, typer.Option(help="Harness tasks, groups or YAML files, with commas between.")],
    out: Annotated[Path, typer.Option(help="Folder for outcomes and comparison; run again, it goes on there.")],
    data: Annotated[Path | None, typer.Option(help="Local JSONL in the MATH schema for `minerva_math`.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task YAMLs.")] = None,
    limit: Annotated[int | None, typer.Option(help="So many items of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 32,
    backend: Annotated[Backend, typer.Option(help="What generates.")] = Backend.hf,
    seed: Annotated[int, typer.Option(help="Of few-shot sampling and of the bootstrap.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Run harness tasks on checkpoints, item by item, and compare the others with the first."""
    from stethoscope.evaluation import compare as compare_arms
    from stethoscope.evaluation.run import evaluate_checkpoints

    arms = {name or Path(path).name: path for path, name in map(_labelled, model)}
    if len(arms) < len(model):
        raise StethoscopeError("two models have the same name", hint="name them: `--model PATH=NAME`")
    with ConsoleReporter(quiet=quiet).stage("Evaluate") as advance:
        outcomes = evaluate_checkpoints(
            arms,
            [name.strip() for name in tasks.split(",") if name.strip()],
            out=out,
            backend=backend.value,
            include_path=include_path,
            data=data,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            progress=lambda done, total, _: advance(done, total),
        )
    found = compare_arms(outcomes, baseline=outcomes.arms[0], seed=seed)
    found.save(out / "comparison.json")
    _show_comparison(found, as_json=as_json, everything=len(arms) == 2)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A[=ARM]", help="Compared with: a log folder, a log, or a run.")],
    b: Annotated[str, typer.Argument(metavar="B[=ARM]", help="Under test; ARM names a log or chooses a run's arm.")],
    metric: Annotated[str | None, typer.Option(help="The metric that decides; each task's own if not given.")] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARE|TASK=SHARE", help="Loss that would be accepted; 0.02 if absent."),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Tasks corrected together; the others are controls.")] = None,
    correction: Annotated[Correction, typer.Option(help="For the number of tests.")] = Correction.holm,
    cluster: Annotated[str | None, typer.Option(metavar="FIELD", help="Field of a log's items: their source.")] = None,
    shared_only: Annotated[bool, typer.Option("--shared-only", help="Leave out items that one arm lacks.")] = False,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the comparison to this file.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Compare two arms item by item, from `lm_eval --log_samples` folders or from runs; no model is needed."""
    from stethoscope.evaluation import compare as compare_arms
    from stethoscope.evaluation.samples import join, read_results

    (path_a, arm_a), (path_b, arm_b) = _labelled(a), _labelled(b)
    first = read_results(Path(path_a), arm=arm_a, source=cluster)
    second = read_results(Path(path_b), arm=arm_b, source=cluster)
    if first.arms == second.arms:
        first, second = first.renamed(f"{first.arms[0]} (a)"), second.renamed(f"{second.arms[0]} (b)")
    joined, left_out = join(first, second, shared_only=shared_only)
    margins = dict(map(_margin, margin or ()))
    common = margins.pop("", 0.02)
    found = compare_arms(
        joined,
        baseline=first.arms[0],
        pairs=[(first.arms[0], second.arms[0])],
        family=family.split(",") if family else None,
        metric=metric,
        margin=common,
        margins=margins,
        adjustment=correction.value,
        seed=seed,
    )
    if out:
        found.save(out)
    for line in left_out:
        _err.print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)
    _show_comparison(found, as_json=as_json, everything=True)


@app.command("train-saes")
def train_saes(
    base: Annotated[str, typer.Option(help="The model that has none: a checkpoint folder or a hub id.")],
    text: Annotated[Path, typer.Option(help="What to train on: .jsonl, .parquet, .txt or a saved dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to write; `OUT.training` beside it holds checkpoints meanwhile.")],
    field: Annotated[str, typer.Option(help="Field of the text that holds the documents.")] = "text",
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[=NAME]", help="Text to measure health on; some of the text itself if absent."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers, such as `3,5-8`, or `all`.")] = "all",
    site: Annotated[str, typer.Option(help="Where in a layer: resid_post, mlp_out, attn_out, ...")] = "resid_post",
    width: Annotated[int | None, typer.Option(help="Features; four times the model's width if absent.")] = None,
    k: Annotated[int, typer.Option(help="Features that fire on a token, on average.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens to train on; the text repeats if it has fewer.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Tokens to a step.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Adam's.")] = 4e-3,
    max_tokens: Annotated[int, typer.Option(help="Documents are cut here.")] = 384,
    seed: Annotated[int, typer.Option(help="Of order and initial weights.")] = 0,
    checkpoint_seconds: Annotated[float, typer.Option(help="Time between checkpoints.")] = 120.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Train an SAE on every layer of a model, from one forward; run again after a stop, it goes on there."""
    from stethoscope.corpus import read_documents
    from stethoscope.models import load_tokenizer
    from stethoscope.saes.health import health_rows
    from stethoscope.saes.training import TrainingSettings, hold_out, load_for_training
    from stethoscope.saes.training import train_saes as train

    chosen = None if layers == "all" else parse_layers(layers)
    documents = read_documents(text, field=field)
    if held_out:
        named = {name or Path(path).stem: path for path, name in map(_labelled, held_out)}
        held = {name: read_documents(path, field=field) for name, path in named.items()}
    else:
        documents, kept = hold_out(documents)
        held = {"held out": kept}
    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage("Load the model"):
        model, tokenizer = load_for_training(base), load_tokenizer(base)
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
            ),
            held_out=held,
            layers=chosen,
            site=site,
            overwrite=overwrite,
            checkpoint_seconds=checkpoint_seconds,
            progress=advance,
        )
    found = json.loads((out / "health.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps({"out": str(out), **found}, indent=1))  # noqa: T201 - data goes to stdout
        return
    _print_rows(health_rows(found["layers"]), left=1)
    _say(f"Variance explained by kind of text; L0, dead and dense features over all of it.\nwrote {out}")


def _labelled(text: str) -> tuple[str, str | None]:
    """A path and the name behind its last `=`, if there is one; a path that exists may hold `=` itself."""
    path, found, name = text.rpartition("=")
    return (path, name) if found and path and name and not Path(text).exists() else (text, None)


def _margin(text: str) -> tuple[str, float]:
    task, _, share = text.rpartition("=")
    try:
        return task, float(share)
    except ValueError as error:
        raise StethoscopeError(f"the margin `{text}` is no number", hint="`--margin 0.02`, or `TASK=0.05`") from error


def _show_comparison(found: "Comparison", *, as_json: bool, everything: bool) -> None:
    from stethoscope.evaluation.tables import accuracy_rows, bound_rows, contrast_rows, gain_rows, noise, notes

    if as_json:
        print(json.dumps(found.to_dict(), indent=1))  # noqa: T201 - data goes to stdout
        return
    _print_rows(accuracy_rows(found), left=2)
    for line in noise(found):
        _say(f"noise: {line}")
    for contrast in found.contrasts:
        if everything:
            _print_rows(contrast_rows(contrast), left=2)
            _print_rows(bound_rows(contrast), left=1)
            if len(gains := gain_rows(found, contrast)) > 1:
                _print_rows(gains, left=1)
            for line in notes(contrast):
                _say(f"note: {line}")
            for task in contrast.tasks:
                _say(f"{task.task}: {task.verdict}")
        _say(f"Verdict: {contrast.verdict}")


def _print_rows(rows: list[list[str]], *, left: int) -> None:
    """A table with its first columns to the left and numbers to the right, as wide as it is, and an empty line."""
    table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for column in table.columns[left:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=240).print(table, "")  # at its own width: folded numbers cannot be read


def parse_layers(text: str) -> list[int]:
    """Layer numbers from `3,5-8`.

    Raises:
        StethoscopeError: the text is something else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise StethoscopeError(f"`{part}` in `--layers {text}` is no layer", hint="write `3,5-8`, or `all`")
        layers += range(int(first), int(last or first) + 1)
    return layers


def _say(text: str) -> None:
    _out.print(text, highlight=False, markup=False, soft_wrap=True)


def cache_folder() -> Path:
    """Where unpacked models lie: ``STETHOSCOPE_CACHE`` if set, else the system's place for a user's caches."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("STETHOSCOPE_CACHE")
    return Path(chosen) if chosen else user_cache_path("stethoscope")


def _show(result: "RunResult", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.summary(), indent=1))  # noqa: T201 - data goes to stdout
        return
    _print_rows(result.table(), left=1)
    for line in result.verdicts():
        _out.print(line, highlight=False, markup=False, soft_wrap=True)
    _out.print(
        f"\nreport: {result.report}\nedited model: {result.edited}", highlight=False, markup=False, soft_wrap=True
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns failures that the user can mend into a message, a hint and exit code 2."""
    # One bar per stage is ours; the libraries' own would interleave with it.
    for variable in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv: list[Any] = sys.argv[1:] if arguments is None else arguments
    try:
        # Typer hands back an exit code in place of Ctrl-C; a command that ends well gives None.
        code = app(argv, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except StethoscopeError as error:
        if "--debug" in argv:
            raise
        _err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _err.print("\ninterrupted: run the same command again to go on where it stopped", highlight=False)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "show"):  # what typer raises for a wrong command or option, from a private module
            raise
        error.show()
        sys.exit(2)


if __name__ == "__main__":
    main()
