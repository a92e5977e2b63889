"""Study 1, sites and seeds: do SAEs of another training, or that read MLPs, rank the layers alike?

    python studies/sites.py --data DIR [--vectors runs/studies] [--tokens 200000]

`--data` holds the public files named in the README beside the demo's SAEs. Trains SAEs as `stethoscope train-saes`
does, on `resid_post` with another seed and on `mlp_out`, and diagnoses every vector with each, beside the
demo's SAEs. What is there is kept. Writes `outcomes/sites.parquet`, a row per set of SAEs, vector, score and layer.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from common import NAMES, recipe_of, save

from stethoscope.cli import cache_folder
from stethoscope.cli.console import ConsoleReporter
from stethoscope.diagnosis.statistics import load_statistics
from stethoscope.models.load import load_tokenizer
from stethoscope.results.diagnosis import Diagnosis
from stethoscope.run import run_recipe
from stethoscope.saes.train import TrainingSettings, load_for_training, train_saes
from stethoscope.selection.baselines import text_scores
from stethoscope_demo.base_model import ORIGIN, unpack_base

SETS = {"resid_post, another seed": ("resid_post", 1), "mlp_out": ("mlp_out", 1)}
SCRIPT = Path(__file__).parents[1] / "demo" / "scripts" / "train_saes.py"


def train(data: Path, out: Path, *, site: str, seed: int, tokens: int) -> None:
    """SAEs of a site of every layer, on the demo's mixture of texts in another order."""
    spec = importlib.util.spec_from_file_location("train_saes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    base = unpack_base(cache_folder())
    model, tokenizer = load_for_training(base), load_tokenizer(base)
    documents, held_out = script.mixture(data, tokenizer, tokens=tokens, seed=seed)
    with ConsoleReporter().stage(f"Train SAEs: {out.name}") as advance:
        train_saes(
            model,
            tokenizer,
            documents,
            out,
            settings=TrainingSettings(width=1152, k=64, tokens=tokens, seed=seed, site=site, model_name=ORIGIN),
            held_out=held_out,
            progress=advance,
        )


def rows(name: str, vector: str, run: Path) -> list[dict[str, Any]]:
    """Every layer under every score that needs text alone."""
    scores = text_scores(load_statistics(run / "statistics.safetensors"))
    explained = {
        layer.layer: min(one.variance_explained or 0.0 for one in layer.health.values())
        for layer in Diagnosis.load(run).layers
    }
    return [
        {"saes": name, "vector": vector, "layer": layer, "score": score, "excess": value, "explained": explained[layer]}
        for score, (_, values) in scores.items()
        for layer, value in values.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path("runs/studies"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    options = parser.parse_args()
    table = [
        row
        for vector in NAMES
        if (run := options.vectors / vector / "run").exists()
        for row in rows("the demo's", vector, run)
    ]
    for name, (site, seed) in SETS.items():
        folder = options.vectors / "saes" / name.replace(", ", "-").replace(" ", "-")
        if not folder.exists():
            train(options.data, folder, site=site, seed=seed, tokens=options.tokens)
        for vector in NAMES:
            run = options.vectors / "sites" / folder.name / vector
            recipe = recipe_of(vector, options.vectors).model_copy(update={"saes": str(folder)})
            recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update={"include_flagged": True})})
            run_recipe(recipe, run, until="select", reporter=ConsoleReporter())
            table += rows(name, vector, run)
            save("sites", table)
