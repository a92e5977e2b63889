"""What a person sees: a bar per stage, and at a command's end a table, a verdict, what was written and what comes next.

Data goes to stdout, everything else to stderr.
"""

import json
import logging
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column

from stethoscope.display import aligned

_out = Console()
_err = Console(stderr=True)

for_this_command = ExitStack()  # closed when the command ends
LINE_SECONDS = 60.0  # between lines on a stage that goes on, where there is no terminal to draw a bar on


@contextmanager
def _hushed() -> Iterator[None]:
    """No warning of any library, by whichever way it warns; errors stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        logging.disable(before)


def _hush(quiet: bool) -> bool:
    if quiet:
        for_this_command.enter_context(_hushed())
    return quiet


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to run.")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Run folder; `runs/RECIPE` if not given.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe, such as `select.k=3`; repeatable."),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray", metavar="auto|ADDRESS", help="Share the work on a Ray cluster; `auto` starts one here."),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Of the cluster; as many as it has room for if not given.")]
GPUs = Annotated[float | None, typer.Option("--gpus", min=0, help="Of each worker; 0.5 for half a GPU, 0 for CPUs.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda|auto",
        help="Where this process computes; `auto` (default): a GPU if there is one.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", callback=_hush, help="No progress and no warnings: only the result.")]


class ConsoleReporter:
    """One bar with the time left per stage on a terminal; plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int], None]]:
        start = time.perf_counter()
        if self.quiet:
            yield lambda _done, _total: None
            return
        if _err.is_terminal:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description:<34}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=20),  # a line of 80 holds it all
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            # the speed is the whole stage's: a step may take longer than the 30 s that rich looks back by default
            with Progress(*columns, console=_err, transient=True, speed_estimate_period=1e9) as bar:
                task = bar.add_task(title, total=None)
                yield lambda done, total: bar.update(task, completed=done, total=total)
        else:
            yield _lines(title, start)
        _err.print(f"{title:<34} {time.perf_counter() - start:6.1f} s", highlight=False)

    def note(self, text: str) -> None:
        if not self.quiet:
            warn(f"  {text}")


def _lines(title: str, start: float) -> Callable[[int, int], None]:
    """Says now and then how far a stage is and how long it will take."""
    said = start

    def advance(done: int, total: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said >= LINE_SECONDS and 0 < done < total:
            said = now
            left = (now - start) * (total - done) / done
            warn(f"{title:<34} {now - start:6.1f} s, {done / total:.0%}, about {_duration(left)} left")

    return advance


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def conclude(
    value: Any,
    *,
    as_json: bool,
    rows: Sequence[Sequence[str]] = (),
    says: Sequence[str] = (),
    wrote: Sequence[Path] = (),
    then: str = "",
) -> None:
    """A command's end: the value as JSON, or a table, sentences, the paths written and the next command.

    Args:
        rows: the table, its header first.
        then: a command line, from `command_line`.
    """
    if as_json:
        say_json(value)
        return
    if rows:
        show_rows(rows)
    for sentence in says:
        say(sentence)
    if (rows or says) and (wrote or then):
        say("")
    for path in wrote:
        say(f"wrote {path}")
    if then:
        say(f"next: {then}")


def command_line(*words: object) -> str:
    """What to type for a command of this program."""
    return shlex.join(["stethoscope", *map(str, words)])


def say(text: str) -> None:
    """A line on stdout as it stands: not folded, coloured or read as markup."""
    _out.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """The same on stderr."""
    _err.print(text, highlight=False, markup=False, soft_wrap=True)


def say_json(value: Any) -> None:
    """Data for machines on stdout."""
    print(json.dumps(value, indent=1))  # noqa: T201 - the one place that prints


def show_rows(rows: Sequence[Sequence[str]]) -> None:
    """A table, as wide as it is since folded numbers cannot be read, and an empty line."""
    head, *lines = aligned(rows)
    _out.print(head, style="bold", highlight=False, markup=False, soft_wrap=True)
    for line in (*lines, ""):
        say(line)
