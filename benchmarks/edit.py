"""Writing an edit, against mergekit and `cp -r`, on a pair of checkpoints with Gemma 3 4B's shapes.

    python benchmarks/edit.py --mergekit PATH/TO/mergekit-yaml [--scratch FOLDER] [--rounds 2]

Makes the pair once (2 x 7.8 GB of random bf16, kept in the scratch folder), then times every contender in turn,
A B C A B C, each in a process of its own, interpreter start included. Outputs are removed after each run. Before
each, dirty pages are flushed and the pair is read once, so that all find the same page cache as far as memory
allows. Results: benchmarks/results/edit.json. mergekit needs an environment of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stethoscope.checkpoints.header import build_header, read_header
from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.editing.plan import EditPlan
from stethoscope.editing.writer import write_edit

SELECTED = (8, 13, 17, 22, 27)
PLANS = {"raw5": EditPlan.for_layers(SELECTED), "all34": EditPlan.for_layers(range(34), coefficient=0.7)}
RESULTS = Path(__file__).parent / "results" / "edit.json"

GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
    "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
TINY = GEMMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 16, "vocab_size": 512}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A Gemma 3 text model's tensors by stored name."""
    d, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (d,), "mlp.down_proj": (d, mlp), "mlp.gate_proj": (mlp, d), "mlp.up_proj": (mlp, d),
            "post_attention_layernorm": (d,), "post_feedforward_layernorm": (d,), "pre_feedforward_layernorm": (d,),
            "self_attn.k_norm": (head,), "self_attn.k_proj": (kv, d), "self_attn.o_proj": (d, q),
            "self_attn.q_norm": (head,), "self_attn.q_proj": (q, d), "self_attn.v_proj": (kv, d),
        }  # fmt: skip
        tensors |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in block.items()}
    return tensors | {"model.norm.weight": (d,)}


def make_pair(scratch: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """Base and tuned in two shards each; tuned differs from base in the last bits of every weight."""
    base, tuned = scratch / "base", scratch / "tuned"
    if (base / "config.json").exists() and (tuned / "config.json").exists():
        return base, tuned
    tensors = list(shapes(config).items())
    half = f"model.layers.{config['num_hidden_layers'] * 2 // 5}."
    middle = next(i for i, (name, _) in enumerate(tensors) if name.startswith(half))
    shards = [dict(tensors[:middle]), dict(tensors[middle:])]
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    generator = np.random.default_rng(0)
    for folder in (base, tuned):
        folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        with (base / name).open("wb") as one, (tuned / name).open("wb") as two:
            header = build_header({tensor: ("BF16", shape) for tensor, shape in shard.items()})
            one.write(header)
            two.write(header)
            for shape in shard.values():
                left = int(np.prod(shape))
                while left:
                    count = min(left, 1 << 24)
                    bits = np.frombuffer(generator.bytes(2 * count), dtype=np.uint16)
                    # sign and mantissa as drawn, exponent one of two: |w| in [1/128, 1/32)
                    weights = (bits & 0x80FF) | 0x3C00
                    one.write(weights.tobytes())
                    two.write((weights ^ ((bits >> 8) & 0x3)).tobytes())
                    left -= count
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = 2 * sum(int(np.prod(shape)) for _, shape in tensors)
    for folder in (base, tuned):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return base, tuned


def run(command: Sequence[str], cwd: Path) -> dict[str, float]:
    """Run a command; wall and processor seconds, peak resident MB, GB read and written through system calls."""
    before = io_counters()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=cwd, stdout=errors, stderr=errors, env=environment())
        peak = 0.0
        while True:
            # rusage's peak would count this process's own memory at the fork
            peak = max(peak, peak_memory(process.pid))
            finished, status, usage = os.wait4(process.pid, os.WNOHANG)
            if finished:
                break
            time.sleep(0.01)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read().decode()[-3000:]}")
    after = io_counters()
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_mb": peak,
        "read_gb": (after["rchar"] - before["rchar"]) / 1e9,
        "written_gb": (after["wchar"] - before["wchar"]) / 1e9,
        "disk_read_gb": (after["read_bytes"] - before["read_bytes"]) / 1e9,
    }


