"""How often the tests of `stethoscope.evaluation.inference` are wrong, by simulation of paired items.

    python benchmarks/inference.py [--runs 2000]

Items are drawn from three outcomes: only the first arm right, only the second, no difference; half of the latter are
right under both. For n = 50, 540, 5000 items and 5, 15, 30, 45 % discordant ones it measures, without a true gain, how
often each test or 95 % interval calls a difference (5 % is promised); with a second arm that is worse by the margin,
how often it is called not inferior (2.5 %); with a true gain of a quarter of the discordance, how often the intervals
cover it (95 %) and how often the tests see it. Two minutes on a core. Results: benchmarks/results/inference.json.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stethoscope.artifacts import write_json
from stethoscope.evaluation.inference import mcnemar_exact, non_inferiority, paired_difference, unpaired_z

RESULTS = Path(__file__).parent / "results" / "inference.json"
ITEMS = (50, 540, 5000)
DISCORDANCE = (0.05, 0.15, 0.30, 0.45)
MARGIN = 0.02
RESAMPLES = 2000
FALSE = ("unpaired_z", "mcnemar", "bootstrap", "score")
COLUMNS = {
    "unpaired_z": "false: unpaired z",
    "mcnemar": "false: McNemar",
    "bootstrap": "false: bootstrap",
    "score": "false: score",
    "non_inferior": "false: not worse",
    "covers_bootstrap": "covers: bootstrap",
    "covers_score": "covers: score",
    "undefined_bootstrap": "no interval: bootstrap",
    "power_unpaired_z": "power: unpaired z",
    "power_mcnemar": "power: McNemar",
}


def draw(rng: np.random.Generator, n: int, discordance: float, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Results of both arms, shape [items], where the second is truly better by ``gain``."""
    shares = [(discordance - gain) / 2, (discordance + gain) / 2, (1 - discordance) / 2, (1 - discordance) / 2]
    only_a, only_b, both, neither = rng.multinomial(n, shares)
    counts = [only_a, only_b, both, neither]
    return np.repeat([1.0, 0.0, 1.0, 0.0], counts), np.repeat([0.0, 1.0, 1.0, 0.0], counts)


def simulate(n: int, discordance: float, runs: int, rng: np.random.Generator) -> dict[str, Any]:
    """Rates over ``runs`` drawn pairs of arms; an interval that is not defined claims nothing, so it covers."""
    gain = discordance / 4
    counts = dict.fromkeys(COLUMNS, 0)
    for _ in range(runs):
        same, better, worse = (draw(rng, n, discordance, true) for true in (0.0, gain, -MARGIN))
        for prefix, (a, b) in (("", same), ("power_", better)):
            z = unpaired_z(int(a.sum()), n, int(b.sum()), n).p_value
            counts[f"{prefix}unpaired_z"] += z is not None and z < 0.05
            counts[f"{prefix}mcnemar"] += mcnemar_exact(int((a > b).sum()), int((b > a).sum())).p_value < 0.05
        for method in ("bootstrap", "score"):
            covered = covers(*same, 0.0, method, rng)
            counts[method] += covered is False
            counts[f"covers_{method}"] += covers(*better, gain, method, rng) is not False
            if method == "bootstrap":
                counts["undefined_bootstrap"] += covered is None
        counts["non_inferior"] += bool(non_inferiority(*worse, MARGIN, rng=rng).shown)
    rates = {name: count / runs for name, count in counts.items()}
    return {"items": n, "discordance": discordance, "gain": gain, "margin": MARGIN, "runs": runs, **rates}


def covers(a: np.ndarray, b: np.ndarray, truth: float, method: Any, rng: np.random.Generator) -> bool | None:
    """Whether the interval holds the true difference; None where it is not defined."""
    found = paired_difference(a, b, method=method, resamples=RESAMPLES, rng=rng)
    return None if found.low is None or found.high is None else found.low <= truth <= found.high


def show(rows: list[dict[str, Any]]) -> None:
    """Every rate in percent; the sampling error of a rate near 5 % over 2000 runs is half a point."""
    table = Table("items", "discordant %", *COLUMNS.values(), box=None, header_style="bold")
    for row in rows:
        cells = [f"{100 * row[name]:.1f}" for name in COLUMNS]
        table.add_row(str(row["items"]), f"{100 * row['discordance']:g}", *cells)
    Console(width=140).print(table)


def main() -> None:
    """Run the simulation, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    start = time.perf_counter()
    seeds = iter(np.random.SeedSequence(options.seed).spawn(len(ITEMS) * len(DISCORDANCE)))
    rows = [
        simulate(n, share, options.runs, np.random.default_rng(next(seeds))) for n in ITEMS for share in DISCORDANCE
    ]
    show(rows)
    result = {
        "what": "rates of false claims and coverage over simulated pairs of arms",
        "alpha": 0.05,
        "seed": options.seed,
        "resamples": RESAMPLES,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "worst_false_positive": {name: max(row[name] for row in rows) for name in FALSE},
        "worst_coverage": {name: min(row[name] for row in rows) for name in COLUMNS if name.startswith("covers")},
        "worst_non_inferior": max(row["non_inferior"] for row in rows),
        "versions": {name: version(name) for name in ("numpy", "scipy", "sae-stethoscope")},
        "python": platform.python_version(),
        "rows": rows,
    }
    write_json(options.out, result)
    print(
        json.dumps({name: result[name] for name in ("worst_false_positive", "worst_coverage", "cpu_seconds")}, indent=1)
    )


if __name__ == "__main__":
    main()
