"""Scores on pairs of corpora without a difference: how often a layer is called significant, against the level.

    python benchmarks/scores.py [--base FOLDER] [--pairs 200] [--documents 128]

SmolLM2's activations on the demo's general text are collected once with the demo's SAEs, a block per document. The
documents are then split in two at random, a third and two thirds, again and again.
Results: benchmarks/results/scores.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import stethoscope_demo
from stethoscope.cli import cache_folder
from stethoscope.diagnosis.collect import collect_activations
from stethoscope.diagnosis.scores import SCORES
from stethoscope.diagnosis.uncertainty import assess
from stethoscope.models.load import load_model, load_tokenizer
from stethoscope.saes.open import open_saes
from stethoscope.text.documents import read_documents
from stethoscope_demo.base_model import unpack_base

RESULTS = Path(__file__).parent / "results" / "scores.json"
LEVEL = 0.05


def measure(base: Path, pairs: int, documents: int) -> dict[str, Any]:
    """Shares of pairs with any layer significant, adjusted for all layers, per score, with exact intervals."""
    folder = Path(str(stethoscope_demo.__file__)).parent
    texts = read_documents(folder / "data" / "general.jsonl", limit=documents)
    collected = collect_activations(
        load_model(base), load_tokenizer(base), open_saes(folder / "saes"), {"all": texts}, block_size=1,
        max_tokens=256, health_tokens=0,
    )["all"].statistics  # fmt: skip
    found: dict[str, Any] = {}
    for name, score in SCORES.items():
        for increments in (False, True):
            start = time.perf_counter()
            alarms = 0
            for seed in range(pairs):
                rng = np.random.default_rng(seed)
                order = rng.permutation(len(texts))
                third = len(texts) // 3
                target = collected.regroup(np.array_split(order[:third], 10))
                control = collected.regroup(np.array_split(order[third:], 20))
                judged = assess(target, control, score, permutations=99, resamples=2, rng=rng)
                judged = judged.increments() if increments else judged
                alarms += bool((judged.p_familywise <= LEVEL).any())
            interval = binomtest(alarms, pairs).proportion_ci(0.95)
            key = name + (" increment" if increments else "")
            found[key] = {
                "share": alarms / pairs,
                "interval": [round(interval.low, 4), round(interval.high, 4)],
                "within_binomial_error": bool(binomtest(alarms, pairs, LEVEL, alternative="greater").pvalue > 0.01),
            }
            print(f"{key:<26} {found[key]} {time.perf_counter() - start:.0f} s", flush=True)
    lengths = sorted(len(text) for text in texts)
    return {
        "level": LEVEL, "pairs": pairs, "documents": len(texts), "characters": [lengths[0], lengths[-1]],
        "layers": len(collected.layers), "false_alarms": found,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="SmolLM2's checkpoint; the demo's by default")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--documents", type=int, default=128)
    options = parser.parse_args()
    results = measure(options.base or unpack_base(cache_folder()), options.pairs, options.documents)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
