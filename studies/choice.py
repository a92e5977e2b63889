"""Study 1: is the choice of layers better than chance? Every score's sets beside random ones, for every vector.

    python studies/choice.py [--vectors runs/studies] [--only math_0 ...] [--documents 8] [--random-sets 100]

What was judged before is read. Writes `outcomes/choice.parquet`, of all vectors judged so far: a row per vector, score
and k with the effect of the score's best k layers together and the shares of random sets that it beats, a row per
random set, and a row per layer alone.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from common import JUDGED_ON, NAMES, OUTCOMES, arguments, energies, recipe_of

from stethoscope.cli.console import ConsoleReporter
from stethoscope.recipe import Validation
from stethoscope.results.validation import Beaten, ScoreValidation, SetEffect
from stethoscope.run import run_recipe


def rows(vector: str, found: ScoreValidation, energy: dict[int, float]) -> Iterator[dict[str, Any]]:
    """What `validate` found: a row per score and k, per random set, and per layer."""

    def row(drawn: str, one: SetEffect, **more: Any) -> dict[str, Any]:
        return {
            "vector": vector,
            "set": drawn,
            "k": len(one.layers),
            "layers": list(one.layers),
            "gain": one.target_gain,
            "cost": one.control_cost,
            "energy": sum(energy[layer] for layer in one.layers) / sum(energy.values()),
            **more,
        }

    for name, score in found.scores.items():
        for best in score.sets.values():
            yield row(
                "score",
                best.effect,
                score=name,
                kind=score.kind,
                rho=score.gain.rho,
                rho_low=score.gain.low,
                rho_high=score.gain.high,
                **_beaten("equal_size", best.beaten),
                **_beaten("equal_energy", best.beaten_matched),
            )
    for drawn in found.random.values():
        for one in drawn.equal_size:
            yield row("random, equal size", one)
        for name, sets in drawn.matched.items():
            for one in sets:
                yield row("random, equal energy", one, score=name)
    for one in found.injected:
        (layer,) = one.layers
        yield row("alone", one, **{f"value of {name}": score.values[layer] for name, score in found.scores.items()})


def _beaten(name: str, found: Beaten | None) -> dict[str, float | None]:
    return {f"beats_{name}_{part}": getattr(found, part) if found else None for part in ("share", "low", "high")}


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=int, default=JUDGED_ON)
    parser.add_argument("--random-sets", type=int, default=100)
    options = parser.parse_args()
    for vector in options.only:
        judged = Validation(documents=options.documents, random_sets=options.random_sets, matched=("mass_shift",))
        recipe = recipe_of(vector, options.vectors).model_copy(update={"validation": judged})
        run_recipe(recipe, options.vectors / vector / "run", until="validate", reporter=ConsoleReporter())
    table = [
        row
        for vector in NAMES
        if (folder := options.vectors / vector / "run" / "validation" / "control").exists()
        for row in rows(vector, ScoreValidation.load(folder), energies(recipe_of(vector, options.vectors)))
    ]
    OUTCOMES.mkdir(exist_ok=True)
    pd.DataFrame(table).to_parquet(OUTCOMES / "choice.parquet")
