"""The demo's tasks as files: JSON lines and lm-evaluation-harness configurations, and text for diagnosis.

write_tasks(Path("runs/demo/tasks"))     # then TaskManager(include_path="runs/demo/tasks")
"""

import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import yaml

from stethoscope_demo.items import CONTROL_TASKS, MATH_SUBJECTS, SHOTS, TASKS, items, shots

DATA = Path(str(files("stethoscope_demo"))) / "data"
PACKAGED = ("test", "calibration", "shots")
TEST_ITEMS = 250
CALIBRATION_ITEMS = 150
TARGET_DOCUMENTS = 210
HELD_OUT_DOCUMENTS = 140  # with those above, of three problems each, every calibration item is used once
MATH_GROUP = "stethoscope_math"
CONTROL_GROUP = "stethoscope_control"
ANSWER = r"The final answer is \$(.*?)\$"

# The longest gold solution has 60 of SmolLM2's tokens up to the stop. One limit for all tasks: a tighter one for those
# with short answers would count every arm that shows its working as wrong.
MAX_NEW_TOKENS = 64


def packaged(task: str, split: str) -> Path:
    """The file of a task's items that this package carries; `scripts/make_items.py` made it."""
    return DATA / "items" / f"{task}.{split}.jsonl"


def write_tasks(folder: Path) -> list[str]:
    """Writes every task's configuration; returns the names of the tasks, mathematics first.

    The configurations name the packaged items by absolute paths, which `datasets` needs.
    """
    for task in TASKS:
        write_task(folder, task, {split: str(packaged(task, split)) for split in PACKAGED})
    for group, tasks in ((MATH_GROUP, MATH_SUBJECTS), (CONTROL_GROUP, CONTROL_TASKS)):
        mean = {"metric": "exact_match", "aggregation": "mean", "weight_by_size": False, "filter_list": "answer"}
        members = [task_name(task) for task in tasks]
        _write_yaml(folder / f"{group}.yaml", {"group": group, "task": members, "aggregate_metric_list": [mean]})
    return [task_name(task) for task in TASKS]


def write_task(folder: Path, task: str, data: dict[str, str]) -> None:
    """Writes one task's configuration; ``data`` names the files of its splits, `test` and `shots` among them."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_yaml(folder / f"{task}.yaml", _configuration(task, data))


def generate_items() -> Iterator[tuple[Path, str]]:
    """Every packaged file of items and what the generators make of it; needs `reasoning-gym`."""
    for task in TASKS:
        for split, found in (
            ("test", items(task, "test", TEST_ITEMS)),
            ("calibration", items(task, "calibration", CALIBRATION_ITEMS)),
            ("shots", shots(task)),
        ):
            rows = ({"problem": i.problem, "solution": i.solution, "answer": i.answer, "kind": i.kind} for i in found)
            yield packaged(task, split), _lines(rows)


def task_name(task: str) -> str:
    """What lm-evaluation-harness calls a task."""
    return f"stethoscope_{task}"


def _configuration(task: str, data: dict[str, str]) -> dict[str, Any]:
    return {
        "task": task_name(task),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data},
        "output_type": "generate_until",
        "test_split": "test",
        "fewshot_split": "shots",
        "num_fewshot": SHOTS,
        "fewshot_config": {"sampler": "first_n", "split": "shots", "doc_to_target": "{{solution}}"},
        "doc_to_text": "Problem:\n{{problem}}\n\nSolution:",
        "doc_to_target": "{{answer}}",
        # The second stop saves a quarter of the tokens: the answer stands before it.
        "generation_kwargs": {
            "until": ["Problem:", " I hope"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": MAX_NEW_TOKENS,
        },
        "filter_list": [
            {
                "name": "answer",
                "filter": [{"function": "regex", "regex_pattern": ANSWER}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def target_documents(count: int, *, problems: int = 3) -> Iterator[dict[str, str]]:
    """Calibration text: documents of several problems of one subject in the tested form, subjects in turn.

    Three problems have about as many tokens as a general document. Each of a subject's calibration problems is used
    once before any is used again.
    """
    pools = {subject: cycle(_read(packaged(subject, "calibration"))) for subject in MATH_SUBJECTS}
    for subject in islice(cycle(MATH_SUBJECTS), count):
        yield {"text": _joined(islice(pools[subject], problems)), "subject": subject}


def _joined(rows: Iterable[dict[str, str]]) -> str:
    return "\n\n".join(f"Problem:\n{row['problem']}\n\nSolution: {row['solution']}" for row in rows)


def split_prompt(document: dict[str, str]) -> dict[str, str]:
    """A document with all before its last solution as `prompt`: what is tested is the solution."""
    before, solution = document["text"].rsplit("Solution:", 1)
    return {**document, "prompt": f"{before}Solution:", "text": solution}


def general_documents(split: Literal["calibration", "test"]) -> Iterator[dict[str, str]]:
    """The packaged non-mathematical text: one half for diagnosis, the other for the loss it is judged by."""
    for row in _read(DATA / "general.jsonl"):
        if row["split"] == split:
            yield {"text": row["text"], "source": row["source"]}


def write_text_corpora(folder: Path) -> None:
    """Writes `target.jsonl` and `control.jsonl` for the diagnosis, `letters.jsonl` for the filter to protect, and
    `held_out.jsonl` and `general.jsonl` to judge by."""
    folder.mkdir(parents=True, exist_ok=True)
    target = list(target_documents(TARGET_DOCUMENTS + HELD_OUT_DOCUMENTS))
    parts = [split_prompt(row) for row in target[:TARGET_DOCUMENTS]]
    whole = [
        row | {"prompt": part["prompt"], "solution": part["text"]} for row, part in zip(target, parts, strict=False)
    ]
    _write_lines(folder / "target.jsonl", whole)
    _write_lines(folder / "held_out.jsonl", map(split_prompt, target[TARGET_DOCUMENTS:]))
    _write_lines(folder / "control.jsonl", general_documents("calibration"))
    letters = _read(packaged("letter_counting", "calibration"))
    _write_lines(folder / "letters.jsonl", ({"text": _joined(letters[n : n + 3])} for n in range(0, len(letters), 3)))
    _write_lines(folder / "general.jsonl", general_documents("test"))


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text(_lines(rows), encoding="utf-8")


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
