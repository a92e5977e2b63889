"""A whole run at the paper's size, on random weights of Gemma-3-4B-IT's shape: time and memory of every stage.

    python benchmarks/paper_size.py [--scratch FOLDER] [--layers 34] [--parts run floor keep kill]

run   `check` and `run` of recipes/gemma-3-4b-it.yaml with texts, tasks and arms of the world that paper_world.py makes,
      one control text, and 8 forwards in the search for the recommended edit.
floor what the diagnosis cannot do without: a forward, reading the encoders, and products with them.
keep  `edit --keep --protect` with 20,000 tokens a text; `--tokens` for fewer.
kill  the run killed in the middle of every stage and taken up again: the edited bytes are those of `run`.

Memory is anonymous (without file cache), sampled every 0.2 s. What is built or measured is not done again.
Results: benchmarks/results/paper_size.json.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from edit import environment
from filter import seconds
from paper_world import build
from safetensors.torch import load_file
from transformers import PreTrainedModel

from stethoscope.artifacts import sha256_files, write_json
from stethoscope.models.device import preferred_dtype
from stethoscope.models.forward import run
from stethoscope.models.load import load_model, load_tokenizer
from stethoscope.saes.open import open_saes
from stethoscope.text.documents import read_documents
from stethoscope.text.tokens import TokenBatch, batches, tokenize

RESULTS = Path(__file__).parent / "results" / "paper_size.json"


def counters(process: int, file: str) -> dict[str, int]:
    lines = (line.split(":") for line in Path(f"/proc/{process}/{file}").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in lines if value.split() and value.split()[0].isdigit()}


def watch(arguments: Sequence[str], *, kill: tuple[int, float] | None = None) -> dict[str, Any]:
    """A command of this program: seconds and peak memory of each stage and of the whole.

    Args:
        kill: after so many finished stages and so many seconds.
    """
    command, start = [sys.executable, "-m", "stethoscope.cli", *arguments], time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    said: list[str] = []
    stages: list[tuple[str, float]] = [("", 0.0)]  # with the time of their end

    def listen() -> None:
        assert process.stderr
        for line in process.stderr:
            said.append(line)
            if found := re.fullmatch(r"(\S.*?)\s+[\d.]+ s\n", line):
                stages.append((found[1], time.perf_counter() - start))

    ear = threading.Thread(target=listen)
    ear.start()
    samples, read = [(0.0, 0.0, 0.0)], 0  # time, GB, processor seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now, status = time.perf_counter() - start, counters(process.pid, "status")
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        used = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        samples.append((now, (status.get("RssAnon", 0) + status.get("RssShmem", 0)) / 1e6, used))
        read = counters(process.pid, "io").get("rchar", read)
        if kill and len(stages) > kill[0] and now - stages[kill[0]][1] >= kill[1]:
            process.kill()
        time.sleep(0.2)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    ear.join()
    if process.returncode and not kill:
        sys.exit(f"{' '.join(command)} failed:\n{''.join(said)[-3000:]}")

    def peak(begin: float, end: float) -> float:
        return round(max((gb for when, gb, _ in samples if begin <= when <= end), default=0.0), 2)

    def spent(begin: float, end: float) -> dict[str, float]:
        inside = [used for when, _, used in samples if begin <= when <= end] or [0.0]
        cpu = inside[-1] - inside[0]
        return {"seconds": round(end - begin, 1), "cpu_seconds": round(cpu, 1), "peak_gb": peak(begin, end)}

    spans = [(name, before, end) for (_, before), (name, end) in itertools.pairwise(stages)]
    return {
        "seconds": round(wall, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": peak(0, wall),
        "read_gb": round(read / 1e9, 2),
        "stages": {name: spent(begin, end) for name, begin, end in spans},
        "memory_gb_every_20_s": [peak(begin, begin + 20) for begin in range(0, round(wall), 20)],
    }


def read(world: Path, *, made_from: bool = False) -> tuple[PreTrainedModel, list[list[int]], list[TokenBatch]]:
    """The base, and the tokens and batches of the recipe's texts; ``made_from``: of those that make the filter."""
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    model, tokenizer, rows = load_model(world / "base"), load_tokenizer(world / "base"), []
    for name in ("target", "control"):
        found = read_documents(recipe[name]["dataset"], field="messages", limit=recipe[name]["documents"])
        rows += tokenize([one for n, one in enumerate(found) if not made_from or n % 5 != 4], tokenizer, max_tokens=512)
    return model, rows, list(batches(rows, tokenizer, batch_tokens=2048))


def forward(world: Path) -> dict[str, Any]:
    """A bare forward of the tokens that the filter is made from: four of five documents of each text."""
    model, rows, parts = read(world, made_from=True)
    with torch.no_grad():
        before = time.process_time()
        took = seconds(lambda: [run(model, batch.input_ids) for batch in parts])
    cpu = time.process_time() - before
    return {
        "seconds": round(took, 1),
        "cpu_seconds": round(cpu, 1),
        "tokens": sum(map(len, rows)),
        "dtype": str(model.dtype),
    }


