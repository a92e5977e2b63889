"""Harness samples as rows of outcomes: those of a run in memory, and those in logs that `lm_eval --log_samples` wrote.

read_results("out/model", arm="base")     # a log folder, one samples_*.jsonl, a run folder, or outcomes.parquet
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stethoscope.errors import EvaluationError
from stethoscope.evaluation.outcomes import SOURCE, Outcomes

_NO_ANSWER = frozenset(("", "[invalid]", "[invalidanswer]"))
_LOG = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d{2}-\d{2}T[\d.\-]+)\.jsonl")
_NEEDED = ("doc_id", "doc_hash", "prompt_hash", "target", "resps", "filtered_resps", "filter", "metrics", "arguments")

Sample = Mapping[str, Any]
Details = Callable[[Sample], dict[str, Any]]


def to_rows(
    arm: str, task: str, samples: Iterable[Sample], details: Details, *, extract: Callable[[str], str] | None
) -> pd.DataFrame:
    """A row per item from a task's samples, which are one per item and filter.

    Args:
        details: ``generated`` (whether the task generates text), and what is known of ``truncated`` and
            ``generated_tokens``.
        extract: finds the answer in a response where a task does so inside its scoring function.
    """
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item = sample["doc_id"]
        first = item not in rows
        if first:
            rows[item] = _describe(sample, details(sample), extract)
        for metric in sample["metrics"]:
            # as the harness names results: the first filter's metric plainly, the others' with the filter's name
            rows[item][metric if first else f"{metric},{sample['filter']}"] = _number(sample[metric])
    frame = pd.DataFrame(list(rows.values()))
    frame.insert(0, "arm", arm)
    frame.insert(1, "task", task)
    return frame.astype({"extracted": "boolean", "truncated": "boolean", "generated_tokens": "Int64"})


def _describe(sample: Sample, known: dict[str, Any], extract: Callable[[str], str] | None) -> dict[str, Any]:
    generated = known["generated"]
    raw = sample["resps"][0][0] if generated else sample["resps"]
    answer = extract(raw) if extract and generated else sample["filtered_resps"][0]
    answer = answer if isinstance(answer, str) else json.dumps(answer, default=str)
    return {
        "item": sample["doc_id"],
        "item_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "extracted": answer.strip() not in _NO_ANSWER if generated else None,
        "truncated": known.get("truncated"),
        "generated_tokens": known.get("generated_tokens"),
        "response": raw if isinstance(raw, str) else json.dumps(raw, default=str),
        "answer": answer,
        "target": str(sample["target"]),
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def read_results(path: Path, *, arm: str | None = None, source: str | None = None) -> Outcomes:
    """Outcomes of one arm from what `lm_eval --log_samples` or `stethoscope evaluate` wrote.

    Args:
        path: a folder of `lm_eval --output_path` (each task's newest log is read), one ``samples_*.jsonl``, a run
            folder, or ``outcomes.parquet``.
        arm: which arm of a run, or what to call a log, which does not say. The folder's or file's name if not given.
        source: a field of a log's documents that says which items share a source.

    Raises:
        EvaluationError: nothing to compare there, more than one arm, or documents without the field.
    """
    if not path.exists():
        raise EvaluationError(f"`{path}` does not exist")
    stored = path / "outcomes.parquet" if path.is_dir() else path
    if stored.suffix == ".parquet" and stored.exists():
        if source is not None:
            raise EvaluationError(
                f"`{stored}` does not hold the items' fields, so not `{source}`", hint="give the logs of lm_eval"
            )
        return _one_arm(Outcomes.load(stored), stored, arm)
    logs = _newest_logs(path) if path.is_dir() else {_task_of(path): path}
    folders = {log.parent for log in logs.values()}
    # lm_eval names a folder after the whole model path, with `__` for each slash
    name = arm or (folders.pop().name.rpartition("__")[2] if path.is_dir() else path.stem)
    parts = [_read_log(log, task, name, source) for task, log in logs.items()]
    return Outcomes(frame=pd.concat(parts, ignore_index=True))


def join(a: Outcomes, b: Outcomes, *, shared_only: bool = False) -> tuple[Outcomes, list[str]]:
    """Two arms as one set of outcomes, with items numbered alike wherever their content's hash is the same.

    Args:
        shared_only: leave out what only one arm has, instead of refusing.

    Returns:
        the outcomes, and a line for each task and arm about what was left out.

    Raises:
        EvaluationError: items that only one arm has, listed; prompts that differ.
    """
    numbers: dict[tuple[str, str, int], int] = {}
    frames, names = [], [a.arms[0], b.arms[0]]
    for outcomes in (a, b):
        frame = outcomes.frame.sort_values(["task", "item"], kind="stable")
        again = frame.groupby(["task", "item_hash"]).cumcount()  # equal items are told apart by their order
        keys = list(zip(frame["task"], frame["item_hash"], again, strict=True))
        after = 0 if not numbers else 1 + max(numbers.values())  # what only b has is numbered behind a's
        for place, (key, item) in enumerate(zip(keys, frame["item"], strict=True)):
            numbers.setdefault(key, after + place if after else int(item))
        frames.append(frame.assign(item=[numbers[key] for key in keys], key=pd.Series(keys, index=frame.index)))
    sets = [set(frame["key"]) for frame in frames]
    missing = [
        f"task `{task}`: `{names[side]}` lacks {len(lost)} of `{names[1 - side]}`'s items ({_few(lost)})"
        for side in (0, 1)
        for task in dict.fromkeys(frames[1 - side]["task"])
        if (lost := sorted(numbers[key] for key in sets[1 - side] - sets[side] if key[0] == task))
    ]
    if missing and not shared_only:
        raise EvaluationError(
            "the arms did not answer the same items",
            problems=missing,
            hint="`--shared-only` compares what both have; or evaluate again, with one limit and the same data",
        )
    frames = [frame[frame["key"].isin(sets[0] & sets[1])].drop(columns="key") for frame in frames]
    if not len(frames[0]):
        raise EvaluationError(
            "the arms share no item",
            problems=missing,
            hint="items are joined on the hash of their content: are these the same task and version?",
        )
    joined = Outcomes(frame=pd.concat(frames, ignore_index=True))
    joined.check_comparable()
    return joined, missing


def _one_arm(outcomes: Outcomes, path: Path, arm: str | None) -> Outcomes:
    if arm is None and len(outcomes.arms) > 1:
        raise EvaluationError(
            f"`{path}` holds {len(outcomes.arms)} arms", hint=f"choose one: `PATH={outcomes.arms[0]}`, ..."
        )
    chosen = arm if arm is not None else outcomes.arms[0]
    frame = outcomes.frame[outcomes.frame["arm"] == chosen]
    if not len(frame):
        raise EvaluationError(f"`{path}` has no arm `{chosen}`", hint=f"its arms: {', '.join(outcomes.arms)}")
    return Outcomes(frame=frame.reset_index(drop=True), provenance=outcomes.provenance)


def _newest_logs(folder: Path) -> dict[str, Path]:
    found: dict[str, tuple[str, Path]] = {}
    matches = [(match, path) for path in sorted(folder.rglob("*.jsonl")) if (match := _LOG.fullmatch(path.name))]
    if not matches:
        raise EvaluationError(
            f"`{folder}` holds no samples",
            hint="run lm_eval with `--log_samples --output_path DIR`: its results alone have no items to pair",
        )
    if len(folders := sorted({path.parent for _, path in matches})) > 1:
        raise EvaluationError(
            f"`{folder}` holds the logs of {len(folders)} models", problems=[f"`{path}`" for path in folders],
            hint="give one of these folders",
        )  # fmt: skip
    for match, path in matches:
        if match["task"] not in found or match["time"] > found[match["task"]][0]:
            found[match["task"]] = match["time"], path
    return {task: path for task, (_, path) in found.items()}


def _task_of(path: Path) -> str:
    match = _LOG.fullmatch(path.name)
    return match["task"] if match else path.stem


def _read_log(path: Path, task: str, arm: str, source: str | None) -> pd.DataFrame:
    samples, problems = [], []
    # not splitlines: JSON strings may hold other line ends
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                sample = json.loads(line)
            except ValueError as error:
                problems.append(f"line {number}: not JSON ({error})")
                continue
            have = set(sample) if isinstance(sample, dict) else set()
            if lacking := [name for name in _NEEDED if name not in have]:
                problems.append(f"line {number}: lacks {', '.join(f'`{name}`' for name in lacking)}")
            elif source is not None and source not in (sample.get("doc") or {}):
                problems.append(f"line {number}: the document has no `{source}`")
            else:
                samples.append(sample)
    if problems or not samples:
        raise EvaluationError(
            f"`{path}` is no sample log of lm_eval", problems=problems[:10] or ["it is empty"],
            hint="give what `lm_eval --log_samples --output_path DIR` wrote",
        )  # fmt: skip
    rows = to_rows(arm, task, samples, _details_of_log, extract=_scorers_extraction(task))
    if source is not None:
        rows[SOURCE] = rows["item"].map({sample["doc_id"]: str(sample["doc"][source]) for sample in samples})
    return rows


def _details_of_log(sample: Sample) -> dict[str, Any]:
    # a request to generate carries its settings; the log does not say how many tokens were generated
    settings = sample["arguments"]["gen_args_0"].get("arg_1") if isinstance(sample["arguments"], dict) else None
    return {"generated": isinstance(settings, dict)}


def _scorers_extraction(task: str) -> Callable[[str], str] | None:
    """Minerva's tasks extract inside their scoring function, out of the filters' sight."""
    if not task.startswith("minerva_math"):
        return None
    extract: Callable[[str], str] = importlib.import_module("lm_eval.tasks.minerva_math.utils").get_unnormalized_answer
    return extract


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
