"""Commands on a recipe and its run folder."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stethoscope.cli.console import (
    AsJSON,
    Changes,
    ConsoleReporter,
    Device,
    GPUs,
    Quiet,
    RayAddress,
    RecipePath,
    RunFolder,
    Workers,
    command_line,
    conclude,
    say_json,
)
from stethoscope.errors import StethoscopeError

if TYPE_CHECKING:
    from stethoscope.recipe import Recipe
    from stethoscope.run import RunResult
    from stethoscope.stages import Stage

START = "Start: import the libraries"  # PyTorch, Transformers and the harness take seconds


def run(
    recipe: RecipePath,
    out: RunFolder = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only what a run does first: `check`, build the tasks, look at items.")
    ] = False,
    changes: Changes = None,
    ray: RayAddress = None,
    workers: Workers = None,
    gpus: GPUs = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Run all stages of a recipe; run again, it goes on where it stopped."""
    if dry_run:
        _rehearse(recipe, out, changes, device, quiet=quiet, as_json=as_json)
        return
    chosen, folder = _read(recipe, out, changes, ray, workers, gpus, device)
    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage(START):
        from stethoscope.run import run_recipe

    _show(run_recipe(chosen, folder, reporter=reporter), as_json=as_json)


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Few items, under two minutes; small-sample numbers.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; `runs/demo` if not given.")] = None,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Run the embedded recipe on a real language model, end to end."""
    try:
        prepare_demo = metadata.entry_points(group="stethoscope.demos")["demo"].load()
    except (KeyError, ModuleNotFoundError) as error:
        reason = "no entry point `demo`" if isinstance(error, KeyError) else error
        raise StethoscopeError(
            f"the demo's package is not installed: {reason}", hint="`make install`, or `pip install -e demo`"
        ) from error
    from stethoscope.recipe import Recipe

    reporter = ConsoleReporter(quiet=quiet)
    with reporter.stage(START):
        from stethoscope.run import run_recipe

    recipe = prepare_demo(cache_folder(), quick=quick, reporter=reporter)
    folder = out or Path("runs") / ("demo-quick" if quick else "demo")
    if quick:
        reporter.note("quick: few items and few documents, so every number is small-sample and intervals are wide")
    _show(run_recipe(Recipe.from_yaml(recipe), folder, reporter=reporter), as_json=as_json)


def check(
    recipe: RecipePath,
    out: RunFolder = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="The recipe's form only: take on trust what lies on the hub.")
    ] = False,
    changes: Changes = None,
    as_json: AsJSON = False,
) -> None:
    """Say everything that is wrong with a recipe, or what it will take; from names, configs and headers alone."""
    with _problems_as_json(as_json):
        chosen, folder = _read(recipe, out, changes)
        from stethoscope.check import check_recipe

        found = check_recipe(chosen, folder, offline=offline)
    conclude(
        {"ok": True, **found.summary()},
        as_json=as_json,
        rows=found.table(),
        says=[
            f"`{recipe}` has no mistake in its form."
            if offline
            else f"`{recipe}` can be run, as far as names and headers tell; `run --dry-run` also builds the tasks and"
            " looks for items that the texts have shown.",
            *found.notes,
        ],
        then=_then("check" if offline else "run", recipe, out) + ("" if offline else " --dry-run"),
    )


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")], as_json: AsJSON = False
) -> None:
    """Write a run's report again, from what the run saved."""
    from stethoscope.report import render_report

    path = render_report(run)
    conclude({"report": str(path)}, as_json=as_json, wrote=[path])


def stage_command(stage: "Stage") -> Callable[..., None]:
    """The command that runs a recipe up to a stage and shows its result."""

    def command(
        recipe: RecipePath,
        out: RunFolder = None,
        changes: Changes = None,
        ray: RayAddress = None,
        workers: Workers = None,
        gpus: GPUs = None,
        device: Device = None,
        quiet: Quiet = False,
        as_json: AsJSON = False,
    ) -> None:
        chosen, folder = _read(recipe, out, changes, ray, workers, gpus, device)
        reporter = ConsoleReporter(quiet=quiet)
        with reporter.stage(START):
            from stethoscope.run import run_recipe
        found = run_recipe(chosen, folder, until=stage.name, reporter=reporter).results[stage.name]
        conclude(
            found.model_dump(mode="json"),
            as_json=as_json,
            rows=stage.rows(found, chosen),
            says=list(stage.says(found, chosen)),
            wrote=[folder / name for name in stage.wrote(chosen)],
            then=_then(stage.then, recipe, out),
        )

    command.__name__, command.__doc__ = stage.name, stage.help
    return command


def cache_folder() -> Path:
    """Where unpacked models lie: ``STETHOSCOPE_CACHE`` if set, else the system's place for a user's caches."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("STETHOSCOPE_CACHE")
    return Path(chosen) if chosen else user_cache_path("stethoscope")


def _rehearse(
    recipe: Path, out: Path | None, changes: list[str] | None, device: str | None, *, quiet: bool, as_json: bool
) -> None:
    with _problems_as_json(as_json), ConsoleReporter(quiet=quiet).stage("Check the recipe"):
        chosen, folder = _read(recipe, out, changes, device=device)
        from stethoscope.check import check_run

        found = check_run(chosen, folder, headers_only=True)
    tasks = {"tasks": found.tasks, "control_tasks": found.control_tasks}
    rows = [[name.replace("_", " "), ", ".join(names) or "none"] for name, names in tasks.items()]
    conclude(
        {"ok": True, **found.summary(), **tasks, "seen_items": found.seen_items},
        as_json=as_json,
        rows=[*found.table(), *rows],
        says=[f"`{recipe}` can be run: all it names is here and fits together.", *found.notes],
        then=_then("run", recipe, out),
    )


@contextmanager
def _problems_as_json(as_json: bool) -> Iterator[None]:
    try:
        yield
    except StethoscopeError as error:
        if as_json:
            say_json({"ok": False, "problems": list(error.problems or [error.message])})
        raise


def _read(
    recipe: Path,
    out: Path | None,
    changes: Sequence[str] | None = None,
    ray: str | None = None,
    workers: int | None = None,
    gpus: float | None = None,
    device: str | None = None,
) -> "tuple[Recipe, Path]":
    """The recipe and its run folder: first of all, since what runs it takes seconds to import.

    What the command line says of workers and the device stands in place of what the recipe does.
    """
    from stethoscope.recipe import Ray, Recipe

    chosen = Recipe.from_yaml(recipe, changes or ())
    said = {"address": ray, "workers": workers, "gpus": gpus}
    if asked := {name: value for name, value in said.items() if value is not None}:
        chosen = chosen.model_copy(update={"ray": (chosen.ray or Ray()).model_copy(update=asked)})
    if device:
        chosen = chosen.model_copy(update={"device": device})
    return chosen, out or Path("runs") / recipe.stem


def _then(command: str, recipe: Path, out: Path | None) -> str:
    return command_line(command, recipe, *(["--out", out] if out else []))


def _show(result: "RunResult", *, as_json: bool) -> None:
    from stethoscope.results.comparison_tables import accuracy_table

    found = result.comparison
    rivals = [
        c for c in found.contrasts if c.b == "selected" and c.a.startswith((found.baseline, "random_layers", "scaled"))
    ]
    conclude(
        result.summary(),
        as_json=as_json,
        rows=accuracy_table(found),
        says=[contrast.verdict for contrast in rivals or found.contrasts],
        wrote=[result.report, result.edited],
        then=command_line("verify", result.edited),
    )
