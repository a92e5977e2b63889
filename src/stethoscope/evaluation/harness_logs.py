"""Outcomes from what lm-evaluation-harness gives, in memory or in logs, and as logs for tools that read those.

read_results("out/model", arm="base")     # a log folder, one samples_*.jsonl, a run folder, or outcomes.parquet
write_logs(Outcomes.load(Path("run/outcomes.parquet")), Path("logs"))   # logs/ARM/samples_TASK_TIME.jsonl
"""

import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from stethoscope.artifacts import file_name, read_json, sha256_bytes, write_json, write_text
from stethoscope.display import first_of
from stethoscope.errors import EvaluationError, StethoscopeError
from stethoscope.evaluation.outcomes import DIRECTIONS, SOURCE, Outcomes
from stethoscope.results.scale import LIKELIHOODS
from stethoscope.text.documents import json_lines

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_NO_ANSWER = frozenset(("", "[invalid]", "[invalidanswer]"))
_LOG = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d{2}-\d{2}T[\d.\-]+)\.jsonl")
_NEEDED = ("doc_id", "doc_hash", "prompt_hash", "target", "resps", "filtered_resps", "filter", "metrics", "arguments")
# Tasks that extract inside their scoring function, out of the filters' sight: the whole response is logged as filtered.
_UNFILTERED = {"minerva_math": "minerva_math", "leaderboard_math": "leaderboard.math", "putnam_axiom": "putnam_axiom"}

Sample = Mapping[str, Any]


def to_rows(
    arm: str,
    task: str,
    samples: Iterable[Sample],
    *,
    extract: Callable[[str], str] | None = None,
    generation: Callable[[str, dict[str, Any]], Any] | None = None,
) -> pd.DataFrame:
    """A row per item from a task's samples, which are one per item and filter.

    Args:
        extract: finds the answer in a response where a task does so inside its scoring function.
        generation: what is known of how a prompt was answered under its settings, see `SharedPrefixLM.generation`.
    """
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item, own = sample["doc_id"], ""
        if item in rows:  # the harness names the first filter's metrics plainly, the others' with the filter's name
            own = f",{sample['filter']}"
        else:
            rows[item] = {"arm": arm, "task": task, **_describe(sample, extract, generation)}
        for metric in sample["metrics"]:
            rows[item][metric + own] = _value(metric, sample[metric])
    frame = pd.DataFrame(list(rows.values()))
    return frame.astype({"extracted": "boolean", "truncated": "boolean", "generated_tokens": "Int64"})


def _value(metric: str, value: Any) -> float | None:
    """An item's number; None where only all items together have one.

    Of a whole text the harness gives its log-likelihood, and over how many words or bytes.
    """
    if metric in LIKELIHOODS and isinstance(value, Sequence) and value[1]:
        return -float(value[0]) / value[1] / (math.log(2) if metric == "bits_per_byte" else 1)
    return float(value) if isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0 else None


def _describe(sample: Sample, extract: Callable[..., str] | None, generation: Callable[..., Any] | None) -> Sample:
    asked = sample["arguments"]
    asked = list(asked["gen_args_0"].values()) if isinstance(asked, dict) else asked[0]  # in a log, in memory
    generated = len(asked) > 1 and isinstance(asked[1], dict)  # a request to generate carries its settings
    known = generation(*asked) if generated and generation else None
    raw = sample["resps"][0][0] if generated else sample["resps"]
    answer = extract(raw) if extract and generated else sample["filtered_resps"][0]
    raw, answer = (text if isinstance(text, str) else json.dumps(text, default=str) for text in (raw, answer))
    return {
        "item": sample["doc_id"], "item_hash": sample["doc_hash"], "prompt_hash": sample["prompt_hash"],
        "extracted": answer.strip() not in _NO_ANSWER if generated else None,
        "truncated": known.truncated if known else None, "generated_tokens": known.tokens if known else None,
        "response": raw, "answer": answer, "target": str(sample["target"]),
    }  # fmt: skip


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
            hint = "give the logs of lm_eval"
            raise EvaluationError(f"`{stored}` does not hold the items' fields, so not `{source}`", hint=hint)
        return _one_arm(Outcomes.load(stored), stored, arm)
    if path.is_dir():
        logs = _newest_logs(path)
        # lm_eval names a folder after the whole model path, with `__` for each slash
        name = arm or next(iter(logs.values())).parent.name.rpartition("__")[2]
    else:
        match = _LOG.fullmatch(path.name)
        logs, name = {match["task"] if match else path.stem: path}, arm or path.stem
    parts = [_read_log(log, task, name, source) for task, log in logs.items()]
    told = {task: _directions(log, task) for task, log in logs.items()}
    return Outcomes(frame=pd.concat(parts, ignore_index=True), provenance={DIRECTIONS: told})


