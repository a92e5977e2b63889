"""Results that show themselves: a sentence and a table, for a terminal, at a prompt and as HTML in a notebook."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Rows = list[list[str]]
NONE = "-"  # not defined, or not known


class Shown:
    """A result's table, ``repr`` and look in a notebook, from `_shown`."""

    def _shown(self) -> tuple[str, Rows]:
        """One sentence on the result, and a table as text, its header first."""
        raise NotImplementedError

    def table(self) -> Rows:
        """The result as a table of text, its header first."""
        return self._shown()[1]

    def __repr__(self) -> str:
        sentence, rows = self._shown()
        columns = [_aligned(column) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
        return "\n".join([f"{type(self).__name__}: {sentence}", *lines])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        sentence, (head, *body) = self._shown()
        lines = [_line(head, "th"), *(_line(row, "td") for row in body)]
        return f"<p>{escape(sentence)}</p>\n<table>\n" + "\n".join(lines) + "\n</table>"


def first_of(names: Sequence[str], most: int) -> str:
    """At most so many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def text_rows(records: Sequence[Mapping[Any, Any]], columns: Mapping[str, tuple[str, str]]) -> Rows:
    """Some columns of a frame's records as text.

    Args:
        columns: heading -> the column and its format; what is missing is ``-``.
    """
    # NaN is the one value that differs from itself
    body = [
        [
            NONE if (value := record[name]) is None or value != value else format(value, form)
            for name, form in columns.values()
        ]
        for record in records
    ]
    return [list(columns), *body]


def _aligned(cells: Sequence[str]) -> list[str]:
    """A column's cells as wide as the widest, numbers to the right."""
    width, numbers = max(map(len, cells)), all(cell[:1] in "+-0123456789" for cell in cells[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in cells]


def _line(cells: Sequence[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"
