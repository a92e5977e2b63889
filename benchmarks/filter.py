"""What the filter costs: its moments beside the bare arithmetic that they need, its memory, and a whole edit.

    python benchmarks/filter.py [--tokens 20000] [--parts moments gemma edit] [--rounds 3]

moments  SmolLM2-135M-Instruct: `collect_moments` of two texts against the floor, in turns: one forward of the same
         tokens and, per batch and layer, X^T X in float32 of the four inputs' shapes. `moments_vs_floor` is the ratio
         of the medians of the rounds.
gemma    the same for one layer of Gemma 3 4B's shape with random weights.
memory   peak memory over the model's own beside the moments of one layer and the hidden states, in a process each.
edit     the whole of `stethoscope edit --keep --protect` on the demo's fine-tune, in a process of its own.

Results: benchmarks/results/filter.json. Text is random tokens, but for `edit`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from edit import GEMMA
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel

from stethoscope.checkpoints.names import parse_name
from stethoscope.cli import cache_folder
from stethoscope.editing.moments import collect_moments
from stethoscope.models.device import preferred_dtype
from stethoscope.models.forward import run
from stethoscope.models.load import decoder_layers, load_model
from stethoscope.run import Silent
from stethoscope.text.tokens import TokenBatch
from stethoscope_demo import recipe as demo
from stethoscope_demo.base_model import unpack_base

RESULTS = Path(__file__).parent / "results" / "filter.json"
BATCH, LENGTH = 8, 256  # 2048 tokens, as `edit` batches them


def text(tokens: int, vocabulary: int, seed: int) -> list[TokenBatch]:
    """Batches of random tokens that all count."""
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    return [
        TokenBatch(
            documents=tuple(range(BATCH)),
            input_ids=torch.randint(3, vocabulary, (BATCH, LENGTH), generator=generator),
            attention_mask=ones,
            countable=ones,
            predicted=ones,
        )
        for _ in range(-(-tokens // (BATCH * LENGTH)))
    ]


def names_of(model: PreTrainedModel) -> list[str]:
    """Canonical names of the blocks' matrices."""
    return [
        name.canonical
        for name in (parse_name(stored) for stored, p in model.named_parameters() if p.ndim == 2)
        if name.layer is not None
    ]


def widths(model: PreTrainedModel) -> list[int]:
    """The sizes of a block's four inputs."""
    block = decoder_layers(model)[0]
    matrices = (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj)
    return [matrix.in_features for matrix in matrices]


@torch.no_grad()
def floor(model: PreTrainedModel, texts: dict[str, list[TokenBatch]], inputs: Sequence[torch.Tensor]) -> None:
    """One forward of every batch, and the products of its inputs' moments."""
    for batches in texts.values():
        for batch in batches:
            run(model, batch.input_ids)
            for x in inputs * len(decoder_layers(model)):
                x.T @ x


def collect(model: PreTrainedModel, texts: dict[str, list[TokenBatch]]) -> None:
    for _ in collect_moments(model, texts, names_of(model)):
        pass


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak() -> float:
    """The most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gemma_layer(dtype: torch.dtype) -> PreTrainedModel:
    """One layer of Gemma 3 4B's shape with random weights and a small vocabulary."""
    sizes = {**GEMMA, "num_hidden_layers": 1, "vocab_size": 4096}
    config = Gemma3TextConfig(**{k: v for k, v in sizes.items() if k not in ("architectures", "model_type")})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def open_model(which: str) -> PreTrainedModel:
    return load_model(unpack_base(cache_folder())) if which == "moments" else gemma_layer(preferred_dtype())


def against_floor(which: str, tokens: int, rounds: int) -> dict[str, Any]:
    model = open_model(which)
    texts = {name: text(tokens, 4000, seed) for seed, name in enumerate(("target", "protected"))}
    inputs = [torch.randn(BATCH * LENGTH, width) for width in widths(model)]
    times: dict[str, list[float]] = {"floor": [], "moments": []}
    for _ in range(rounds):
        times["floor"].append(seconds(lambda: floor(model, texts, inputs)))
        times["moments"].append(seconds(lambda: collect(model, texts)))
    medians = {name: statistics.median(several) for name, several in times.items()}
    return {
        "moments_vs_floor": round(medians["moments"] / medians["floor"], 3),
        "seconds": {name: [round(one, 2) for one in several] for name, several in times.items()},
        "tokens": sum(batch.input_ids.numel() for batches in texts.values() for batch in batches),
        "dtype": str(model.dtype),
    }


def memory(which: str, tokens: int) -> dict[str, float]:
    """Peak over the model's own, and what it should be at most: one layer's moments, hidden states and 1 GB."""
    model = open_model(which)
    texts = {name: text(tokens, 4000, seed) for seed, name in enumerate(("target", "protected"))}
    with torch.no_grad():
        run(model, texts["target"][0].input_ids)
    before = peak()
    collect(model, texts)
    count = sum(batch.input_ids.numel() for batches in texts.values() for batch in batches)
    moments = len(texts) * sum(4 * width**2 for width in widths(model)) / 1e6
    hidden = count * widths(model)[0] * model.dtype.itemsize / 1e6
    return {"peak_over_model_mb": round(peak() - before, 1), "allowed_mb": round(moments + hidden + 1000, 1)}


def whole_edit(tokens: int) -> dict[str, Any]:
    """Seconds of the command, and what it says of the edit."""
    folder = demo.prepare_demo(cache_folder(), size="full", reporter=Silent()).parent
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "stethoscope.cli", "edit", "--base", str(unpack_base(cache_folder()))]
        command += ["--tuned", str(demo.ADAPTER), "--keep", str(folder / "held_out.jsonl"), "--prompt", "prompt"]
        command += ["--protect", str(folder / "control.jsonl"), "--tokens", str(tokens), "--json"]
        start = time.perf_counter()
        done = subprocess.run([*command, "--out", f"{scratch}/out"], capture_output=True, text=True, check=True)
        took = time.perf_counter() - start
    found = json.loads(done.stdout)
    return {
        "seconds": round(took, 1),
        "tokens": tokens,
        "strength": found["strength"],
        "documents": found["documents"],
        "variants": found["variants"],
        "phases": [line for line in done.stderr.splitlines() if line.endswith(" s")],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="of each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["moments", "gemma", "memory", "edit"])
    parser.add_argument("--only-memory", choices=["moments", "gemma"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_memory:
        print(json.dumps(memory(options.only_memory, options.tokens)))
        sys.exit()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    load = os.getloadavg()
    for part in options.parts:
        if part == "edit":
            found[part] = whole_edit(options.tokens)
        elif part == "memory":
            script = [sys.executable, __file__, "--tokens", str(options.tokens), "--only-memory"]
            for which in ("moments", "gemma"):
                done = subprocess.run([*script, which], capture_output=True, text=True, check=True)
                found.setdefault(part, {})[which] = json.loads(done.stdout)
        else:
            found[part] = against_floor(part, options.tokens, options.rounds)
        print(part, json.dumps(found[part], indent=1), flush=True)
    found["machine"] = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": load, "load_after": os.getloadavg(),
        "bf16": preferred_dtype() == torch.bfloat16,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
