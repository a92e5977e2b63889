"""Results that show themselves: a sentence and a table, as text at a prompt and as HTML in a notebook."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

ROWS = 40  # of a longer table the middle is left out


class Shown:
    """A result's ``repr`` and its look in a notebook, from `_shown`."""

    def _shown(self) -> "tuple[str, pd.DataFrame]":
        """One sentence on the result, and the table below it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        sentence, frame = self._shown()
        table = frame.to_string(index=False, max_rows=ROWS, float_format="{:.4g}".format, na_rep="")
        return f"{type(self).__name__}: {sentence}\n{table}"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        sentence, frame = self._shown()
        table = frame.to_html(index=False, max_rows=ROWS, float_format="{:.4g}".format, na_rep="", border=0)
        return f"<p>{escape(sentence)}</p>\n{table}"