def peak_memory(process: int) -> float:
    """The most memory a process has had resident so far, in MB; libraries and mapped files count."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def io_counters() -> dict[str, int]:
    """This process's and its finished children's; what mergekit maps into memory shows in disk reads only."""
    return {
        key: int(value) for key, value in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    }


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def mergekit_config(name: str, base: Path, tuned: Path) -> str:
    """The edit's own recipe with full paths, in bf16 throughout: what a user writes, and mergekit's fastest."""
    source = open_checkpoint(base)
    from stethoscope.editing.card import mergekit_recipe

    text = mergekit_recipe(open_task_vector(source, tuned), PLANS[name])
    assert text is not None
    recipe = yaml.safe_load(text)
    paths = {"base": str(base), "tuned": str(tuned)}
    recipe |= {"base_model": paths["base"], "dtype": "bfloat16"}
    del recipe["out_dtype"]
    for piece in recipe["slices"]:
        for part in piece["sources"]:
            part["model"] = paths[part["model"]]
    return yaml.safe_dump(recipe, sort_keys=False)


def check_recipe(mergekit: Path) -> dict[str, int]:
    """Run the recipes that edits come with through mergekit itself; how many tensors agree to the byte."""
    agree = differ = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base_path, tuned_path = make_pair(folder, TINY)
        base = open_checkpoint(base_path)
        change = open_task_vector(base, tuned_path)
        for number, layers in enumerate(({2: 1.0}, {0: 1.0, 5: 1.0}, {0: 0.7, 1: 0.7, 4: -0.5})):
            ours = write_edit(base, change, EditPlan.for_layers(layers), folder / f"ours{number}").path
            theirs = folder / f"theirs{number}"
            run(
                [
                    str(mergekit),
                    str(ours / "mergekit.yaml"),
                    str(theirs),
                    "--no-copy-tokenizer",
                    "--no-write-model-card",
                ],
                folder,
            )
            expected = {name: data for path in sorted(theirs.glob("*.safetensors")) for name, data in raw(path).items()}
            found = {name: data for path in sorted(ours.glob("*.safetensors")) for name, data in raw(path).items()}
            assert set(found) == set(expected)
            agree += sum(found[name] == expected[name] for name in found)
            differ += sum(found[name] != expected[name] for name in found)
    return {"tensors_equal": agree, "tensors_different": differ}


def raw(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {name: data[slot.start : slot.end] for name, slot in read_header(path).items()}


def settle(folders: Sequence[Path]) -> None:
    """Flush what the last contender left to write, and read the inputs."""
    os.sync()
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def measure(scratch: Path, mergekit: Path | None, rounds: int) -> dict[str, Any]:
    base, tuned = make_pair(scratch, GEMMA)
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    me = [sys.executable, str(Path(__file__).resolve()), "--scratch", str(scratch), "--write"]
    contenders = {
        "cp": ["cp", "-r", str(base), str(out)],
        "raw5": [*me, "raw5"],
        "mergekit_raw5": None,
        "raw5_patch": [*me, "raw5:patch"],
        "all34": [*me, "all34"],
        "mergekit_all34": None,
        "cp_sync": ["sh", "-c", f"cp -r {base} {out} && sync -f {out}"],
        "raw5_sync": [*me, "raw5:checkpoint:sync"],
    }
    for name in PLANS:
        if mergekit is not None:
            config = scratch / f"{name}.yaml"
            config.write_text(mergekit_config(name, base, tuned))
            contenders[f"mergekit_{name}"] = [
                str(mergekit),
                str(config),
                str(out),
                "--no-copy-tokenizer",
                "--no-write-model-card",
            ]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name, command in contenders.items() if command}
    for number in range(rounds):
        for name, command in contenders.items():
            if command is None or (number and name.endswith("_sync")):  # the slow ones once
                continue
            settle((base, tuned))
            runs[name].append(run(command, scratch))
            shutil.rmtree(out)
            print(name, {key: round(value, 2) for key, value in runs[name][-1].items()}, flush=True)
    return summary(runs)


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    wall = {name: statistics.median(run["wall_s"] for run in several) for name, several in runs.items()}

    def ratio(one: str, other: str) -> float | None:
        return round(wall[one] / wall[other], 4) if {one, other} <= set(wall) else None

    def work(one: str, other: str) -> float | None:
        cpu = {name: statistics.median(run["cpu_s"] for run in several) for name, several in runs.items()}
        return round(cpu[one] / cpu[other], 4) if {one, other} <= set(cpu) else None

    ours = [
        run["peak_rss_mb"]
        for name, several in runs.items()
        if name in ("raw5", "raw5_patch", "all34")
        for run in several
    ]
    return {
        "raw5_wall_vs_mergekit": ratio("raw5", "mergekit_raw5"),
        "raw5_wall_vs_cp": ratio("raw5", "cp"),
        "patch_wall_vs_mergekit": ratio("raw5_patch", "mergekit_raw5"),
        "all34_wall_vs_mergekit": ratio("all34", "mergekit_all34"),
        "raw5_sync_wall_vs_cp_sync": ratio("raw5_sync", "cp_sync"),
        "raw5_sync_wall_vs_mergekit": ratio("raw5_sync", "mergekit_raw5"),
        # processor time, start of the interpreter included: what a busy machine cannot distort as it does wall time
        "raw5_cpu_vs_mergekit": work("raw5", "mergekit_raw5"),
        "raw5_cpu_vs_cp": work("raw5", "cp"),
        "patch_cpu_vs_mergekit": work("raw5_patch", "mergekit_raw5"),
        "all34_cpu_vs_mergekit": work("all34", "mergekit_all34"),
        "peak_rss_mb": round(max(ours), 1),
        "runs": {name: [{k: round(v, 3) for k, v in run.items()} for run in several] for name, several in runs.items()},
    }


def write(scratch: Path, what: str) -> None:
    """What a contender of ours does."""
    plan, kind, sync = ([*what.split(":"), "checkpoint", ""] if ":" not in what else [*what.split(":"), ""])[:3]
    base = open_checkpoint(scratch / "base")
    change = open_task_vector(base, scratch / "tuned")
    write_edit(base, change, PLANS[plan], scratch / "out", kind=kind, sync=sync == "sync")  # type: ignore[arg-type]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stethoscope-gemma-shape")
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-yaml")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only-recipe", action="store_true", help="only compare recipes with mergekit's results")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.scratch, options.write)
        sys.exit()
    results: dict[str, Any] = {}
    if options.mergekit:
        results["recipe_vs_mergekit"] = check_recipe(options.mergekit.absolute())
        print(results, flush=True)
    if not options.only_recipe:
        mergekit = options.mergekit.absolute() if options.mergekit else None
        load = os.getloadavg()
        results = measure(options.scratch.absolute(), mergekit, options.rounds) | results
        results["machine"] = {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
