"""What a person sees: a bar per stage, tables and lines; data goes to stdout, everything else to stderr."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

out = Console()
err = Console(stderr=True)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to run.")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Run folder; `runs/RECIPE` if not given.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


class ConsoleReporter:
    """One bar with the time left per stage on a terminal; one plain line per stage elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int], None]]:
        start = time.perf_counter()
        if self.quiet or not err.is_terminal:
            yield lambda _done, _total: None
        else:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description:<34}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=err, transient=True) as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        if not self.quiet:
            err.print(f"{title:<34} {time.perf_counter() - start:6.1f} s", highlight=False)

    def note(self, text: str) -> None:
        if not self.quiet:
            err.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """A line on stdout as it stands: not folded, coloured or read as markup."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """The same on stderr."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def say_json(value: Any) -> None:
    """Data for machines on stdout."""
    print(json.dumps(value, indent=1))  # noqa: T201 - the one place that prints


def show_rows(rows: list[list[str]], *, left: int) -> None:
    """A table with its first columns to the left and numbers to the right, as wide as it is, and an empty line."""
    table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for column in table.columns[left:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=240).print(table, "")  # at its own width: folded numbers cannot be read
