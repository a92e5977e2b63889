"""Compare the results of two run folders: a change of the program's structure must not change any value.

    git worktree add ../before main && ...                      # a run of the demo by each of two versions
    python benchmarks/same_values.py runs/before runs/after     # prints what differs; exit code 1 if anything does

Compared are every number and text in the JSON files (but not provenance, versions, times), the statistics, the edited
tensors by hash, and the outcomes by arm, task and item.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from stethoscope.artifacts import sha256_file

UNSTABLE = {"provenance", "inputs", "stethoscope", "versions", "created"}
RESULTS = ("diagnosis", "evidence", "selection", "claim", "geometry", "edits", "calibration", "comparison")


def differences(before: Any, after: Any, place: str) -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted((before.keys() | after.keys()) - UNSTABLE):
            if key not in before or key not in after:
                yield f"{place}.{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{place}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for n, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{place}[{n}]")
    elif before != after:
        yield f"{place}: {str(before)[:80]} -> {str(after)[:80]}"


def compare(before: Path, after: Path) -> Iterator[str]:
    """Where two run folders differ."""
    for name in RESULTS:
        paths = [folder / f"{name}.json" for folder in (before, after)]
        if any(path.exists() for path in paths):
            yield from differences(*(json.loads(path.read_text()) for path in paths), name)
    for path in ("statistics.safetensors", "peaks.safetensors", "bases.safetensors", "edited/model.safetensors"):
        found = [folder / path for folder in (before, after)]
        if any(one.exists() for one in found) and len({sha256_file(one) for one in found}) > 1:
            yield f"{path}: other bytes"
    paths = [folder / "outcomes.parquet" for folder in (before, after)]
    if any(path.exists() for path in paths) and not pd.read_parquet(paths[0]).equals(pd.read_parquet(paths[1])):
        yield "outcomes.parquet: other rows"


if __name__ == "__main__":
    found = list(compare(*map(Path, sys.argv[1:3])))
    print("\n".join(found) or "equal")
    sys.exit(bool(found))
