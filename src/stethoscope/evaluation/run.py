"""Run lm-evaluation-harness tasks on several states of one live model: `evaluate(model, tokenizer, arms, tasks, ...)`.

Tasks are built once and every arm gets the same prompts. Each finished arm and task is stored at once; an interrupted
run goes on where it stopped, inside a task too.
"""

import difflib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.api.task
import pandas as pd
import torch
from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stethoscope.artifacts import canonical_json, sha256_bytes
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.harness import SharedPrefixLM
from stethoscope.evaluation.outcomes import Outcomes

Arms = Mapping[str, Callable[[], AbstractContextManager[Any]]]
Progress = Callable[[int, int, str], None]

_NO_ANSWER = frozenset(("", "[invalid]", "[invalidanswer]"))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arms: Arms,
    tasks: Sequence[str],
    *,
    out: Path,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    keys: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Outcomes:
    """Evaluate every arm on every task, item by item.

    Args:
        model: in the base state, on its device, in the type to evaluate in.
        arms: name to a callable whose context puts the model into that arm's state and takes it back.
        tasks: names of harness tasks or groups, or paths of YAML files.
        out: folder for ``outcomes.parquet`` and, under ``parts/``, what is finished so far.
        include_path: folder of further task YAMLs; if it holds all tasks, the harness' own are not read (10 s).
        limit: so many items of each task; all if not given.
        batch_size: prompts decoded together.
        seed: of few-shot sampling.
        keys: a hash for each arm's state; arms without one are identified by hashing the model's weights in that state.
        progress: called with items done, items in all, and what is running.

    Returns:
        the outcomes, also saved as ``out/outcomes.parquet``.

    Raises:
        EvaluationError: no arm; tasks that are unknown, cannot be built, or have no items.
    """
    if not arms:
        raise EvaluationError("there is no arm to evaluate", hint="`{'base': contextlib.nullcontext}` is the least")
    if limit is not None and limit < 1:
        raise EvaluationError(f"the limit of `{limit}` items leaves nothing to evaluate")
    with _quiet_harness():
        built = load_tasks(tasks, include_path, seed=seed)
        lm = SharedPrefixLM(model, tokenizer, batch_size=batch_size)
        settings = {
            "limit": limit,
            "seed": seed,
            "batch_size": batch_size,
            "dtype": str(model.dtype),
            "model": weights_hash(model),
            "tokenizer": sha256_bytes(canonical_json(tokenizer.get_vocab()).encode()),
            "lm_eval": version("lm_eval"),
            "transformers": version("transformers"),
            "torch": torch.__version__,
        }
        prompts = {name: _prompts_hash(task, limit, seed) for name, task in built.items()}
        sizes = {name: min(limit or len(task.eval_docs), len(task.eval_docs)) for name, task in built.items()}
        done, total = 0, len(arms) * sum(sizes.values())
        parts: list[pd.DataFrame] = []
        for arm, enter in arms.items():
            with enter():
                state = (keys or {}).get(arm) or weights_hash(model)
                for name, task in built.items():
                    key = sha256_bytes(canonical_json([settings, prompts[name], arm, state]).encode())
                    stored = out / "parts" / f"{_safe(arm)}.{_safe(name)}.{key[:16]}.parquet"
                    if stored.exists():
                        parts.append(Outcomes.load(stored).frame)
                    else:
                        said = f"{arm}: {name}"
                        start = done

                        def advance(items: int, start: int = start, name: str = name, said: str = said) -> None:
                            nonlocal done
                            done = min(done + items, start + sizes[name])
                            if progress:
                                progress(done, total, said)

                        lm.on_items = advance
                        lm.journal = stored.with_suffix(".jsonl")
                        part = _run_cell(lm, arm, name, task, limit, seed)
                        Outcomes(frame=part, provenance={"key": key}).save(stored)
                        lm.journal.unlink(missing_ok=True)
                        parts.append(part)
                        done = start
                    done += sizes[name]
                    if progress:
                        progress(done, total, f"{arm}: {name}")
    frame = pd.concat(parts, ignore_index=True)
    provenance = {**settings, "prompts": prompts, "stethoscope": version("sae-stethoscope")}
    outcomes = Outcomes(frame=frame, provenance=provenance)
    outcomes.check_comparable()
    outcomes.save(out / "outcomes.parquet")
    return outcomes


