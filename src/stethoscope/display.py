"""How values are written, for a terminal, a notebook and the report: numbers, percent, intervals, p-values, tables.

A table is rows of text, its header first. What is not defined or not known is ``-``. All is plain text: the report's
page alone sets true minus signs.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

Rows = list[list[str]]
NONE = "-"


def number(value: float | None, form: str) -> str:
    """A value in a format such as ``+.1f``, zero itself without a minus sign; ``-`` for None and NaN."""
    return NONE if value is None or value != value else format(value + 0.0, form)


def percent(share: float | None, form: str = ".1f") -> str:
    """A share in percent, or a difference of shares in points with ``+.1f``."""
    return NONE if share is None else number(100 * share, form)


def interval(low: float | None, high: float | None, form: str = "+.1f", scale: int = 1) -> str:
    """Both ends of an interval, times ``scale``."""
    if low is None or high is None:
        return NONE
    return f"{number(scale * low, form)} to {number(scale * high, form)}"


def p_value(p: float | None) -> str:
    """A p-value with two digits."""
    return number(p, ".2g")


def listed(values: Iterable[object]) -> str:
    """Values with commas between."""
    return ", ".join(map(str, values))


def ranged(numbers: Iterable[int]) -> str:
    """Whole numbers in order, three or more in a row as a range: ``0-3, 7, 8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else listed(run) for run in runs)


def first_of(names: Sequence[object], most: int) -> str:
    """At most so many names, and how many more there are."""
    return listed(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names joined by underscores -> without the words that all of them begin with."""
    parts = [name.split("_") for name in names]
    shared = 0
    while len(names) > 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1 and shared + 1 < min(map(len, parts)):
        shared += 1
    return {name: "_".join(p[shared:]) for name, p in zip(names, parts, strict=True)}


def table_of(records: Iterable[Mapping[str, str]]) -> Rows:
    """Records with the same keys as rows, the keys first; empty without records."""
    rows = list(records)
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each column holds numbers, which stand to the right."""
    return [all(cell[:1] in "+-0123456789" for cell in column[1:]) for column in zip(*rows, strict=True)]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of equal columns, numbers to the right."""
    columns = []
    for column, right in zip(zip(*rows, strict=True), numeric(rows), strict=True):
        width = max(map(len, column))
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


class Display:
    """A result's text and HTML at a prompt and in a notebook, from its ``verdict`` and its table."""

    if TYPE_CHECKING:

        @property
        def verdict(self) -> str: ...

    def table(self) -> Rows:
        """The result as rows of text, the header first."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return "\n".join([f"{type(self).__name__}: {self.verdict}", *aligned(self.table())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        head, *body = self.table()
        lines = [_html_row(head, "th"), *(_html_row(row, "td") for row in body)]
        return f"<p>{escape(self.verdict)}</p>\n<table>\n" + "\n".join(lines) + "\n</table>"


def _html_row(cells: Sequence[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"
