"""Collecting activations on the workers of a Ray cluster: is the time what its parts say, and does memory stay flat?

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--documents 256] [--rounds 1] [--parts memory time]

A Llama of 8 layers and SAEs of 4096 features, both with random weights, read generated text in this process and with
one and two workers, in turn; every sum is compared. The model of the time is

    start + load + work / workers + pieces * handling + finish

with nothing fitted: `start` is a worker's start, `load` its model and SAEs, `handling` what a piece costs that comes
back at once with as many bytes, `finish` what the driver does before and after; `work` is what this process takes
for the pieces. Before that memory is watched while a corpus of ten times the budget passes through. One thread
everywhere. Results: benchmarks/results/scaling.json, where a part that is not asked for stays as it is. About three
minutes on two cores.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import psutil
import ray
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stethoscope.artifacts import write_json
from stethoscope.diagnosis.collect import Collector, Piece, collect_activations
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.executor import LocalExecutor, RayExecutor, WorkerContext, versions
from stethoscope.models.load import load_model, load_tokenizer
from stethoscope.recipe import Ray
from stethoscope.saes.open import open_saes

RESULTS = Path(__file__).parent / "results" / "scaling.json"
LAYERS, HIDDEN, WIDTH = 8, 512, 4096
BLOCK = 16
BUDGET = 8 << 20  # bytes that documents on their way may take; the corpus has ten times as many
LENGTH = 8192  # bytes of a document of that corpus
OBJECT_STORE = 400 << 20  # bytes
NAP = 2.0  # seconds, so long that each worker gets a piece
LINES = 48  # tokens of it that are read


def make_world(folder: Path) -> None:
    """Model, tokenizer and SAEs on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=built, **special).save_pretrained(folder / "base")
    for layer in range(LAYERS):
        sae = StandardSAE(StandardSAEConfig(d_in=HIDDEN, d_sae=WIDTH))
        sae.W_enc.data = torch.randn_like(sae.W_enc) / HIDDEN**0.5
        sae.cfg.metadata.hook_name = f"model.layers.{layer}"
        sae.save_model(folder / "saes" / f"layer_{layer}")