def load_tasks(names: Sequence[str], include_path: Path | None = None, *, seed: int = 0) -> dict[str, Task]:
    """Build harness tasks by name, group or YAML path, groups taken apart into their tasks.

    Raises:
        EvaluationError: unknown names (all of them, with near matches), tasks that cannot be built or are empty.
    """
    if not names:
        raise EvaluationError("there is no task to evaluate")
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"the folder of tasks `{include_path}` does not exist")
    local = [] if include_path is None else [include_path]
    manager = TaskManager(include_path=local, include_defaults=False)

    def unknown() -> list[str]:
        return [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]

    if unknown():
        manager = TaskManager(include_path=local)
    if missing := unknown():
        near = {name: difflib.get_close_matches(name, manager.all_tasks, n=3) for name in missing}
        raise EvaluationError(
            "these tasks are not known",
            problems=[f"`{n}`" + (f" (like {', '.join(m)}?)" if m else "") for n, m in near.items()],
            hint="a task is a name or group of lm-evaluation-harness, or a YAML file",
        )
    try:
        tasks: dict[str, Task] = manager.load(list(names))["tasks"]
        sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    except Exception as error:  # whatever a task's own code and data raise
        raise EvaluationError(
            f"the tasks could not be built: {error}", hint="try `lm_eval validate --tasks ...` on each"
        ) from error
    if empty := [name for name, size in sizes.items() if not size]:
        raise EvaluationError("these tasks have no items", problems=[f"`{name}`" for name in empty])
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return tasks


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's tensors as they are now."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=False).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _run_cell(lm: SharedPrefixLM, arm: str, name: str, task: Task, limit: int | None, seed: int) -> pd.DataFrame:
    """One arm on one task, run by the harness, as rows of outcomes."""
    task.set_fewshot_seed(seed=seed)  # or the second arm would draw other shots than the first
    result = evaluator.evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0, log_samples=True)
    rows: dict[int, dict[str, Any]] = {}
    settings = {i.doc_id: i.args[1] for i in task.instances if i.request_type == "generate_until"}
    for sample in result["samples"][name]:
        item = sample["doc_id"]
        first = item not in rows
        if first:
            rows[item] = _describe(lm, task, sample, settings.get(item))
        for metric in sample["metrics"]:
            # as the harness names results: the first filter's metric plainly, the others' with the filter's name
            rows[item][metric if first else f"{metric},{sample['filter']}"] = _number(sample[metric])
    frame = pd.DataFrame(list(rows.values()))
    frame.insert(0, "arm", arm)
    frame.insert(1, "task", name)
    return frame.astype({"extracted": "boolean", "truncated": "boolean", "generated_tokens": "Int64"})


def _describe(
    lm: SharedPrefixLM, task: Task, sample: dict[str, Any], settings: dict[str, Any] | None
) -> dict[str, Any]:
    generated = lm.generation(sample["arguments"][0][0], settings) if settings is not None else None
    raw = sample["resps"][0][0] if settings is not None else sample["resps"]
    # Minerva's and its kin's tasks extract inside their scoring function, out of the filters' sight.
    scorer = getattr(task.config.process_results, "__globals__", {})
    extract = scorer.get("get_unnormalized_answer") if settings is not None else None
    answer = extract(raw) if extract else sample["filtered_resps"][0]
    answer = answer if isinstance(answer, str) else json.dumps(answer, default=str)
    return {
        "item": sample["doc_id"],
        "item_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "extracted": answer.strip() not in _NO_ANSWER if settings is not None else None,
        "truncated": generated.truncated if generated else None,
        "generated_tokens": generated.tokens if generated else None,
        "response": raw if isinstance(raw, str) else json.dumps(raw, default=str),
        "answer": answer,
        "target": str(sample["target"]),
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _prompts_hash(task: Task, limit: int | None, seed: int) -> str:
    """Identifies a task by its settings and by every prompt and target as they will be asked."""
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=limit)
    asked = [[i.args, i.doc] for i in task.instances]
    return sha256_bytes(json.dumps([task.dump_config(), asked], sort_keys=True, default=str).encode())


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the harness from logging below errors and from drawing bars of its own."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
