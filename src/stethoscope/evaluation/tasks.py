"""Harness tasks, built once for all arms: by name, group or YAML file, Minerva Math also on local files."""

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from stethoscope.artifacts import sha256_bytes
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.minerva import GROUP, TEMPLATES, is_minerva, local_tasks
from stethoscope.evaluation.names import unknown_tasks


def load_tasks(
    names: Sequence[str], include_path: Path | None = None, *, data: Path | None = None, seed: int = 0
) -> dict[str, Task]:
    """Build harness tasks by name, group or YAML path, groups taken apart into their tasks.

    Args:
        data: where ``minerva_math`` and its tasks find their items instead of the hub (see `minerva.local_tasks`).

    Raises:
        EvaluationError: unknown names (all of them, with near matches), tasks that cannot be built or are empty.
    """
    if not names:
        raise EvaluationError("there is no task to evaluate")
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"the folder of tasks `{include_path}` does not exist")
    minerva = [name for name in names if is_minerva(name)]
    if data is not None and not minerva:
        raise EvaluationError(
            f"none of the tasks reads its items from `{data}`",
            hint="`--data` is for `minerva_math` and its subjects; another task's YAML names its own files",
        )
    given = [name for name in names if data is None or name not in minerva]
    if missing := unknown_tasks(given, include_path):
        raise EvaluationError(
            "these tasks are not known",
            problems=[f"`{n}`" + (f" (like {', '.join(m)}?)" if m else "") for n, m in missing.items()],
            hint="a task is a name or group of lm-evaluation-harness, or a YAML file",
        )
    local = [] if include_path is None else [include_path]
    manager = TaskManager(include_path=[TEMPLATES, *local] if data else local, include_defaults=False)
    if any(name not in manager.all_tasks and not Path(name).is_file() for name in given):
        manager = TaskManager(include_path=local)
    wanted: dict[str, Any] = {name: name for name in given}
    if data is not None:
        wanted[GROUP] = local_tasks(minerva, data)
    tasks: dict[str, Task] = {}
    problems = []
    for name, spec in wanted.items():
        try:
            with quiet_harness():
                found = manager.load([spec])["tasks"]
            problems += [f"`{task}` has no items" for task, built in found.items() if not len(built.eval_docs)]
            tasks |= found
        except Exception as error:  # whatever a task's own code and data raise
            said = str(error).strip() or type(error).__name__
            problems.append(f"`{name}`: {said.splitlines()[0]}")
    if problems:
        offline = "; `--data DIR` gives Minerva Math local items" if data is None and minerva else ""
        raise EvaluationError(
            "these tasks could not be built, or have no items",
            problems=problems,
            hint=f"is the data there? `lm_eval validate --tasks ...` checks the rest{offline}",
        )
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return tasks


def prompts_hash(task: Task, limit: int | None, seed: int) -> str:
    """Identifies a task by its settings and by every prompt and target as they will be asked."""
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=limit)
    asked = [[i.args, i.doc] for i in task.instances]
    return sha256_bytes(json.dumps([task.dump_config(), asked], sort_keys=True, default=str).encode())


@contextmanager
def quiet_harness() -> Iterator[None]:
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