def make_texts(count: int) -> list[str]:
    """Words in any order, 120 to 360 bytes."""
    rng = np.random.default_rng(0)
    words = np.array(["river", "stone", "cloud", "maple", "ember", "seven", "twelve", "adds", "to", "makes"])
    return [" ".join(rng.choice(words, int(n))) for n in rng.integers(24, 72, size=count)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def same(ours: Any, theirs: Any) -> bool:
    """All arrays of all layers, bit for bit, and the SAEs' health."""
    names = ("sums", "fired", "tokens", "sinks")
    return all(
        one.health == theirs[corpus].health
        and np.array_equal(getattr(found, name), getattr(theirs[corpus].statistics.layers[layer], name))
        for corpus, one in ours.items()
        for layer, found in one.statistics.layers.items()
        for name in names
    )


class Clocked(LocalExecutor):
    """This process, with the time that the pieces take by themselves."""

    def map_pieces(self, task: Any, pieces: Any, *, setup: Any) -> Iterator[tuple[int, Any]]:
        self.seconds: list[float] = []

        def clocked(tool: Any, piece: Any) -> Any:
            seconds, self.result = timed(lambda: task(tool, piece))
            self.seconds.append(seconds)
            return self.result

        return super().map_pieces(clocked, pieces, setup=setup)


def measure_time(world: Path, documents: int, rounds: int) -> dict[str, Any]:
    """Each part of the model, and the whole with one and two workers."""
    model, tokenizer, saes = load_model(world / "base"), load_tokenizer(world / "base"), open_saes(world / "saes")
    texts = {"text": make_texts(documents)}
    pieces = -(-documents // BLOCK)
    collect = partial(collect_activations, model, tokenizer, saes, texts, block_size=BLOCK)
    rows: list[dict[str, Any]] = []
    expected: Any = None
    for number in range(rounds):
        clock = Clocked(model=model, tokenizer=tokenizer)
        alone, collected = timed(lambda clock=clock: collect(executor=clock))
        expected = expected or collected
        block = clock.result
        # the first piece also loads the encoders and measures the health of the SAEs
        work, finish = sum(clock.seconds[1:]), alone - sum(clock.seconds)
        row: dict[str, Any] = {
            "alone": alone, "work": work, "first": clock.seconds[0], "finish": finish, "workers": {}
        }  # fmt: skip
        for workers in (1, 2):
            with workers_of(world, workers) as executor:
                start = timed(lambda executor=executor: nothing(executor))[0] - NAP
                load, _ = timed(lambda executor=executor: loading(executor, saes, model.dtype))
                handling, _ = timed(lambda executor=executor, block=block: echo(executor, block, 64))
            with workers_of(world, workers) as executor:
                measured, found = timed(lambda executor=executor: collect(executor=executor))
            assert same(found, expected), "other sums"
            parts = {"start": start, "load": load, "handling": handling / 64}
            modelled = start + load + (row["first"] + work) / workers + pieces * handling / 64 + finish
            row["workers"][workers] = {**parts, "modelled": modelled, "measured": measured}
            print(number, workers, {k: round(v, 2) for k, v in row["workers"][workers].items()}, flush=True)
        rows.append(row)
    middle = {
        workers: {
            name: statistics.median(row["workers"][workers][name] for row in rows) for name in rows[0]["workers"][1]
        }
        for workers in (1, 2)
    }
    result_bytes = sum(
        getattr(layer, name).nbytes
        for layer in block.statistics.layers.values()
        for name in ("sums", "fired", "tokens", "sinks")
    )
    return {
        "documents": documents,
        "tokens": int(next(iter(expected["text"].statistics.layers.values())).tokens.sum()),
        "pieces": pieces,
        "bytes_of_a_piece": {"out": sum(len(t) for t in texts["text"]) // pieces, "back": result_bytes},
        "sums_equal_to_the_bit": True,
        "alone_s": statistics.median(row["alone"] for row in rows),
        "work_s": statistics.median(row["work"] for row in rows),
        "first_s": statistics.median(row["first"] for row in rows),
        "finish_s": statistics.median(row["finish"] for row in rows),
        "workers": middle,
        "modelled_over_measured": {w: found["modelled"] / found["measured"] for w, found in middle.items()},
        "rounds": rows,
    }


def workers_of(world: Path, workers: int) -> RayExecutor:
    return RayExecutor(Ray(workers=workers, threads=1), WorkerContext(base=world / "base"))


def nothing(executor: RayExecutor) -> None:
    """Until every worker has answered."""
    naps = [NAP] * executor.workers
    list(executor.map_pieces(lambda tool, seconds: time.sleep(seconds), naps, setup=lambda context: None))


def loading(executor: RayExecutor, saes: Any, dtype: torch.dtype) -> None:
    """Each worker loads model and SAEs once, side by side."""

    def setup(context: WorkerContext) -> Any:
        options = {"saes": saes, "site": "resid_post", "max_tokens": 64, "tokens": "all", "dtype": dtype}
        return Collector(context, **options).collect(Piece(layers=tuple(saes), documents={0: "one"}))

    list(executor.map_pieces(lambda tool, piece: None, range(executor.workers), setup=setup))


def echo(executor: RayExecutor, block: Any, count: int) -> None:
    """Pieces that come back at once, with as many bytes as a block's statistics have, and are put in place."""
    table = FeatureStatistics.zeros({n: one.sums.shape[1] for n, one in block.statistics.layers.items()}, count)
    for number, found in executor.map_pieces(lambda tool, piece: tool, range(count), setup=lambda context: block):
        table.put(number, found.statistics)


def worker_pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "ray::Worker" in " ".join(child.cmdline())]


@contextmanager
def watched() -> Iterator[list[dict[str, float]]]:
    """Memory of the driver, the workers and the object store, twice a second."""
    seen, stop = [], threading.Event()
    start = time.perf_counter()

    def look() -> None:
        while not stop.wait(0.5):
            total = ray.cluster_resources().get("object_store_memory", 0)
            left = ray.available_resources().get("object_store_memory", 0)
            row = {
                "s": time.perf_counter() - start,
                "driver_mb": own_memory(os.getpid()),
                "store_mb": (total - left) / 1e6,
            }
            seen.append(row | {"workers_mb": sum(map(own_memory, worker_pids()))})

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def own_memory(pid: int) -> float:
    """Megabytes that are a process' own: pages of mapped files, which the system takes back, are left out."""
    try:
        found = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return 0.0
    return (found.rss - found.shared) / 1e6


def measure_memory(world: Path) -> dict[str, Any]:
    """A corpus on disk of ten times the budget, read as it is needed."""
    count = 10 * BUDGET // LENGTH
    rng = np.random.default_rng(1)

    def rows() -> Iterator[dict[str, str]]:
        for _ in range(count):
            letters = rng.integers(97, 123, LENGTH, dtype=np.uint8)
            letters[5::6] = 32
            yield {"text": letters.tobytes().decode()}

    datasets.disable_progress_bars()
    datasets.Dataset.from_generator(rows, cache_dir=str(world / "cache")).save_to_disk(world / "corpus")
    texts = datasets.load_from_disk(str(world / "corpus"))["text"]
    assert not isinstance(texts, list)
    model, tokenizer, saes = load_model(world / "base"), load_tokenizer(world / "base"), open_saes(world / "saes")
    # many small blocks: what a block leaves behind, its statistics, is counted too
    few, block = {layer: saes[layer] for layer in (0, 1)}, 64
    with workers_of(world, 2) as executor, watched() as seen:
        seconds, collected = timed(
            lambda: collect_activations(
                model,
                tokenizer,
                few,
                {"text": texts},
                block_size=block,
                max_tokens=LINES,
                health_tokens=LINES,
                executor=executor,
            )
        )
    # from when both workers have loaded and begun
    steady = [row for row in seen if row["s"] > 0.4 * seconds]
    return {
        "budget_mb": BUDGET / 1e6,
        "corpus_mb": count * LENGTH / 1e6,
        "documents_of_a_piece_mb": block * LENGTH / 1e6,
        "statistics_mb": sum(
            getattr(layer, name).nbytes / 1e6
            for layer in collected["text"].statistics.layers.values()
            for name in ("sums", "fired", "tokens", "sinks")
        ),
        "seconds": seconds,
        "growth_mb": {
            name: max(row[name] for row in steady) - steady[0][name] for name in ("driver_mb", "workers_mb", "store_mb")
        },
        "over_time": [
            {name: round(value, 1) for name, value in row.items()} for row in seen[:: max(1, len(seen) // 24)]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=["memory", "time"], default=["memory", "time"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    # memory first: what was used before would hide what grows
    measures = {
        "memory": measure_memory,
        "time": lambda world: measure_time(world, options.documents, options.rounds),
    }
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=OBJECT_STORE)
        for part in [part for part in measures if part in options.parts]:
            load = os.getloadavg()[0]
            found[part] = measures[part](world) | {"load_before": load}
        ray.shutdown()
    found["machine"] = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    found["versions"] = versions() | {"ray": ray.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, found)
    for part in options.parts:
        print(part, {name: found[part].get(name) for name in ("modelled_over_measured", "growth_mb")})


if __name__ == "__main__":
    main()
