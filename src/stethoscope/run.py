"""Runs the stages of a recipe; it alone derives keys, skips current results, shows progress and saves.

A stage whose inputs did not change is not run again; its saved result is read instead.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import yaml

from stethoscope import stages
from stethoscope.artifacts import Provenance, kept_for_one, write_text
from stethoscope.checkpoints.files import refuse_links
from stethoscope.errors import RecipeError, StethoscopeError, require
from stethoscope.make import Results
from stethoscope.recipe import INPUTS, Recipe
from stethoscope.stages import Stage

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from stethoscope.context import Context
    from stethoscope.results.comparison import Comparison
    from stethoscope.results.selection import Selection


@runtime_checkable
class Reporter(Protocol):
    """Shows progress; the library itself never prints."""

    def stage(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show a stage until the context ends; its value is called with steps done and steps in all."""

    def note(self, text: str) -> None:
        """Show one line about a result."""


class Silent:
    """A reporter that shows nothing."""

    def stage(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Show nothing."""
        return nullcontext(lambda _done, _total: None)

    def note(self, text: str) -> None:
        """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run's folder, and the results of its stages by name."""

    folder: Path
    results: Results

    @property
    def selection(self) -> "Selection":
        """The layers chosen."""
        return self.results["select"]

    @property
    def comparison(self) -> "Comparison":
        """The arms compared."""
        return self.results["compare"]

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"

    @property
    def edited(self) -> Path:
        """The edited checkpoint."""
        return self.folder / "edited"

    def summary(self) -> dict[str, Any]:
        """Layers, accuracy per arm and task, verdicts and paths, as plain values."""
        return {
            "selection": list(self.selection.layers),
            "accuracy": self.comparison.accuracy,
            "verdicts": self.verdicts(),
            "edited": str(self.edited),
            "report": str(self.report),
        }

    def verdicts(self) -> list[str]:
        """One sentence for every pair of arms that was compared."""
        return [contrast.verdict for contrast in self.comparison.contrasts]


def run_recipe(
    recipe: Recipe, folder: Path, *, until: str | None = None, reporter: Reporter | None = None
) -> RunResult:
    """Run the stages of a recipe in a folder; current results in it are read instead.

    Args:
        until: the stage to run, with those that it needs; the whole recipe if None.

    Raises:
        StethoscopeError: everything that is wrong with the recipe, before any long work; another run in the folder.
    """
    reporter = reporter or Silent()
    names = [stage.name for stage in stages.STAGES]
    if until is not None and until not in names:
        raise StethoscopeError(f"there is no stage `{until}`", hint=f"choose from {', '.join(names)}")
    chosen, known = chosen_stages(recipe, until), {*INPUTS, *recipe.texts, *names}
    if missing := [f"`{s.name}` needs the {n} text" for s in chosen for n in s.needs(recipe) if n not in known]:
        hint = "name them in `calibrate`, or as `evaluate.target` and `evaluate.control`"
        raise RecipeError("the recipe lacks texts", problems=missing, hint=hint)
    if not recipe.filters and any(stage.name == "filter" for stage in chosen):
        hint = "see `edit.filter`; `edit.coefficient` must be above 0, and `arms` name an edit"
        raise RecipeError("the recipe filters nothing, so there is nothing to recommend", hint=hint)
    with ExitStack() as stack:
        with reporter.stage("Check the recipe"):
            from stethoscope.check import check_run
            from stethoscope.context import open_context

            if recipe.ray and recipe.ray.workers != 0:
                require("ray", extra="ray")
            found = check_run(recipe, folder)
            stack.enter_context(kept_for_one(folder))
            refuse_links(folder, deep=True)
            context = open_context(recipe, folder, found, stack)
        for note in found.notes:
            reporter.note(note)
        if until is None:
            write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        checked = False
        keys, results = dict(context.hashes), dict[str, Any]()
        for stage in chosen:
            provenance = _provenance(stage, recipe, keys)
            with reporter.stage(stage.title) as advance:
                made = _saved(stage, context, provenance)
                if made is None:
                    if stage.load and not checked:
                        context.check_weights()  # before a model is loaded; a finished run does not need it
                        checked = True
                    made = stage.make(context, MappingProxyType(results), provenance, advance)
                    if stage.save:
                        stage.save(folder, recipe, made)
            for note in stage.notes(made):
                reporter.note(note)
            results[stage.name] = made
    if until is not None and (folder / "comparison.json").exists():
        from stethoscope.report import render_report
        from stethoscope.results.edits import Edits

        whole = {stage.name: _provenance(stage, recipe, keys) for stage in chosen_stages(recipe, None)}
        if Edits.load_if_current(folder, whole["edit"]) is None:
            reporter.note(
                f"warning: the edit and the comparison in `{folder}` were made with other settings; `stethoscope run`"
                " makes them again"
            )
        render_report(folder)  # a finished run's report shows later results too
    return RunResult(folder=folder, results=MappingProxyType(results))


def _provenance(stage: Stage, recipe: Recipe, keys: dict[str, str]) -> Provenance:
    """The provenance of a stage's result, from the keys of what it needs; its own is added to them."""
    from stethoscope.context import provenance_of

    needed = {name: keys[name] for name in stage.needs(recipe)}
    provenance = provenance_of(recipe.seed, needed, stage.settings(recipe))
    keys[stage.name] = provenance.key
    return provenance


def _saved(stage: Stage, context: "Context", provenance: Provenance) -> Any:
    """The saved result of a stage, if it is current and whole; else None, and the stage is run again."""
    made = stage.load(context, provenance) if stage.load else None
    try:
        if made is not None:
            stage.check(context, made)
    except StethoscopeError as error:
        log.warning("%s: it is made again", error.message)
        return None
    return made


def chosen_stages(recipe: Recipe, until: str | None) -> list[Stage]:
    """The stages of a whole run, or the stage ``until`` with those that it needs, in order."""
    if until is None:
        return [stage for stage in stages.STAGES if stage.wanted(recipe)]
    known = {stage.name: stage for stage in stages.STAGES}
    chosen = {until, *known[until].also}
    for stage in reversed(stages.STAGES):
        if stage.name in chosen:
            chosen |= known.keys() & set(stage.needs(recipe))
    return [stage for stage in stages.STAGES if stage.name in chosen]
