"""This machine's speeds in the kinds of work that a run is made of, measured in a second."""

import time
from functools import partial

import torch

# What stages reach of products as large as these: fitted on one thread of an EPYC to `demo --quick`; on two layers of
# Gemma-3-4B's shape with 16k features, diagnosis, evidence and geometry were checked. No GPU was measured.
REACHED = {"model": 0.7, "single": 0.7, "double": 0.7}


def measure(device: torch.device, dtype: torch.dtype, batch: int) -> dict[str, float]:
    """The operations or bytes a second that stages reach here: products of matrices, and passes over memory."""
    rows, d, size = (1024, 2048, 1 << 25) if device.type == "cpu" else (8192, 8192, 1 << 28)
    kinds = {"model": (rows, dtype), "decoding": (batch, dtype), "single": (rows, torch.float32)}
    found: dict[str, float] = {}
    for kind, (n, of) in (kinds | {"double": (rows, torch.float64)}).items():
        x, weights = (torch.ones(m, d, dtype=of, device=device) for m in (n, d))
        found[kind] = _speed(2.0 * n * d**2, partial(x.mm, weights))
    for kind, where in {"memory": device, "host": torch.device("cpu")}.items():
        found[kind] = _speed(8.0 * size, partial(torch.ones(size, device=where).add_, 1.0))
    return {kind: speed * REACHED.get(kind, 1.0) for kind, speed in found.items()}


def _speed(work: float, make: partial[torch.Tensor]) -> float:
    best, end = 0.0, time.perf_counter() + 0.12
    make()  # the first is slow
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        make().view(-1)[0].item()  # waits for a GPU
        best = max(best, work / (time.perf_counter() - start))
    return best
