"""What projecting a task vector costs beside reading it, on the Gemma-3-4B shape.

python benchmarks/projection.py --scratch FOLDER [--layers 2] [--features 512]

For each layer: the basis of the features' directions and the energy that it keeps in every tensor, against reading the
same tensors of base and tuned as float32 differences, in turns. `vs_read` is the ratio of the medians; `peak_rss_mb`
is the whole process', libraries included. FOLDER is that of benchmarks/edit.py, made if it is not there (13 GB).
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from edit import GEMMA, make_pair

from stethoscope.checkpoints.open import open_checkpoint, open_task_vector
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.editing.change import energy_along
from stethoscope.editing.residual_axis import residual_axes
from stethoscope.editing.subspace import nested_basis

RESULTS = Path(__file__).parent / "results" / "projection.json"


def read(task_vector: TaskVector, layer: int) -> None:
    """Every tensor of a layer as `TaskVector.delta` gives it."""
    for name in task_vector.names:
        if task_vector.base.entries[name].layer == layer:
            task_vector.delta(name)


def project(task_vector: TaskVector, layer: int, directions: torch.Tensor) -> float:
    """The share of a layer's energy that some directions keep."""
    Q = nested_basis(directions)[0]
    whole = kept = 0.0
    for name, axis in residual_axes(task_vector, [layer], len(Q)).items():
        if axis:
            energy, along = energy_along(task_vector, name, axis, Q)
            whole, kept = whole + energy, kept + float(along.sum())
    return kept / whole


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(scratch: Path, layers: int, features: int, rounds: int) -> dict[str, object]:
    base_path, tuned_path = make_pair(scratch, GEMMA)
    task_vector = open_task_vector(open_checkpoint(base_path), tuned_path)
    torch.manual_seed(0)
    directions = torch.randn(features, GEMMA["hidden_size"])
    times: dict[str, list[float]] = {"read": [], "project": [], "basis": []}
    shares = []
    for layer in range(layers):
        read(task_vector, layer)  # from the disk, which neither contender is charged for
        for _ in range(rounds):
            times["read"].append(seconds(lambda layer=layer: read(task_vector, layer)))
            times["project"].append(
                seconds(lambda layer=layer: shares.append(project(task_vector, layer, directions)))
            )  # fmt: skip
            times["basis"].append(seconds(lambda: nested_basis(directions)))
    medians = {name: statistics.median(several) for name, several in times.items()}
    return {
        "vs_read": round(medians["project"] / medians["read"], 3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "seconds_per_layer": {name: round(value, 4) for name, value in medians.items()},
        "energy_kept": round(statistics.mean(shares), 4),
        "chance": features / GEMMA["hidden_size"],
        "layers": layers,
        "features": features,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stethoscope-gemma-shape")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    load = os.getloadavg()
    found = measure(options.scratch.absolute(), options.layers, options.features, options.rounds)
    found["machine"] = {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()}
    print(json.dumps(found, indent=1))
    if not options.dry:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
