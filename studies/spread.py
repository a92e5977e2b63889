"""Study 1b: the best layer of each of k depth segments, beside random layers and random ones of each depth segment.

    python studies/spread.py [--vectors runs/studies] [--only math_0 ...] [--random-sets 100]

Needs `choice.py` of the same vectors, on whose texts sets are judged. Vectors done before are kept. Writes
`outcomes/spread.parquet`, a row per vector, k and set of layers with its effect.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from common import JUDGED_ON, NAMES, OUTCOMES, TEXTS, Bench, arguments, resume

from stethoscope.recipe import Select
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.selection.policies import depth_segments, select

SIZES = (3, 5, 8)


def rows(bench: Bench, random_sets: int) -> Iterator[dict[str, Any]]:
    """Each score's best layer of every depth segment, and random ones."""
    choice = pd.read_parquet(OUTCOMES / "choice.parquet").query("vector == @bench.vector")
    alone = choice[choice.set == "alone"]
    depth = [int(layer) for (layer,) in alone.layers]
    scores = [name.removeprefix("value of ") for name in map(str, alone) if name.startswith("value of ")]
    values = {score: dict(zip(depth, alone[f"value of {score}"], strict=True)) for score in scores}
    rng = np.random.default_rng(0)
    sets: list[dict[str, Any]] = []
    for k in SIZES:
        runs = depth_segments(depth, k)
        for score, value in values.items():
            best = [max(run, key=value.__getitem__) for run in runs]
            sets.append({"set": "score", "score": score, "k": k, "layers": best})
        for _ in range(random_sets):
            drawn = [int(rng.choice(run)) for run in runs]
            sets.append({"set": "random, one a stretch", "score": None, "k": k, "layers": drawn})
        # the product's own policy, and what `choice.py` measured, so that both speak of the same things
        spread = select(Diagnosis.load(bench.run), Select(policy="spread", k=k)).layers
        assert spread == tuple(next(s for s in sets if s["score"] == "mass_shift" and s["k"] == k)["layers"])
        top = choice[(choice.set == "score") & (choice.score == "mass_shift") & (choice.k == k)].iloc[0]
        sets.append({"set": "top", "score": "mass_shift", "k": k, "layers": list(map(int, top.layers))})
    edits = [dict.fromkeys(one["layers"], 1.0) for one in sets]
    found = bench.gains(edits, (TEXTS[0], "control"), JUDGED_ON, bench.recipe.diagnose.max_tokens)
    gain, control = (found.sums[side].sum(0) / found.tokens[side].sum() for side in ("target", "control"))
    for one, fall, saved in zip(sets, gain.tolist(), control.tolist(), strict=True):
        yield {"vector": bench.vector, **one, "gain": fall, "cost": -saved}


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--random-sets", type=int, default=100)
    options = parser.parse_args()
    resume("spread", "vector", NAMES, options.only, lambda v: rows(Bench(v, options.vectors), options.random_sets))
