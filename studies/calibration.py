"""Study 3: calibration. Is the automatic choice near the best of its grid on text that the search has not seen?

    python studies/calibration.py [--vectors runs/studies] [--only math_0 ...]

Needs `choice.py` of the same vectors. Vectors done before are kept. Every edit that the search of `stethoscope
calibrate` tried is measured again on held-out text, and so is every other vector's choice. Writes
`outcomes/calibration.parquet`, a row per vector, edit, text and document.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import NAMES, TEXTS, Bench, kept, recipe_of, save

from stethoscope.cli.console import ConsoleReporter
from stethoscope.corpus import batches
from stethoscope.editing.layers import LayerEdits
from stethoscope.pipeline import calibrate_recipe
from stethoscope.selection.calibration import Calibration
from stethoscope.selection.rivals import measure


def rows(bench: Bench, choices: dict[str, Calibration]) -> Iterator[dict[str, Any]]:
    """Each edit's losses: the grid's points, then the choices made for the other vectors."""
    own = choices[bench.vector]
    edits = [("grid", f"{n}", point.coefficients) for n, point in enumerate(own.points) if point.coefficients]
    edits += [("choice of", name, found.coefficients) for name, found in choices.items() if found.coefficients]
    texts = {}
    for name, text in zip(("target", "control"), TEXTS, strict=True):
        ids, starts = bench.tokens[text]
        texts[name] = list(batches(ids, bench.tokenizer, batch_tokens=2048, starts=starts))
    found = measure(bench.model, LayerEdits(bench.model, bench.task_vector), texts, [edit for _, _, edit in edits])
    for i, (kind, name, edit) in enumerate(edits):
        point = own.points[int(name)] if kind == "grid" else None
        for text, sums in found.sums.items():
            for document, gain in enumerate(sums[:, i].tolist()):
                yield {
                    "vector": bench.vector,
                    "kind": kind,
                    "edit": name,
                    "layers": sorted(edit),
                    "coefficient": next(iter(edit.values())),
                    "chosen": kind == "grid" and int(name) == own.choice,
                    "searched_gain": point.target_gain if point else None,
                    "searched_cost": point.control_cost if point else None,
                    "text": text,
                    "document": document,
                    "gain": gain,
                    "tokens": int(found.tokens[text][document]),
                }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args()
    choices = {
        name: calibrate_recipe(
            recipe_of(name, options.vectors), options.vectors / name / "run", reporter=ConsoleReporter()
        )
        for name in NAMES
    }
    done = {name: kept("calibration", vector=name) for name in NAMES}
    for name in options.only:
        if not done[name]:
            done[name] = list(rows(Bench(name, options.vectors), choices))
            save("calibration", [row for found in done.values() for row in found])