def floor(world: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """The least that a diagnosis does, beside what it took in a whole run."""
    model, rows, parts = read(world)
    saes = yaml.safe_load((world / "recipe.yaml").read_text())["saes"]
    hidden = torch.ones(sum(map(len, rows)), model.config.get_text_config().hidden_size, dtype=model.dtype)

    def encode() -> None:
        for sae in open_saes(saes).values():
            hidden @ load_file(sae.path / sae.files[-1])["w_enc"].to(hidden.dtype)

    with torch.no_grad():
        took = {
            "forward_s": seconds(lambda: [run(model, batch.input_ids) for batch in parts]),
            "encode_s": seconds(encode),
        }
    diagnose = whole["stages"]["Diagnose: score every layer"]["seconds"]
    return {**took, "diagnose_s": diagnose, "diagnose_vs_floor": round(diagnose / sum(took.values()), 2)}


def whole_run(world: Path, layers: int) -> dict[str, Any]:
    recipe, out = str(world / "recipe.yaml"), ["--out", str(world / "run")]
    shutil.rmtree(world / "run", ignore_errors=True)
    found = {"check": watch(["check", recipe]), "run": watch(["run", recipe, *out])}
    found["geometry"] = watch(["geometry", recipe, *out])  # no arm of this run needs it
    bare = [sys.executable, __file__, "--only-forward", str(world)]
    found["forward"] = json.loads(subprocess.run(bare, capture_output=True, text=True, check=True).stdout)
    took = {name: one["cpu_seconds"] for part in ("geometry", "run") for name, one in found[part]["stages"].items()}
    comparison = json.loads((world / "run" / "comparison.json").read_text())
    return found | {
        # in processor time, which a busy machine does not distort
        "geometry_s_per_layer": round(took["Geometry: energy in the SAE subspace"] / layers, 2),
        "evidence_vs_diagnose": round(took["Evidence: strongest contexts"] / took["Diagnose: score every layer"], 3),
        "moments_and_filter_vs_forward": round(
            took["Filter: moments of target and protected text"] / found["forward"]["cpu_seconds"], 2
        ),
        "peak_gb": found["run"]["peak_gb"],
        "total_min": round(found["run"]["seconds"] / 60, 2),
        "verdicts": [one["verdict"] for one in comparison["contrasts"] if "verdict" in one],
    }


def keep(world: Path, tokens: int) -> dict[str, Any]:
    shutil.rmtree(world / "kept", ignore_errors=True)
    texts = [part for side, name in (("--keep", "target"), ("--protect", "control"))
             for part in (side, str(world / "texts" / f"{name}.jsonl"))]  # fmt: skip
    command = ["edit", "--base", str(world / "base"), "--tuned", str(world / "tuned"), "--field", "messages", *texts]
    return {"tokens": tokens, **watch([*command, "--tokens", str(tokens), "--out", str(world / "kept")])}


def killed(world: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Kill a run in the middle of every stage that takes a second."""
    out, whole = world / "killed", whole["stages"]
    shutil.rmtree(out, ignore_errors=True)
    command = ["run", str(world / "recipe.yaml"), "--out", str(out)]
    stages = [(n, name) for n, (name, stage) in enumerate(whole.items()) if stage["seconds"] >= 1]
    for number, name in stages:
        print("killed in", name, flush=True)
        watch(command, kill=(number, whole[name]["seconds"] / 2))
    watch(command)
    equal = edited_hash(out) == edited_hash(world / "run")
    return {"killed_in": [name for _, name in stages], "same_bytes": equal}


def edited_hash(folder: Path) -> str:
    return sha256_files(sorted((folder / "edited").glob("*.safetensors")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stethoscope-paper-size")
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--vision-layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=262208)
    parser.add_argument("--documents", type=int, default=16, help="target and as many control")
    parser.add_argument("--forwards", type=int, default=8, help="of the search for the recommended edit")
    parser.add_argument("--tokens", type=int, default=20_000, help="of each text of `keep`")
    parser.add_argument("--parts", nargs="+", default=["run"], choices=["run", "floor", "keep", "kill"])
    parser.add_argument("--again", action="store_true", help="measure again what was measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only-forward", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {name: value for name, value in vars(options).items() if name in build.__annotations__}
    world = options.scratch.absolute() / f"world-{options.layers}-{options.vocabulary}"
    if options.only_forward:
        print(json.dumps(forward(options.only_forward)))
        sys.exit()
    build(world, **sizes)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    if results.get("world") != sizes:
        results = {"world": sizes}
    measures = {
        "run": lambda: whole_run(world, options.layers),
        "floor": lambda: floor(world, results["run"]["run"]),
        "keep": lambda: keep(world, options.tokens),
        "kill": lambda: killed(world, results["run"]["run"]),
    }
    for part in options.parts:
        if options.again or part not in results:
            load = os.getloadavg()
            results[part] = measures[part]() | {"load_before": load, "load_after": os.getloadavg()}
            print(part, json.dumps(results[part], indent=1), flush=True)
            machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "dtype": str(preferred_dtype())}
            write_json(options.results, results | {"machine": machine})