def join(a: Outcomes, b: Outcomes, *, shared_only: bool = False) -> tuple[Outcomes, list[str]]:
    """Two arms as one set of outcomes, with items numbered as in ``a`` wherever their content's hash is the same.

    Returns:
        the outcomes, and a line for each task and arm about what was left out.

    Raises:
        EvaluationError: items that only one arm has, listed, unless ``shared_only`` leaves them out; other prompts.
    """
    frames = []
    for outcomes in (a, b):
        frame = outcomes.frame.sort_values(["task", "item"], kind="stable")
        again = frame.groupby(["task", "item_hash"]).cumcount()  # equal items are told apart by their order
        keys: Any = list(zip(frame["task"], frame["item_hash"], again, strict=True))
        frames.append(frame.assign(key=keys))
    one, two = frames
    shared = set(one["key"]) & set(two["key"])
    missing = [
        f"task `{task}`: `{lacking}` lacks {len(rows)} of `{other}`'s items ({first_of(sorted(rows['item']), 5)})"
        for lacking, other, frame in ((a.arms[0], b.arms[0], two), (b.arms[0], a.arms[0], one))
        for task, rows in frame[~frame["key"].isin(shared)].groupby("task", sort=False)
    ]
    if missing and not shared_only:
        hint = "`--shared-only` compares what both have; or evaluate again, with one limit and the same data"
        raise EvaluationError("the arms did not answer the same items", problems=missing, hint=hint)
    if not shared:
        hint = "items are joined on the hash of their content: are these the same task and version?"
        raise EvaluationError("the arms share no item", problems=missing, hint=hint)
    one, two = (frame[frame["key"].isin(shared)] for frame in frames)
    two = two.assign(item=two["key"].map(dict(zip(one["key"], one["item"], strict=True))))
    told: dict[str, dict[str, bool | None]] = {}
    for task, found in [pair for outcomes in (a, b) for pair in outcomes.provenance.get(DIRECTIONS, {}).items()]:
        known = told.setdefault(task, {})
        known |= {name: None if known.get(name, higher) != higher else higher for name, higher in found.items()}
    frame = pd.concat([one, two], ignore_index=True).drop(columns="key")
    joined = Outcomes(frame=frame, provenance={DIRECTIONS: told})
    joined.check_comparable()
    return joined, missing


def _one_arm(outcomes: Outcomes, path: Path, arm: str | None) -> Outcomes:
    first, *others = outcomes.arms
    if arm is None and others:
        raise EvaluationError(f"`{path}` holds {len(outcomes.arms)} arms", hint=f"choose one: `PATH={first}`, ...")
    if arm not in (None, first, *others):
        raise EvaluationError(f"`{path}` has no arm `{arm}`", hint=f"its arms: {', '.join(outcomes.arms)}")
    frame = outcomes.frame[outcomes.frame["arm"] == (arm or first)]
    return replace(outcomes, frame=frame.reset_index(drop=True))


def _newest_logs(folder: Path) -> dict[str, Path]:
    """Each task's last log, in the order of the tasks' names."""
    matches = [(match, path) for path in folder.rglob("*.jsonl") if (match := _LOG.fullmatch(path.name))]
    if not matches:
        raise EvaluationError(
            f"`{folder}` holds no samples",
            hint="run lm_eval with `--log_samples --output_path DIR`: its results alone have no items to pair",
        )
    if len(folders := sorted({path.parent for _, path in matches})) > 1:
        raise EvaluationError(
            f"`{folder}` holds the logs of {len(folders)} models",
            problems=[f"`{path}`" for path in folders],
            hint="give one of these folders",
        )
    return {match["task"]: path for match, path in sorted(matches, key=lambda found: found[0].group("task", "time"))}


def _directions(log: Path, task: str) -> dict[str, bool | None]:
    """Which metrics of a task are better when higher, from the results file that lm_eval wrote beside a log."""
    match = _LOG.fullmatch(log.name)
    own = [log.with_name(f"results_{match['time']}.json")] if match else []
    for path in [*own, *sorted(log.parent.glob("results_*.json"), reverse=True)]:
        try:
            return dict(read_json(path)["higher_is_better"][task])
        except (StethoscopeError, KeyError, TypeError, ValueError):
            continue  # a folder may hold other results
    return {}


