"""Evaluating a real model as this package does it, against lm-evaluation-harness' own Hugging Face backend.

    python benchmarks/evaluate.py [--model FOLDER] [--items 200] [--batch-size 32] [--rounds 2]

One process, one float32 model, one set of requests: four-shot prompts of over 700 tokens with items made here, in
Minerva Math's form, with its stop and the harness' limit of 256 new tokens. Ours and plain `HFLM` generate all
responses in turn, A B A B; every response is compared. Then ten arms of the same live model are evaluated, counting
model loads. The model is the demo's SmolLM2-135M-Instruct unless a checkpoint is given. Two rounds take about 40
minutes on one quiet core. Results: benchmarks/results/evaluate.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import write_json
from stethoscope.cli import cache_folder
from stethoscope.evaluation.harness import SharedPrefixLM
from stethoscope.evaluation.run import evaluate, load_tasks
from stethoscope.models.load import load_model, load_tokenizer

RESULTS = Path(__file__).parent / "results" / "evaluate.json"
TASK = "sums_in_boxes"
SHOTS = 4
NAMES = ("Ada", "Bo", "Cleo", "Dov", "Edda", "Finn", "Gul", "Hana")
THINGS = ("pears", "marbles", "stamps", "shells", "buttons", "candles", "tickets", "beads")


def make_item(rng: np.random.Generator) -> dict[str, str]:
    """A word problem and its solution, step by step, in about 170 tokens."""
    boxes, ones, more = (int(n) for n in rng.integers(3, 10, size=3))
    tens = 10 * int(rng.integers(1, 5))
    name, other = rng.choice(NAMES, 2, replace=False)
    thing = rng.choice(THINGS)
    a, b = boxes * tens, boxes * ones
    return {
        "problem": f"{name} has {boxes} boxes with {tens + ones} {thing} in each of them, and then finds {more} more"
        f" {thing} under the stairs. How many {thing} does {name} have before giving any of them to {other}?",
        "solution": f"First count the {thing} that are in the boxes. Each box has {tens + ones} {thing}, which is"
        f" {tens} and {ones}. The tens make {boxes} times {tens}, which is {a}. The ones make {boxes} times {ones},"
        f" which is {b}. Together the boxes hold {a} + {b} = {a + b} {thing}. Then there are the {more} {thing} under"
        f" the stairs, so {name} has {a + b} + {more} = {a + b + more} {thing} in all. Nothing was given to {other}.\n"
        f"Final Answer: The final answer is ${a + b + more}$. I hope it is correct.",
        "answer": str(a + b + more),
    }


def write_task(folder: Path, count: int) -> None:
    """A four-shot task of ``count`` different items in Minerva's form, with its stops and the harness' length limit."""
    rng = np.random.default_rng(0)
    items: dict[str, dict[str, str]] = {}
    while len(items) < count + SHOTS:
        item = make_item(rng)
        items[item["problem"]] = item
    rows = list(items.values())
    files = {"shots": rows[:SHOTS], "test": rows[SHOTS:]}
    for split, chosen in files.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    config = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in files}},
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_split": "shots",
        "num_fewshot": SHOTS,
        "fewshot_config": {"sampler": "first_n", "split": "shots", "doc_to_target": "{{solution}}"},
        "doc_to_text": "Problem:\n{{problem}}\n\nSolution:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Problem:"], "do_sample": False, "temperature": 0.0},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": r"The final answer is \$(.*?)\$"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def alternate(lms: dict[str, HFLM], requests: list[Any], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every round and the last responses, by contender."""
    seconds: dict[str, list[float]] = {name: [] for name in lms}
    responses = {}
    for number in range(rounds):
        for name, lm in lms.items():
            start = time.perf_counter()
            responses[name] = lm.generate_until(requests, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - start)
            print(f"round {number + 1}: {name} {len(requests) / seconds[name][-1]:.3f} items/s", flush=True)
    return seconds, responses


def scaled(model: PreTrainedModel, layer: int) -> Callable[[], AbstractContextManager[None]]:
    """An arm: one layer's MLP output a tenth larger, exchanged by pointer as `editing.apply` does it."""
    weight = model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight
    changed = weight.data * 1.1

    @contextmanager
    def enter() -> Iterator[None]:
        before = weight.data
        weight.data = changed
        try:
            yield
        finally:
            weight.data = before

    return enter


def tenth_arm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Path, out: Path) -> dict[str, Any]:
    """Ten arms of four items each: seconds of each arm from first to last, and models loaded meanwhile."""
    loads: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained
    AutoModelForCausalLM.from_pretrained = lambda *a, **k: loads.append(a) or load(*a, **k)
    arms = {f"arm_{layer}": scaled(model, layer) for layer in range(10)}
    ends: dict[str, float] = {}
    start = time.perf_counter()
    try:
        evaluate(
            model, tokenizer, arms, [TASK], out=out, include_path=tasks, limit=4, batch_size=4,
            keys={arm: arm for arm in arms},
            progress=lambda _done, _total, said: ends.update({said.split(":")[0]: time.perf_counter()}),
        )  # fmt: skip
    finally:
        AutoModelForCausalLM.from_pretrained = load
    times = np.diff([start, *ends.values()]).round(2).tolist()
    return {"model_loads": len(loads), "items": 4, "first_arm_seconds": times[0], "tenth_arm_seconds": times[-1]}


def main() -> None:
    """Run the benchmark, print what it finds, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; the demo's base model if not given")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.model is None:
        from stethoscope_demo.base_model import unpack_base

        options.model = unpack_base(cache_folder())
    start = time.perf_counter()
    model = load_model(options.model, dtype=torch.float32)
    tokenizer = load_tokenizer(options.model)
    loading = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "cache"
        tasks = Path(scratch) / "tasks"
        tasks.mkdir()
        write_task(tasks, options.items)
        task = load_tasks([TASK], tasks)[TASK]
        task.build_all_requests()
        prompts = [len(tokenizer(request.args[0])["input_ids"]) for request in task.instances]
        lms = {
            "ours": SharedPrefixLM(model, tokenizer, batch_size=options.batch_size),
            "harness": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
        }
        seconds, responses = alternate(lms, task.instances, options.rounds)
        arms = tenth_arm(model, tokenizer, tasks, Path(scratch) / "arms")
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["harness"], strict=True)]
    same = [a == b for a, b in zip(responses["ours"], responses["harness"], strict=True)]
    written = [lms["ours"].generation(*request.args) for request in task.instances]
    result = {
        "what": "greedy generation of a live model, this package over lm-evaluation-harness' HFLM",
        "vs_harness": round(statistics.median(ratios), 2),
        "same_responses": sum(same) / len(same),
        "rounds": [round(ratio, 2) for ratio in ratios],
        "items": options.items,
        "shots": SHOTS,
        "prompt_tokens": {"least": min(prompts), "median": statistics.median(prompts), "most": max(prompts)},
        "generated_tokens": {
            "median": statistics.median(found.tokens for found in written),
            "cut_off": sum(found.truncated for found in written),
        },
        "items_per_second": {name: [round(options.items / s, 3) for s in found] for name, found in seconds.items()},
        "tenth_arm": {**arms, "load_seconds_saved": round(loading, 2)},
        "batch_size": options.batch_size,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "model": options.model.name,
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers", "sae-stethoscope")},
    }
    write_json(options.out, result)
    print(json.dumps({name: result[name] for name in ("vs_harness", "same_responses", "tenth_arm")}, indent=1))


if __name__ == "__main__":
    main()
