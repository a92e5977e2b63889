"""Outcomes as logs of lm-evaluation-harness, for tools that read those.

write_logs(Outcomes.load(Path("run/outcomes.parquet")), Path("logs"))   # logs/ARM/samples_TASK_TIME.jsonl
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from stethoscope.artifacts import sha256_bytes, write_text
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import Outcomes

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Tasks that extract inside their scoring function: what the harness logs as filtered is the whole response.
_UNFILTERED = "minerva_math"


def write_logs(
    outcomes: Outcomes,
    out: Path,
    tasks: "Mapping[str, Task] | None" = None,
    *,
    arms: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write what `lm_eval --log_samples --output_path OUT` would have: a folder per arm, a file per task.

    A log has a line per item and filter. What another filter than the first took from a response is not kept in
    outcomes, so its lines have its metrics and no filtered response.

    Args:
        tasks: the tasks as they were run (`tasks.load_tasks`), from which come each item's fields and prompt; without
            them ``doc`` is empty and so is the prompt.
        arms: those to write; all by default.
        seed: of the few-shot examples, as they were run.

    Returns:
        the files written.

    Raises:
        EvaluationError: there is no such arm; tasks give other items or prompts than the outcomes have.
    """
    chosen = list(arms or outcomes.arms)
    if unknown := [arm for arm in chosen if arm not in outcomes.arms]:
        raise EvaluationError(
            f"there is no arm {', '.join(f'`{arm}`' for arm in unknown)}", hint=f"there are {', '.join(outcomes.arms)}"
        )
    time = datetime.now().isoformat().replace(":", "-")
    written = []
    for task in outcomes.tasks:
        known = tasks.get(task) if tasks else None
        asked = _asked(known, seed) if known else {}
        first = known._filters[0].name if known and known._filters else "none"  # outcomes name the others only
        for arm in chosen:
            rows = outcomes.rows(arm, task).to_dict("records")
            samples = [
                one for row in rows for one in _samples(row, outcomes.metrics, task, first, asked.get(row["item"]))
            ]
            path = out / arm / f"samples_{task}_{time}.jsonl"
            write_text(path, "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples))
            written.append(path)
    return written


def _asked(task: "Task", seed: int) -> dict[int, tuple[Any, list[Any]]]:
    """The fields of each item of a task, and the arguments of its requests."""
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests()
    found: dict[int, tuple[Any, list[Any]]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, (instance.doc, []))[1].append(instance.args)
    return found


def _samples(
    row: Mapping[Any, Any], metrics: Sequence[str], task: str, first: str, asked: tuple[Any, list[Any]] | None
) -> list[dict[str, Any]]:
    """An item's lines, one for each filter."""
    generated = isinstance(row["extracted"], bool)
    if asked and sha256_bytes(str(asked[1][0][0]).encode()) != row["prompt_hash"]:
        raise EvaluationError(
            f"item {row['item']} of task `{task}` had another prompt when it was run",
            hint="give the tasks, data and seed of that run",
        )
    doc, arguments = asked or ({}, [("", {} if generated else "")])
    resps = [[row["response"]]] if generated else json.loads(row["response"])
    answer = row["response"] if task.startswith(_UNFILTERED) else row["answer"]
    filtered = [answer] if generated else [several[0] for several in resps]
    by_filter: dict[str, dict[str, float]] = {}
    for column in metrics:
        if pd.notna(row[column]):  # another task's metrics are missing
            name, _, kind = column.partition(",")
            by_filter.setdefault(kind or first, {})[name] = row[column]
    common = {
        "doc_id": row["item"],
        "doc": doc,
        "target": row["target"],
        "arguments": {f"gen_args_{i}": {f"arg_{j}": a for j, a in enumerate(one)} for i, one in enumerate(arguments)},
        "resps": resps,
        "doc_hash": row["item_hash"],
        "prompt_hash": row["prompt_hash"],
        "target_hash": sha256_bytes(row["target"].encode()),
    }
    return [
        {
            **common,
            "filtered_resps": filtered if kind == first else [],
            "filter": kind,
            "metrics": list(found),
            **found,
        }
        for kind, found in by_filter.items()
    ]