def _read_log(path: Path, task: str, arm: str, source: str | None) -> pd.DataFrame:
    samples, problems = [], []
    for where, sample in json_lines(path):
        have = sample if isinstance(sample, dict) else {}
        if isinstance(sample, ValueError):
            problems.append(f"{where}: not JSON ({sample})")
        elif lacking := [name for name in _NEEDED if name not in have]:
            problems.append(f"{where}: lacks {', '.join(f'`{name}`' for name in lacking)}")
        elif source is not None and (have.get("doc") or {}).get(source) is None:
            problems.append(f"{where}: the document has no `{source}`")
        else:
            samples.append(sample)
    if problems or not samples:
        raise EvaluationError(
            f"`{path}` is no sample log of lm_eval",
            problems=problems[:10] or ["it is empty"],
            hint="give what `lm_eval --log_samples --output_path DIR` wrote",
        )
    extract = None
    if folder := next((folder for begin, folder in _UNFILTERED.items() if task.startswith(begin)), None):
        extract = importlib.import_module(f"lm_eval.tasks.{folder}.utils").get_unnormalized_answer
    rows = to_rows(arm, task, samples, extract=extract)
    if source is not None:
        rows[SOURCE] = rows["item"].map({sample["doc_id"]: str(sample["doc"][source]) for sample in samples})
    return rows


def write_logs(
    outcomes: Outcomes,
    out: Path,
    tasks: "Mapping[str, Task] | None" = None,
    *,
    arms: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Write what `lm_eval --log_samples --output_path OUT` would have: a folder per arm, a file per task, and the
    part of its results file that says which metrics are better when higher.

    A log has a line per item and filter. What another filter than the first took from a response is not kept in
    outcomes, so its lines have its metrics and no filtered response.

    Args:
        tasks: as they were run (`tasks.load_tasks`); without them the items' fields and prompts are empty.
        arms: those to write; all by default.
        seed: of the few-shot examples, as they were run.

    Raises:
        EvaluationError: there is no such arm; tasks give other items or prompts than the outcomes have.
    """
    chosen = list(arms or outcomes.arms)
    if unknown := [f"`{arm}`" for arm in chosen if arm not in outcomes.arms]:
        raise EvaluationError(f"there is no arm {', '.join(unknown)}", hint=f"there are {', '.join(outcomes.arms)}")
    time = datetime.now().isoformat().replace(":", "-")
    written = []
    for name in outcomes.tasks:
        task = (tasks or {}).get(name)
        asked: dict[int, tuple[Any, list[Any]]] = {}  # by item: its fields, and the arguments of its requests
        if task:
            task.set_fewshot_seed(seed=seed)
            task.build_all_requests()
            for request in task.instances:
                asked.setdefault(request.doc_id, (request.doc, []))[1].append(request.args)
        first = task._filters[0].name if task and task._filters else "none"  # outcomes name the others only
        for arm in chosen:
            lines = [
                json.dumps(sample, ensure_ascii=False, default=str) + "\n"
                for row in outcomes.rows(arm, name).to_dict("records")
                for sample in _samples(row, outcomes.metrics, first, asked.get(row["item"]))
            ]
            named = name if Path(name).name == name else file_name(name)  # lm_eval keeps it, and so does reading it
            path = out / file_name(arm) / f"samples_{named}_{time}.jsonl"
            write_text(path, "".join(lines))
            written.append(path)
    for arm in chosen if DIRECTIONS in outcomes.provenance else ():
        write_json(out / file_name(arm) / f"results_{time}.json", {DIRECTIONS: outcomes.provenance[DIRECTIONS]})
    return written


def _samples(
    row: Mapping[Any, Any], metrics: Sequence[str], first: str, asked: tuple[Any, list[Any]] | None
) -> list[dict[str, Any]]:
    """An item's lines, one for each filter."""
    generated = isinstance(row["extracted"], bool)
    if asked and sha256_bytes(str(asked[1][0][0]).encode()) != row["prompt_hash"]:
        raise EvaluationError(
            f"item {row['item']} of task `{row['task']}` had another prompt when it was run",
            hint="give the tasks, data and seed of that run",
        )
    doc, arguments = asked or ({}, [("", {} if generated else "")])
    resps = [[row["response"]]] if generated else json.loads(row["response"])
    answer = row["response" if row["task"].startswith(tuple(_UNFILTERED)) else "answer"]
    filtered = [answer] if generated else [several[0] for several in resps]
    by_filter: dict[str, dict[str, float]] = {}
    for column in metrics:
        if pd.notna(row[column]):  # another task's metrics are missing
            name, _, kind = column.partition(",")
            by_filter.setdefault(kind or first, {})[name] = row[column]
    common = {
        "doc_id": row["item"], "doc": doc, "target": row["target"], "resps": resps,
        "arguments": {f"gen_args_{i}": {f"arg_{j}": a for j, a in enumerate(one)} for i, one in enumerate(arguments)},
        "doc_hash": row["item_hash"], "prompt_hash": row["prompt_hash"],
        "target_hash": sha256_bytes(row["target"].encode()),
    }  # fmt: skip
    return [
        {**common, "filtered_resps": filtered if kind == first else [], "filter": kind, "metrics": [*found], **found}
        for kind, found in by_filter.items()
    ]
