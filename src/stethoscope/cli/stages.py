"""Commands on a recipe and its run folder."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stethoscope.checkpoints.files import refuse_links
from stethoscope.cli.console import ConsoleReporter, command_line, conclude, say, say_json, show_rows
from stethoscope.cli.options import (
    AsJSON,
    Changes,
    Quiet,
    RecipeOptions,
    RecipePath,
    RunFolder,
    RunPath,
    with_recipe_options,
)
from stethoscope.display import NONE
from stethoscope.errors import StethoscopeError, install
from stethoscope.recipe import Recipe
from stethoscope.run import RunResult, run_recipe
from stethoscope.stages import Stage

if TYPE_CHECKING:
    from stethoscope.check import Check
    from stethoscope.estimate import Estimate


@with_recipe_options
def run(
    options: RecipeOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the recipe, build the tasks and look for seen items.")
    ] = False,
) -> None:
    """Run all stages of a recipe; run again, it continues where it stopped."""
    reporter = ConsoleReporter(quiet=options.quiet)
    if dry_run:
        with _problems_as_json(options.as_json), reporter.stage("Check the recipe"):
            chosen, folder = options.read()
            from stethoscope.check import check_run

            found = check_run(chosen, folder, headers_only=True)
        said = f"`{options.recipe}` can be run: all it names is here and fits together."
        _show_check(found, options, said, options.next("run"))
        return
    chosen, folder = options.read()
    run_recipe(chosen, folder, reporter=reporter)
    show(folder, as_json=options.as_json)


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Few items: a minute and a half on two cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All items and arms: hours on two cores.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; `runs/demo` by default.")] = None,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Run the embedded recipe on a real language model, end to end."""
    try:
        prepare_demo = metadata.entry_points(group="stethoscope.demos")["demo"].load()
    except (KeyError, ModuleNotFoundError) as error:
        raise StethoscopeError("the demo's package is not installed", hint=install("demo")) from error
    reporter = ConsoleReporter(quiet=quiet)
    size: Literal["quick", "default", "full"] = "quick" if quick else "full" if full else "default"
    if quick and full:
        raise StethoscopeError("`--quick` and `--full` are two sizes of the demo", hint="give one of them")
    recipe = prepare_demo(cache_folder(), size=size, reporter=reporter)
    folder = out or Path("runs") / ("demo" if size == "default" else f"demo-{size}")
    run_recipe(Recipe.from_yaml(recipe), folder, reporter=reporter)
    show(folder, as_json=as_json)
    if not as_json:
        own = ["--base", "MODEL", "--tuned", "FINE-TUNE", "--keep", "skill.jsonl", "--protect", "other.jsonl"]
        say(f"your own: {command_line('edit', *own, '--out', 'EDITED')}")


def check(
    recipe: RecipePath,
    out: RunFolder = None,
    offline: Annotated[bool, typer.Option("--offline", help="Check only local files; do not look on the hub.")] = False,
    changes: Changes = None,
    as_json: AsJSON = False,
) -> None:
    """List everything that is wrong with a recipe, or what its run needs, from names, configs and headers."""
    options = RecipeOptions(recipe=recipe, out=out, changes=changes, as_json=as_json)
    with _problems_as_json(as_json):
        chosen, folder = options.read()
        from stethoscope.check import check_recipe

        found = check_recipe(chosen, folder, offline=offline)
    if offline:
        _show_check(found, options, f"`{recipe}` has no mistake in its form.", options.next("check"))
    else:
        said = f"`{recipe}` can be run, as far as names and headers tell; `run --dry-run` also builds the tasks and"
        said += " looks for items that the texts have shown."
        _show_check(found, options, said, options.next("run", "--dry-run"))


def _show_check(found: "Check", options: RecipeOptions, said: str, then: str) -> None:
    from stethoscope.estimate import estimate

    estimates, says = [], [said, *found.notes]
    try:
        estimates = estimate(options.read()[0], found)
    except StethoscopeError as error:
        says.append(f"note: no time is estimated: {error.message}")
    value = {"ok": True, **found.summary(), "estimates": [one._asdict() for one in estimates]}
    if estimates and not options.as_json:
        show_rows(found.table())
    rows = _estimate_rows(estimates) if estimates else found.table()
    conclude(value, as_json=options.as_json, rows=rows, says=says, then=then)


def _estimate_rows(estimates: "list[Estimate]") -> list[list[str]]:
    rows = [["stage", "about", "peak memory"]]
    for stage, seconds, memory in estimates:
        said = "not known" if seconds is None else f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:,.0f} min"
        rows.append([stage, said, f"{memory / 1e9:.1f} GB" if memory else NONE])
    return rows


@contextmanager
def _problems_as_json(as_json: bool) -> Iterator[None]:
    try:
        yield
    except StethoscopeError as error:
        if as_json:
            say_json({"ok": False, "problems": list(error.problems or [error.message])})
        raise


def report(
    run: RunPath,
    opened: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Write a run's report again, from what the run saved."""
    from stethoscope.report import render_report

    refuse_links(run, deep=True)
    path = render_report(run)
    conclude({"report": str(path)}, as_json=as_json, wrote=[path])
    if opened:
        typer.launch(str(path))


def show(run: RunPath, as_json: AsJSON = False) -> None:
    """Show a finished run's verdict and tables, from what it saved; loads no model."""
    from stethoscope.results.comparison import Comparison
    from stethoscope.results.comparison_tables import accuracy_table
    from stethoscope.results.overview import headline, overview
    from stethoscope.results.selection import Selection

    if not (run / "comparison.json").exists():
        raise StethoscopeError(f"`{run}` is not a finished run's folder", hint="`stethoscope run` ends with a verdict")
    refuse_links(run, deep=True)
    found = Comparison.load(run / "comparison.json")
    result = RunResult(folder=run, results={"select": Selection.load(run), "compare": found})
    if as_json:
        say_json(result.summary())
        return
    show_rows(accuracy_table(found))
    show_rows(overview(found))
    rivals = ("selected", "random_layers", "scaled")
    against = [c.verdict for c in found.contrasts if c.b == found.edit and c.a.startswith(rivals)]
    conclude(
        {},
        as_json=False,
        says=list(dict.fromkeys([headline(found), found.verdict, *against])),
        wrote=[path for path in (result.report, result.edited) if path.exists()],
        then=command_line("verify", result.edited) if result.edited.exists() else "",
    )


def stage_command(stage: Stage) -> Callable[..., None]:
    """The command that runs a recipe up to a stage and shows its result."""

    @with_recipe_options
    def command(options: RecipeOptions) -> None:
        chosen, folder = options.read()
        reporter = ConsoleReporter(quiet=options.quiet)
        found = run_recipe(chosen, folder, until=stage.name, reporter=reporter).results[stage.name]
        conclude(
            found.model_dump(mode="json"),
            as_json=options.as_json,
            rows=stage.rows(found, chosen),
            says=list(stage.says(found, chosen)),
            wrote=[folder / name for name in stage.wrote(chosen)],
            then=options.next(stage.then),
        )

    command.__name__, command.__doc__ = stage.name, stage.help
    return command


def cache_folder() -> Path:
    """The folder of unpacked models: ``STETHOSCOPE_CACHE`` if set, else the system's folder for a user's caches."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("STETHOSCOPE_CACHE")
    return Path(chosen) if chosen else user_cache_path("stethoscope")
