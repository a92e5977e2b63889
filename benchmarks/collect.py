"""Collecting every layer's SAE activations, against what a SAELens user writes today and against the hardware's floor.

    python benchmarks/collect.py [--base FOLDER] [--tokens 50000] [--rounds 2] [--device cpu]

Three contenders take turns, A B C A B C, on the same model, SAEs and tokens, in one process:

- ours: `collect_activations`, from strings to statistics, without SAE health (its cost, fixed, is reported beside);
- saelens: SAELens' model proxy with a cache of the layers' outputs, `sae.encode` layer by layer, sum and count over
  tokens; in float32, SAELens' default, and with model and SAEs in bfloat16;
- floor: the bare forward to the last layer and the bare matrix products, in the dtype that ours uses.

Two shapes: 30 layers x 4608 features, and 10 layers x 16384. Then a table of how our time grows, and the peak memory
of processes that collect few and many tokens. Results: benchmarks/results/collect.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.load_model import HookedProxyLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import stethoscope_demo
from stethoscope.cli import cache_folder
from stethoscope.diagnosis.collect import collect_activations
from stethoscope.models.device import preferred_dtype
from stethoscope.models.load import load_model, load_tokenizer
from stethoscope.models.sites import hook_point, read_activations
from stethoscope.text.documents import read_documents
from stethoscope_demo.base_model import unpack_base

RESULTS = Path(__file__).parent / "results" / "collect.json"
DOCUMENT = 256  # tokens: all documents are of this length, so that no contender can win by padding
BATCH = 8
SHAPES = {"30x4608": (30, 4608), "10x16384": (10, 16384)}


def make_documents(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[str]:
    """The demo's general text, cut into documents of exactly so many tokens, again and again."""
    folder = Path(str(stethoscope_demo.__file__)).parent
    ids: list[int] = tokenizer("\n".join(read_documents(folder / "data" / "general.jsonl")))["input_ids"]
    documents = []
    for start in range(0, len(ids) - 2 * DOCUMENT, DOCUMENT):
        piece = tokenizer(tokenizer.decode(ids[start : start + 2 * DOCUMENT]))["input_ids"][:DOCUMENT]
        text = tokenizer.decode(piece)
        if len(tokenizer(text)["input_ids"]) == DOCUMENT:
            documents.append(text)
    wanted = max(1, tokens // DOCUMENT)
    return (documents * (1 + wanted // len(documents)))[:wanted]


@torch.inference_mode()
def make_saes(model: PreTrainedModel, layers: list[int], width: int, ids: torch.Tensor) -> dict[int, SAE]:
    """JumpReLU SAEs with random directions, of whose features one in a hundred fires on a token."""
    activations = read_activations(model, {layer: hook_point(model, layer, "resid_post") for layer in layers}, ids)
    saes: dict[int, SAE] = {}
    for layer in layers:
        torch.manual_seed(layer)
        hidden = activations[layer][0, 1:].float().cpu()
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=hidden.shape[1], d_sae=width, apply_b_dec_to_input=False))
        sae.W_enc.data = torch.nn.functional.normalize(torch.randn(hidden.shape[1], width), dim=0)
        sae.W_dec.data = sae.W_enc.data.T.contiguous()
        sae.threshold.data = (hidden @ sae.W_enc).quantile(0.99, dim=0).clamp(min=1e-3)
        saes[layer] = sae.requires_grad_(False).to(device=str(model.device))
    return saes


@torch.inference_mode()
def saelens(proxy: HookedProxyLM, saes: Mapping[int, SAE], batches: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Mean activation and firing rate of every feature, as SAELens' tutorials go about it."""
    hooks = {layer: f"model.layers.{layer}" for layer in saes}
    sums = {layer: torch.zeros(2, int(sae.cfg.d_sae), device=sae.W_enc.device) for layer, sae in saes.items()}
    tokens = 0
    for ids in batches:
        _, cache = proxy.run_with_cache(ids, names_filter=list(hooks.values()))
        tokens += ids.numel()
        for layer, hook in hooks.items():
            activations = saes[layer].encode(cache[hook])
            sums[layer][0] += activations.sum((0, 1))
            sums[layer][1] += (activations > 0).sum((0, 1))
    return {layer: values / tokens for layer, values in sums.items()}


@torch.inference_mode()
def floor(model: PreTrainedModel, weights: Mapping[int, torch.Tensor], batches: list[torch.Tensor]) -> None:
    """The forward and the products, and nothing done with them."""
    points = {layer: hook_point(model, layer, "resid_post") for layer in weights}
    for ids in batches:
        for layer, hidden in read_activations(model, points, ids).items():
            torch.mm(hidden.flatten(0, 1).to(weights[layer].dtype), weights[layer])


def compare(base: Path, tokens: int, rounds: int, device: str) -> dict[str, Any]:
    """Every contender on both shapes."""
    dtype = preferred_dtype(device)
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=dtype).to(device)
    precise = load_model(base, dtype=torch.float32).to(device)
    documents = make_documents(tokenizer, tokens)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in documents], device=device)
    batches = list(ids.split(BATCH))
    found: dict[str, Any] = {}
    for name, (count, width) in SHAPES.items():
        depth = len(model.model.layers)
        layers = [round(i * (depth - 1) / (count - 1)) for i in range(count)]
        saes = make_saes(model, layers, width, ids[:1])
        low = {layer: _in(sae, torch.bfloat16) for layer, sae in saes.items()}
        weights = {layer: sae.W_enc.to(dtype) for layer, sae in saes.items()}
        proxies = [HookedProxyLM(m, tokenizer, [f"model.layers.{n}" for n in layers]) for m in (precise, model)]
        contenders: dict[str, Callable[[], Any]] = {
            "ours": lambda s=saes: collect_activations(model, tokenizer, s, {"text": documents}, health_tokens=0),
            "ours_with_health": lambda s=saes: collect_activations(model, tokenizer, s, {"text": documents}),
            "saelens_float32": lambda s=saes, p=proxies[0]: saelens(p, s, batches),
            "saelens_bfloat16": lambda s=low, p=proxies[1]: saelens(p, s, batches),
            "floor": lambda w=weights: floor(model, w, batches),
        }
        times: dict[str, list[float]] = {contender: [] for contender in contenders}
        results: dict[str, Any] = {}
        for _ in range(rounds):
            for contender, run in contenders.items():
                start = time.perf_counter()
                results[contender] = run()
                _synchronise(device)
                times[contender].append(time.perf_counter() - start)
                print(f"{name} {contender:<18} {times[contender][-1]:8.2f} s", flush=True)
        wall = {contender: statistics.median(several) for contender, several in times.items()}
        activations = results["ours"]["text"].statistics.layers
        difference = max(
            float(abs(activations[n].rate - results["saelens_float32"][n][1].cpu().double().numpy()).max())
            for n in layers
        )
        found[name] = {
            "vs_saelens": round(wall["saelens_float32"] / wall["ours"], 2),
            "vs_saelens_bfloat16": round(wall["saelens_bfloat16"] / wall["ours"], 2),
            "vs_floor": round(wall["ours"] / wall["floor"], 3),
            "health_s": round(wall["ours_with_health"] - wall["ours"], 2),
            "largest_difference_of_rates": round(difference, 5),
            "tokens_per_s": {contender: round(ids.numel() / seconds, 1) for contender, seconds in wall.items()},
            "times_s": {contender: [round(t, 3) for t in several] for contender, several in times.items()},
        }
        for proxy in proxies:
            for module in proxy.named_modules_dict.values():
                module._forward_hooks.clear()
    return found


