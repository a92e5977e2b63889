"""Harness tasks, built once for all arms: by name, group or YAML file, Minerva Math also on local files.

The harness' own seven Minerva tasks keep their prompts, shots, stops and metrics; only their items come from JSON lines
in the MATH schema instead of the hub.
"""

import functools
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.tasks
import lm_eval.utils
from datasets import Dataset
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager, _yaml_loader

from stethoscope.artifacts import sha256_bytes, sha256_files
from stethoscope.errors import EvaluationError
from stethoscope.evaluation.names import unknown_tasks
from stethoscope.text.documents import json_lines

# The harness renders a task file's templates without a sandbox, so that they could run any code.
_sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
_sandbox.filters |= lm_eval.utils.env.filters
lm_eval.utils.env = _sandbox

_TEMPLATES = Path(lm_eval.tasks.__file__).parent / "minerva_math"
GROUP = "minerva_math"
# The harness' name of each task, and the subject as MATH's `type` has it.
SUBJECTS = {
    "minerva_math_algebra": "Algebra",
    "minerva_math_counting_and_prob": "Counting & Probability",
    "minerva_math_geometry": "Geometry",
    "minerva_math_intermediate_algebra": "Intermediate Algebra",
    "minerva_math_num_theory": "Number Theory",
    "minerva_math_prealgebra": "Prealgebra",
    "minerva_math_precalc": "Precalculus",
}
_TEXTS = ("problem", "solution")
# Aggregations of the harness that take predictions, not results.
_OF_ALL = {"bleu", "brier_score", "bypass_agg", "chrf", "chrfpp", "f1_score", "matthews_corrcoef", "ter"}
_SCHEMA = (
    'one JSON object a line: {"problem": ..., "level": ..., "type": "Number Theory", "solution": "... \\\\boxed{4}"}'
)


def load_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    *,
    data: Path | None = None,
    seed: int = 0,
    task_code: bool = False,
) -> dict[str, Task]:
    """Build harness tasks by name, group or YAML path, groups taken apart into their tasks.

    Args:
        data: where ``minerva_math`` and its tasks find their items instead of the hub: a folder with a file per subject
            (`algebra.jsonl`, ...) or one file of all, `test.jsonl`; or that file.
        task_code: run Python functions that task files outside the harness' package name with `!function`.

    Raises:
        EvaluationError: unknown names (all of them, with near matches), tasks that cannot be built or are empty, or
            have code that may not run; files or lines that are not in the MATH schema.
    """
    if not names:
        raise EvaluationError("there is no task to evaluate")
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"the folder of tasks `{include_path}` does not exist")
    minerva = [name for name in names if name == GROUP or name in SUBJECTS]
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
    manager = TaskManager(include_path=[_TEMPLATES, *local] if data else local, include_defaults=False)
    if any(name not in manager.all_tasks and not Path(name).is_file() for name in given):
        manager = TaskManager(include_path=local)
    wanted: dict[str, Any] = {name: name for name in given}
    if data is not None:
        wanted[GROUP] = _local_tasks(minerva, data)
    tasks: dict[str, Task] = {}
    problems = []
    for name, spec in wanted.items():
        try:
            with quiet_harness(), _code(allowed=task_code):
                found = manager.load([spec])["tasks"]
            problems += [f"`{task}` has no items" for task, built in found.items() if not len(built.eval_docs)]
            problems += [f"`{task}` {why}" for task, built in found.items() if (why := _scores_no_item(built))]
            tasks |= found
        except Exception as error:  # whatever a task's own code and data raise
            said = str(error).strip() or type(error).__name__
            if error.__cause__ and str(error.__cause__):  # what a data set is not readable for
                said = f"{said.splitlines()[0]}: {error.__cause__}"
            if isinstance(error, KeyError) and error.args == (None,):  # the default that the harness looks for
                said = "a metric of its `metric_list` needs `aggregation` and `higher_is_better`"
            problems.append(f"`{name}`: {said.splitlines()[0]}")
    if problems:
        offline = "; `--data DIR` gives Minerva Math local items" if data is None and minerva else ""
        raise EvaluationError(
            "these tasks could not be built, or have nothing to compare",
            problems=problems,
            hint=f"is the data there? `lm_eval validate --tasks ...` checks the rest{offline}",
        )
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return tasks


def _scores_no_item(task: Task) -> str | None:
    """Why a task has no result per item, where that is plain from how it sums its metrics up."""
    sums = {name: getattr(function, "__name__", "") for name, function in task.aggregation().items()}
    names = ", ".join(f"`{name}`" for name in sums)
    return f"scores no item by itself: {names} is of all items together" if set(sums.values()) <= _OF_ALL else None


def new_tokens(task: Task) -> int:
    """The most tokens that a task lets a model write for an item."""
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    return int(normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))["max_gen_toks"])


def prompt_size(task: Task) -> tuple[int, int]:
    """Characters of a task's first prompt with its shots, and of the item in it alone."""
    with quiet_harness():
        task.build_all_requests(limit=1)
    return len(str(task.instances[0].args[0])), len(str(task.doc_to_text(task.eval_docs[0])))


