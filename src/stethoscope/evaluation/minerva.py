"""Minerva Math on local files: the harness' own seven tasks, with their items from JSON lines in the MATH schema.

Prompts, shots, stops and metrics stay the harness'; only where the items come from changes, and no network is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset

from stethoscope.documents import json_lines
from stethoscope.errors import EvaluationError

TEMPLATES = Path(lm_eval.tasks.__file__).parent / "minerva_math"
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
_SCHEMA = (
    'one JSON object a line: {"problem": ..., "level": ..., "type": "Number Theory", "solution": "... \\\\boxed{4}"}'
)


def is_minerva(name: str) -> bool:
    """Whether a task's or group's name is one that `local_tasks` builds."""
    return name == GROUP or name in SUBJECTS


def local_tasks(names: Sequence[str], data: Path) -> dict[str, Any]:
    """The harness' tasks of these names with items from local files, as a group for `TaskManager.load`.

    Args:
        names: ``minerva_math`` or tasks of it.
        data: a folder with a file per subject (`algebra.jsonl`, ...) or one file of all, `test.jsonl`; or that file.

    Raises:
        EvaluationError: files or lines that are not in the MATH schema, all of them; subjects without items.
    """
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
            if problem := _problem(row, subject):
                problems.append(f"`{path.name}` {where}: {problem}")
            else:
                # the hub's columns in the hub's order, which an item's hash depends on
                level = str(row.get("level", ""))
                found[subject].append(
                    {"problem": row["problem"], "level": level, "type": subject, "solution": row["solution"]}
                )
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


def _problem(row: Any, subject: str) -> str | None:
    if isinstance(row, ValueError):
        return f"not JSON ({row})"
    if not isinstance(row, dict):
        return "not an object"
    if lacking := [key for key in ("problem", "solution") if not isinstance(row.get(key), str) or not row[key].strip()]:
        return f"no text in {' and '.join(f'`{key}`' for key in lacking)}"
    if not subject:
        return f"the type `{row.get('type')}` is none of MATH's seven subjects"
    if "\\boxed" not in row["solution"] and "\\fbox" not in row["solution"]:
        return "the solution has no `\\boxed{}` answer"
    return None


def _plain(text: str) -> str:
    return "".join(c for c in text.removeprefix("minerva_math_").lower().replace("&", "and") if c.isalpha())


_BY_NAME = {_plain(name): subject for task, subject in SUBJECTS.items() for name in (task, subject)}


def _subject(text: str) -> str:
    """The subject that a type or file name means, or nothing."""
    return _BY_NAME.get(_plain(text), "")
