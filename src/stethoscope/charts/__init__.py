"""The charts of saved results, from rows of plain values: a result's ``plot()`` makes the rows."""
