"""Study 1, the frozen choice: accuracy on tasks and loss on text, for every vector, by `stethoscope run`.

    python studies/proof.py [--vectors runs/studies] [--only math_0 ...]

What was run before is read. Writes, of all vectors run so far, `outcomes/proof.parquet`, a row per vector, arm, task
and item, and `outcomes/proof_losses.parquet`, a row per vector, arm, text and document. It is also the check that a
vector is one: better on its own tasks, worse elsewhere.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from common import NAMES, OUTCOMES, TEXTS, loss_rows, recipe_of, save

from stethoscope.cli.console import ConsoleReporter
from stethoscope.evaluation.control import TextLoss
from stethoscope.pipeline import run_recipe


def losses(vector: str, run: Path) -> Iterator[dict[str, Any]]:
    """Every arm's losses, as the run left them."""
    for text in TEXTS:
        for folder in sorted((run / "losses" / text.replace(" ", "-")).iterdir()):
            yield from loss_rows(TextLoss.load(folder).measured, vector=vector, arm=folder.name, text=text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path("runs/studies"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args()
    for vector in options.only:
        run_recipe(recipe_of(vector, options.vectors), options.vectors / vector / "run", reporter=ConsoleReporter())
    runs = {vector: options.vectors / vector / "run" for vector in NAMES}
    done = {vector: run for vector, run in runs.items() if (run / "comparison.json").exists()}
    OUTCOMES.mkdir(exist_ok=True)
    answered = [pd.read_parquet(run / "outcomes.parquet").assign(vector=vector) for vector, run in done.items()]
    pd.concat(answered).to_parquet(OUTCOMES / "proof.parquet", index=False)
    save("proof_losses", [row for vector, run in done.items() for row in losses(vector, run)])
