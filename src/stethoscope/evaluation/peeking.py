"""No claim on items that the selection has seen: they are found by their text and named."""

from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import Task

from stethoscope.display import first_of
from stethoscope.errors import EvaluationError
from stethoscope.seen import Seen

SHOWN = 5  # items named per task


def seen_items(tasks: Mapping[str, Task], seen: Seen, *, limit: int | None = None) -> dict[str, tuple[int, ...]]:
    """The items of each task whose question has been seen; tasks without any are left out."""
    found = {}
    for name, task in tasks.items():
        documents = [*task.eval_docs][:limit]
        numbers = tuple(i for i, document in enumerate(documents) if seen.holds(question(task, document)))
        if numbers:
            found[name] = numbers
    return found


def question(task: Task, document: Mapping[str, Any]) -> str:
    """What an item asks: the longest of its fields that stands in its prompt, else the prompt itself."""
    prompt = str(task.doc_to_text(document))
    fields = (value.strip() for value in document.values() if isinstance(value, str))
    return max((field for field in fields if field and field in prompt), key=len, default=prompt)


def refuse_seen(found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if there are any seen items, naming them.

    Raises:
        EvaluationError: there are.
    """
    if not found:
        return
    raise EvaluationError(
        "the evaluation would test on items that the choice of layers has seen",
        problems=[f"`{name}`: item {first_of([*map(str, numbers)], SHOWN)}" for name, numbers in found.items()],
        hint="take other text for the diagnosis, or set `evaluate.exploratory: true`: the report will then say so",
    )
