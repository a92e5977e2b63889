"""Options that several commands have, each declared once, and the values that are more than a word or a number."""

import inspect
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stethoscope.cli.console import command_line
from stethoscope.errors import StethoscopeError

if TYPE_CHECKING:
    from stethoscope.recipe import Recipe


def hush(quiet: bool) -> bool:
    """Suppress or show the warnings of libraries, from `warnings` and from `logging`; errors stay."""
    logging.captureWarnings(quiet)
    logging.disable(logging.WARNING if quiet else logging.NOTSET)
    return quiet


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Recipe file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Run folder; `runs/RECIPE` by default.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe, such as `select.k=3`; repeatable."),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON on stdout.")]
RayAddress = Annotated[
    str | None, typer.Option("--ray", metavar="auto|ADDRESS", help="Ray cluster to use; `auto` starts one here.")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Number of workers; as many as fit by default.")]
GPUs = Annotated[float | None, typer.Option("--gpus", min=0, help="GPUs per worker, such as 0.5; 0 for CPUs only.")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda|auto", help="Device of this process; `auto` is a GPU if there is one."),
]
Quiet = Annotated[bool, typer.Option("--quiet", callback=hush, help="No progress and no warnings.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Layers = Annotated[str, typer.Option(help="Layers, such as `3,5-8`, or `all`.")]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The options of commands that run a recipe."""

    recipe: RecipePath
    out: RunFolder = None
    changes: Changes = None
    ray: RayAddress = None
    workers: Workers = None
    gpus: GPUs = None
    device: Device = None
    quiet: Quiet = False
    as_json: AsJSON = False

    def read(self) -> "tuple[Recipe, Path]":
        """The recipe, with what the options change in it, and its run folder."""
        from stethoscope.recipe import Ray, Recipe

        chosen = Recipe.from_yaml(self.recipe, self.changes or ())
        workers = {"address": self.ray, "workers": self.workers, "gpus": self.gpus}
        if given := {name: value for name, value in workers.items() if value is not None}:
            chosen = chosen.model_copy(update={"ray": (chosen.ray or Ray()).model_copy(update=given)})
        if self.device:
            chosen = chosen.model_copy(update={"device": self.device})
        return chosen, self.out or Path("runs") / self.recipe.stem

    def next(self, command: str, *more: str) -> str:
        """The command line of another command for the same recipe and folder, with what the options change in it."""
        own = {"--out": self.out, "--ray": self.ray, "--workers": self.workers, "--gpus": self.gpus}
        pairs = [*own.items(), ("--device", self.device), *(("--set", change) for change in self.changes or ())]
        words = [word for name, value in pairs if value is not None for word in (name, value)]
        return command_line(command, self.recipe, *words, *more)


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `RecipeOptions`, which it takes as its first parameter."""
    names = [field.name for field in fields(RecipeOptions)]
    _, *others = inspect.signature(command).parameters.values()
    own = inspect.signature(RecipeOptions).parameters.values()

    @wraps(command)
    def run(**values: Any) -> None:
        command(RecipeOptions(**{name: values.pop(name) for name in names}), **values)

    by_keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *others)]
    run.__signature__ = inspect.Signature(by_keyword)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in by_keyword}
    del run.__wrapped__
    return run


def parse_layers(text: str) -> list[int]:
    """Layer numbers from `3,5-8`, each once.

    Raises:
        StethoscopeError: the text is something else.
    """
    layers: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)  # no model has 10,000 layers
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise StethoscopeError(
                f"`{part[:80]}` in `--layers` is neither a layer nor a range that rises", hint="write `3,5-8`, or `all`"
            )
        layers |= dict.fromkeys(range(first, last + 1))
    return list(layers)


def labelled(text: str) -> tuple[str, str | None]:
    """A path and the name after its last `=`, if there is one; a path that exists may contain `=` itself."""
    path, found, name = text.rpartition("=")
    return (path, name) if found and path and name and not Path(text).exists() else (text, None)


def parse_margin(text: str) -> tuple[str, float]:
    """A task and its margin from `TASK=0.05`; the task is empty if there is none.

    Raises:
        StethoscopeError: the margin is not a number above 0, or without a task not a share.
    """
    task, _, loss = text.rpartition("=")
    try:
        margin = float(loss)
    except ValueError:
        margin = math.nan
    if not 0 < margin < (math.inf if task else 1):
        kind = "a number above 0" if task else "a share between 0 and 1"
        raise StethoscopeError(f"the margin `{text}` is not {kind}", hint="`--margin 0.02`, or `TASK=0.05`")
    return task, margin
