"""Run a notebook's cells on a run's folder and keep what they show: python docs/scripts/run_notebook.py runs/demo

Cells find the run as `runs/demo`, wherever it lies, so that no place of this machine gets into the notebook.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import altair as alt
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "demo.ipynb"


def run_notebook(notebook: dict[str, Any], run: Path) -> dict[str, Any]:
    """The notebook with its code cells run in order, in one namespace, and their outputs in place of the old ones."""
    before, names, number, cells = Path.cwd(), {"__name__": "__main__"}, 0, []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs").mkdir()
        (Path(folder) / "runs" / "demo").symlink_to(run.resolve())
        os.chdir(folder)
        try:
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    number += 1
                    outputs = run_cell("".join(cell["source"]), names, number)
                    cell = {**cell, "execution_count": number, "outputs": outputs}
                cells.append(cell)
        finally:
            os.chdir(before)
    return {**notebook, "cells": cells}


def run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """One cell's outputs: what it printed, and its last line's value."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        outputs.append(
            {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": looks(value)}
        )
    return outputs


def looks(value: Any) -> dict[str, Any]:
    """How a value shows itself: a chart as a picture, which any notebook reader shows, a result as HTML, and text."""
    if isinstance(value, alt.TopLevelMixin):
        drawn, picture = io.BytesIO(), io.BytesIO()
        value.save(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(64).save(picture, format="png", optimize=True)  # a fifth of the bytes
        return {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": [f"<{type(value).__name__}>"]}
    found: dict[str, Any] = {"text/plain": lines(repr(value))}
    if hasattr(value, "_repr_html_"):
        found["text/html"] = lines(value._repr_html_())
    return found


def lines(text: str) -> list[str]:
    """Text as notebooks keep it."""
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    made = run_notebook(json.loads(NOTEBOOK.read_text(encoding="utf-8")), Path(sys.argv[1]))
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {NOTEBOOK}: {NOTEBOOK.stat().st_size / 1e3:.0f} kB")
