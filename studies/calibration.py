"""Study 3: calibration. Is the automatic choice near the best of its grid on text that the search has not seen?

    python studies/calibration.py [--vectors runs/studies] [--only math_0 ...]

Needs `choice.py` of the same vectors. Vectors done before are kept. Every edit that the search of `stethoscope
calibrate` tried is measured again on held-out text, and so is every other vector's choice. Writes
`outcomes/calibration.parquet`, a row per vector, edit, text and document.
"""

from collections.abc import Iterator
from typing import Any

from common import NAMES, Bench, arguments, recipe_of, resume

from stethoscope.cli.console import ConsoleReporter
from stethoscope.results.calibration import Calibration
from stethoscope.run import run_recipe


def rows(bench: Bench, choices: dict[str, Calibration]) -> Iterator[dict[str, Any]]:
    """Each edit's losses: the grid's points, then the choices made for the other vectors."""
    own = choices[bench.vector]
    edits = [("grid", f"{n}", point.coefficients) for n, point in enumerate(own.points) if point.coefficients]
    edits += [("choice of", name, found.coefficients) for name, found in choices.items() if found.coefficients]
    found = bench.gains([edit for _, _, edit in edits])
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
    options = arguments(__doc__).parse_args()
    choices = {
        name: run_recipe(
            recipe_of(name, options.vectors),
            options.vectors / name / "run",
            until="calibrate",
            reporter=ConsoleReporter(),
        ).results["calibrate"]
        for name in NAMES
    }
    resume("calibration", "vector", NAMES, options.only, lambda name: rows(Bench(name, options.vectors), choices))
