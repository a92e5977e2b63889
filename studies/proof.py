"""Study 1, the frozen choice: accuracy on tasks and loss on text, for every vector, by `stethoscope run`.

    python studies/proof.py [--vectors runs/studies] [--only math_0 ...]

What was run before is read. Writes, of all vectors run so far, `outcomes/proof.parquet`, a row per vector, arm, task
and item, and `outcomes/proof_losses.parquet`, a row per vector, arm, text and document. It is also the check that a
vector is one: better on its own tasks, worse elsewhere. The arm `spread` is the selection of another run, by the policy
of that name, on the same items.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from common import NAMES, OUTCOMES, TEXTS, arguments, loss_rows, recipe_of, save

from stethoscope.cli.console import ConsoleReporter
from stethoscope.evaluation.text_loss import TextLoss
from stethoscope.recipe import Select
from stethoscope.run import run_recipe

OF_SPREAD = {"selected": "spread"}  # its arms by the name that they have here; the base is that of the first run


def losses(vector: str, run: Path, named: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Every arm's losses, as the run left them; only arms that are ``named``, if any are."""
    for text in TEXTS:
        for folder in sorted((run / "losses" / text.replace(" ", "-")).iterdir()):
            if arm := (named or {folder.name: folder.name}).get(folder.name):
                yield from loss_rows(TextLoss.load(folder).measured, vector=vector, arm=arm, text=text)


def run_spread(vector: str, vectors: Path) -> None:
    """The same recipe with one layer from each depth segment; what it shares with the first run is kept."""
    recipe, run, spread = recipe_of(vector, vectors), vectors / vector / "run", vectors / vector / "spread"
    if not spread.exists():
        shutil.copytree(run, spread, ignore=shutil.ignore_patterns("comparison.json"))
    select = Select(policy="spread", k=recipe.select.k)
    other = recipe.model_copy(update={"select": select, "arms": ("base", "selected")})
    run_recipe(other, spread, reporter=ConsoleReporter())


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    for vector in options.only:
        run_recipe(recipe_of(vector, options.vectors), options.vectors / vector / "run", reporter=ConsoleReporter())
        run_spread(vector, options.vectors)
    answered: list[pd.DataFrame] = []
    lost: list[dict[str, Any]] = []
    for vector in NAMES:
        for run, named in ((options.vectors / vector / "run", None), (options.vectors / vector / "spread", OF_SPREAD)):
            if (run / "comparison.json").exists():
                frame = pd.read_parquet(run / "outcomes.parquet").assign(vector=vector)
                answered.append(frame[frame.arm.isin(named)].replace({"arm": named}) if named else frame)
                lost += losses(vector, run, named)
    OUTCOMES.mkdir(exist_ok=True)
    pd.concat(answered).to_parquet(OUTCOMES / "proof.parquet", index=False)
    save("proof_losses", lost)