def prompts_hash(task: Task, limit: int | None, seed: int) -> str:
    """Identifies a task by its settings and by every prompt and target as they will be asked."""

    def plain(value: Any) -> str:
        return getattr(value, "__qualname__", str(value))  # a function's text holds its address

    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=limit)
    settings = {name: value for name, value in task.dump_config().items() if name != "custom_dataset"}
    settings |= {"code": sha256_files(files)} if (files := _own_code(task)) else {}
    asked = [[i.args, i.doc] for i in task.instances]
    return sha256_bytes(json.dumps([settings, asked], sort_keys=True, default=plain).encode())


def _own_code(task: Task) -> set[Path]:
    """The files of a task's Python functions that are not the harness' own."""
    found: set[Path] = set()

    def note(value: Any) -> None:
        with suppress(TypeError, OSError):  # what is built in has no file
            found.add(Path(inspect.getfile(value)).resolve())

    settings = task.config.to_dict(keep_callable=True) | {"custom_dataset": None}
    json.dumps([type(task), settings], default=note)
    return {path for path in found if _TEMPLATES.parents[1].resolve() not in path.parents}


@contextmanager
def _code(*, allowed: bool) -> Iterator[None]:
    """Unless it is allowed, let the harness import no function for task files outside its own package."""
    load = _yaml_loader._import_func_in_yml

    def refuse(function: str, folder: Path) -> Any:
        if _TEMPLATES.parent.resolve() not in folder.resolve().parents:
            hint = "read it, then `evaluate --allow-task-code`, or `evaluate: {task_code: true}` in the recipe"
            raise EvaluationError(f"`!function {function}` in `{folder}` would run Python; {hint}")
        return load(function, folder)

    _yaml_loader._import_func_in_yml = load if allowed else refuse
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml = load


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


def _local_tasks(names: Sequence[str], data: Path) -> dict[str, Any]:
    """Minerva tasks of these names with items from local files, as a group for `TaskManager.load`."""
    wanted = {task: subject for task, subject in SUBJECTS.items() if GROUP in names or task in names}
    rows = _read(data)
    if empty := [f"`{task}`: nothing of type `{subject}`" for task, subject in wanted.items() if not rows[subject]]:
        raise EvaluationError(
            f"these tasks have no items in `{data}`", problems=empty, hint="name only subjects that are there"
        )

    def task_on(name: str, items: list[dict[str, str]]) -> dict[str, Any]:
        return {"task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(items)}, "training_split": None}

    return {"group": GROUP, "task": [task_on(task, rows[subject]) for task, subject in wanted.items()]}


def _read(data: Path) -> dict[str, list[dict[str, str]]]:
    """Each subject's items."""
    found: dict[str, list[dict[str, str]]] = {subject: [] for subject in SUBJECTS.values()}
    problems: list[str] = []
    for path in _files(data):
        for where, row in json_lines(path):
            subject = (_subject(str(row.get("type", ""))) if isinstance(row, dict) else "") or _subject(path.stem)
            if isinstance(row, ValueError):
                wrong = f"not JSON ({row})"
            elif not isinstance(row, dict):
                wrong = "not an object"
            elif lacking := [f"`{key}`" for key in _TEXTS if not isinstance(row.get(key), str) or not row[key].strip()]:
                wrong = f"no text in {' and '.join(lacking)}"
            elif not subject:
                wrong = f"the type `{row.get('type')}` is none of MATH's seven subjects"
            elif "\\boxed" not in row["solution"] and "\\fbox" not in row["solution"]:
                wrong = "the solution has no `\\boxed{}` answer"
            else:
                # the hub's columns in the hub's order, which an item's hash depends on
                item = {"problem": row["problem"], "level": str(row.get("level", "")), "type": subject}
                found[subject].append({**item, "solution": row["solution"]})
                continue
            problems.append(f"`{path.name}` {where}: {wrong}")
    if problems:
        more = [f"and {len(problems) - 10} more lines"] if len(problems) > 10 else []
        raise EvaluationError(f"`{data}` is not in the MATH schema", problems=[*problems[:10], *more], hint=_SCHEMA)
    return found


def _files(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise EvaluationError(f"the data `{data}` does not exist", hint=f"a folder of .jsonl files, {_SCHEMA}")
    files = sorted(data.glob("*.jsonl"))
    chosen = [path for path in files if _subject(path.stem)] or [path for path in files if path.stem == "test"]
    if chosen or len(files) == 1:
        return chosen or files
    raise EvaluationError(
        f"`{data}` has no file of a subject and no `test.jsonl`",
        problems=[f"`{path.name}`" for path in files],
        hint="name the files `algebra.jsonl`, `counting_and_probability.jsonl`, ..., or give the one file itself",
    )


def _subject(text: str) -> str:
    """The subject that a type or file name means, or nothing."""

    def letters(name: str) -> str:
        return "".join(filter(str.isalpha, name.removeprefix("minerva_math_").lower().replace("&", "and")))

    named = (subject for task, subject in SUBJECTS.items() if letters(text) in (letters(task), letters(subject)))
    return next(named, "")
