"""Study 1: is the choice of layers better than chance? Every score's sets beside random ones, for every vector.

    python studies/choice.py [--vectors runs/studies] [--documents 24] [--random-sets 100]

Goes on where it stopped, vector by vector. Writes `outcomes/choice.parquet`: a row per vector, score and k with the
effect of the score's best k layers together and the shares of random sets that it beats, and a row per random set.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from stethoscope.cli import cache_folder
from stethoscope.cli.console import ConsoleReporter
from stethoscope.pipeline import judge_recipe
from stethoscope.recipe import Recipe
from stethoscope.selection.hearing import Beaten, Hearing
from stethoscope_demo.recipe import prepare_demo

OUTCOMES = Path(__file__).parent / "outcomes"
VECTORS = ("math_0", "math_1", "code", "words")  # the first is the demo's own


def rows(vector: str, found: Hearing) -> Iterator[dict[str, Any]]:
    """What a hearing found, a row per score and k and one per random set."""
    for name, score in found.scores.items():
        for k, one in score.sets.items():
            yield {
                "vector": vector,
                "set": "score",
                "score": name,
                "kind": score.kind,
                "k": k,
                "layers": list(one.effect.layers),
                "gain": one.effect.target_gain,
                "cost": one.effect.control_cost,
                "rank_correlation": score.gain.rho,
                **_beaten("equal_size", one.beaten),
                **_beaten("equal_energy", one.beaten_matched),
            }
    for k, drawn in found.random.items():
        for kind, matched, sets in (
            ("random, equal size", None, drawn.equal_size),
            *(("random, equal energy", name, sets) for name, sets in drawn.matched.items()),
        ):
            for one in sets:
                yield {
                    "vector": vector,
                    "set": kind,
                    "score": matched,
                    "k": k,
                    "layers": list(one.layers),
                    "gain": one.target_gain,
                    "cost": one.control_cost,
                }


def _beaten(name: str, found: Beaten | None) -> dict[str, float | None]:
    return {f"beats_{name}_{part}": getattr(found, part) if found else None for part in ("share", "low", "high")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path("runs/studies"))
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--random-sets", type=int, default=100)
    options = parser.parse_args()
    reporter = ConsoleReporter()
    table: list[dict[str, Any]] = []
    for vector in VECTORS:
        demo = prepare_demo(cache_folder(), quick=False, reporter=reporter) if vector == "math_0" else None
        recipe = Recipe.from_yaml(demo or options.vectors / vector / "recipe.yaml")
        found = judge_recipe(
            recipe,
            options.vectors / vector / "run",
            documents=options.documents,
            random_sets=options.random_sets,
            reporter=reporter,
        )
        table += rows(vector, found)
        OUTCOMES.mkdir(exist_ok=True)
        pd.DataFrame(table).to_parquet(OUTCOMES / "choice.parquet")  # what is done so far
