"""Commands on a recipe and its run folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stethoscope.cli.console import AsJSON, ConsoleReporter, Quiet, RecipePath, RunFolder, say, say_json, show_rows
from stethoscope.errors import StethoscopeError

if TYPE_CHECKING:
    from stethoscope.pipeline import RunResult


def run(
    recipe: RecipePath,
    out: RunFolder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `check`.")] = False,
    quiet: Quiet = False,
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


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Few items, under two minutes; small-sample numbers.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    quiet: Quiet = False,
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


def check(
    recipe: RecipePath,
    out: RunFolder = None,
) -> None:
    """Say everything that is wrong with a recipe, or what it will take; from configs and headers alone."""
    from stethoscope.preflight import preflight
    from stethoscope.recipe import Recipe

    found = preflight(Recipe.from_yaml(recipe), out or Path("runs") / recipe.stem, headers_only=True)
    say(f"`{recipe}` can be run: {found.describe()}")


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write a run's report again, from what the run saved."""
    from stethoscope.report import render_report

    say(f"report: {render_report(run)}")


def calibrate(
    recipe: RecipePath,
    out: RunFolder = None,
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Find layers and coefficient on the recipe's calibration text: target loss gained per control loss paid."""
    from stethoscope.pipeline import calibrate_recipe
    from stethoscope.recipe import Recipe

    folder = out or Path("runs") / recipe.stem
    found = calibrate_recipe(Recipe.from_yaml(recipe), folder, reporter=ConsoleReporter(quiet=quiet))
    if as_json:
        say_json(found.model_dump(mode="json"))
        return
    show_rows(found.table(), left=1)
    say(f"{found.rule}\n{found.reason}\n\nall figures: {folder / found.FILE}")


def hearing(
    recipe: RecipePath,
    out: RunFolder = None,
    control: Annotated[
        str, typer.Option(help="The control whose loss is the cost, by its name in the recipe.")
    ] = "control",
    documents: Annotated[int, typer.Option(min=2, help="Target and control documents to measure the truth on.")] = 32,
    random_sets: Annotated[int, typer.Option(min=10, help="Random layer sets of each size to beat.")] = 50,
    k: Annotated[int, typer.Option(min=1, help="Size of set that the table is about.")] = 5,
    quiet: Quiet = False,
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
        say_json(found.model_dump(mode="json"))
        return
    sizes = next(iter(found.scores.values())).sets
    size = k if k in sizes else min(sizes, key=lambda other: abs(other - k))
    show_rows(found.table(size), left=1)
    for score in dict.fromkeys((chosen.score, "attribution")):
        say(found.verdict(score, size))
    say(f"\nall figures: {folder / 'hearing' / control / found.FILE}")


def cache_folder() -> Path:
    """Where unpacked models lie: ``STETHOSCOPE_CACHE`` if set, else the system's place for a user's caches."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("STETHOSCOPE_CACHE")
    return Path(chosen) if chosen else user_cache_path("stethoscope")


def _show(result: "RunResult", *, as_json: bool) -> None:
    if as_json:
        say_json(result.summary())
        return
    show_rows(result.table(), left=1)
    for line in result.verdicts():
        say(line)
    say(f"\nreport: {result.report}\nedited model: {result.edited}")
