"""Minerva Math on local files: the harness' own seven tasks, with their items from JSON lines in the MATH schema.

Prompts, shots, stops and metrics stay the harness'; only where the items come from changes, and no network is used.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset

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
    wanted = [task for task in SUBJECTS if GROUP in names or task in names]
    rows = _read(data)
    if empty := [f"`{task}`: nothing of type `{SUBJECTS[task]}`" for task in wanted if not rows[SUBJECTS[task]]]:
        raise EvaluationError(
            f"these tasks have no items in `{data}`", problems=empty, hint="name only subjects that are there"
        )
    members = [
        {"task": task, "custom_dataset": _dataset(rows[SUBJECTS[task]]), "training_split": None} for task in wanted
    ]
    return {"group": GROUP, "task": members}


def _dataset(rows: list[dict[str, str]]) -> Callable[..., dict[str, Dataset]]:
    def items_from_local_files(**_: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(rows)}

    return items_from_local_files


def _read(data: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {subject: [] for subject in SUBJECTS.values()}
    problems: list[str] = []
    for path in _files(data):
        named = _subject(path.stem)
        # not splitlines: JSON strings may hold other line ends
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                place = f"`{path.name}` line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    problems.append(f"{place}: not JSON ({error})")
                    continue
                problem, subject = _check(row, named)
                if problem:
                    problems.append(f"{place}: {problem}")
                else:
                    # the hub's columns in the hub's order, which an item's hash depends on
                    found[subject].append(
                        {
                            "problem": row["problem"],
                            "level": str(row.get("level", "")),
                            "type": subject,
                            "solution": row["solution"],
                        }
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
    if not chosen and len(files) == 1:
        chosen = files
    if not chosen:
        raise EvaluationError(
            f"`{data}` has no file of a subject and no `test.jsonl`",
            problems=[f"`{path.name}`" for path in files],
            hint="name the files `algebra.jsonl`, `counting_and_probability.jsonl`, ..., or give the one file itself",
        )
    return chosen


def _check(row: Any, named: str) -> tuple[str | None, str]:
    """What is wrong with a row, if anything, and its subject."""
    if not isinstance(row, dict):
        return "not an object", ""
    if lacking := [key for key in ("problem", "solution") if not isinstance(row.get(key), str) or not row[key].strip()]:
        return f"no text in {' and '.join(f'`{key}`' for key in lacking)}", ""
    subject = _subject(str(row.get("type", ""))) or named
    if not subject:
        return f"the type `{row.get('type')}` is none of MATH's seven subjects", ""
    if "\\boxed" not in row["solution"] and "\\fbox" not in row["solution"]:
        return "the solution has no `\\boxed{}` answer", ""
    return None, subject


def _subject(text: str) -> str:
    """The subject that a type or file name means, or nothing."""
    plain = _plain(text.removeprefix("minerva_math_"))
    short = {"countingandprob": "Counting & Probability", "numtheory": "Number Theory", "precalc": "Precalculus"}
    return short.get(plain) or next((s for s in SUBJECTS.values() if _plain(s) == plain), "")


def _plain(text: str) -> str:
    return "".join(c for c in text.lower().replace("&", "and") if c.isalpha())
