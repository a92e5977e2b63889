"""Output to the terminal: a bar per stage; at a command's end a table, a verdict, paths written and the next command.

Data goes to stdout, everything else to stderr.
"""

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column

from stethoscope.display import aligned

_out = Console()
_err = Console(stderr=True)

LINE_SECONDS = 60.0  # between lines on a stage that goes on, where there is no terminal to draw a bar on


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
    """Write a line with the share done and the time left, at most one per `LINE_SECONDS`."""
    last = start

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= LINE_SECONDS and 0 < done < total:
            last, left = now, round((now - start) * (total - done) / done)
            warn(f"{title:<34} {now - start:6.1f} s, {done / total:.0%}, about {timedelta(seconds=left)} left")

    return advance


def conclude(
    value: Any,
    *,
    as_json: bool,
    rows: Sequence[Sequence[str]] = (),
    says: Sequence[str] = (),
    wrote: Sequence[Path] = (),
    then: str = "",
) -> None:
    """End a command with the value as JSON, or with a table, sentences, the paths written and the next command.

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
    """A command of this program as a line for the shell."""
    return shlex.join(["stethoscope", *map(str, words)])


def say(text: str) -> None:
    """Print a line on stdout, not folded, coloured or read as markup."""
    _out.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a line on stderr, likewise."""
    _err.print(text, highlight=False, markup=False, soft_wrap=True)


def say_json(value: Any) -> None:
    """Print JSON on stdout."""
    print(json.dumps(value, indent=1))  # noqa: T201 - the one place that prints


class WarningPrinter(logging.Handler):
    """Prints what the library warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(f"warning: {record.getMessage()}")


def show_rows(rows: Sequence[Sequence[str]]) -> None:
    """A table, as wide as it is since folded numbers cannot be read, and an empty line."""
    head, *lines = aligned(rows)
    _out.print(head, style="bold", highlight=False, markup=False, soft_wrap=True)
    for line in (*lines, ""):
        say(line)