def growth(base: Path, device: str) -> list[dict[str, float]]:
    """Our time as layers, width and tokens grow."""
    tokenizer, model = load_tokenizer(base), load_model(base).to(device)
    rows = []
    for layers, width, tokens in [
        (30, 4608, 8192), (10, 4608, 8192), (3, 4608, 8192), (30, 1152, 8192), (30, 16384, 8192), (30, 4608, 4096),
        (30, 4608, 16384),
    ]:  # fmt: skip
        documents = make_documents(tokenizer, tokens)
        ids = torch.tensor([tokenizer(documents[0])["input_ids"]], device=device)
        # the deepest layer is always among them, so that the forward is as long
        saes = make_saes(model, list(range(30 - layers, 30)), width, ids)
        start = time.perf_counter()
        collect_activations(model, tokenizer, saes, {"text": documents}, health_tokens=0)
        _synchronise(device)
        seconds = time.perf_counter() - start
        rows.append(
            {"layers": layers, "width": width, "tokens": tokens, "seconds": round(seconds, 2),
             "us_per_token": round(seconds / tokens * 1e6, 1)}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def memory(base: Path, tokens: int) -> float:
    """Peak resident MB of a process that collects the activations of so many tokens; called in a process of its own."""
    tokenizer, model = load_tokenizer(base), load_model(base)
    documents = make_documents(tokenizer, tokens)
    ids = torch.tensor([tokenizer(documents[0])["input_ids"]])
    saes = make_saes(model, list(range(20, 30)), 4608, ids)
    collect_activations(model, tokenizer, saes, {"text": documents}, block_size=len(documents), health_tokens=0)
    # rusage's peak would count the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _in(sae: SAE, dtype: torch.dtype) -> SAE:
    copy = JumpReLUSAE(JumpReLUSAEConfig.from_dict(sae.cfg.to_dict()))
    copy.load_state_dict(sae.state_dict())
    return copy.requires_grad_(False).to(dtype=dtype, device=str(sae.W_enc.device))


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="SmolLM2's checkpoint; the demo's by default")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkpoint = options.base or unpack_base(cache_folder())
    if options.memory:
        print(memory(checkpoint, options.memory))
        sys.exit()
    made = compare(checkpoint, options.tokens, options.rounds, options.device)
    peaks = {}
    for tokens in (4096, 32768):
        command = [sys.executable, __file__, "--base", str(checkpoint), "--memory", str(tokens)]
        peaks[tokens] = round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    summary = {
        "vs_saelens": min(shape["vs_saelens"] for shape in made.values()),
        "vs_floor": max(shape["vs_floor"] for shape in made.values()),
        "how": "vs_saelens: wall of SAELens in float32 over ours; vs_floor: ours over the floor; the worse shape",
        "shapes": made,
        "growth": growth(checkpoint, options.device),
        "peak_rss_mb_by_tokens": peaks,
        "settings": {"tokens": options.tokens, "document": DOCUMENT, "rounds": options.rounds},
        "machine": {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "dtype": str(preferred_dtype(options.device)),
            "capability": torch.backends.cpu.get_cpu_capability(), "load": os.getloadavg(),
        },
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    path = RESULTS if options.device == "cpu" else RESULTS.with_name("collect_cuda.json")
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({key: summary[key] for key in ("vs_saelens", "vs_floor", "peak_rss_mb_by_tokens")}))
