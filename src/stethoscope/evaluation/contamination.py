"""What a selection or calibration has seen, so that no claim is tested on it.

    seen = Seen.of([*target, *control])
    Seen.load(folder).holds("Solve $x + 3 = 5$ for $x$.")
    refuse_seen(seen_items(load_tasks(["minerva_math"]), seen))

A text is taken for seen if all of its runs of 32 words occur in the documents seen, whatever stands around it; a text
of fewer words is judged by runs of 16, 8 or 4, so that templates with other numbers in them are told apart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from stethoscope.artifacts import new_file
from stethoscope.display import first_of
from stethoscope.errors import EvaluationError, StethoscopeError
from stethoscope.text.documents import Document

if TYPE_CHECKING:
    from lm_eval.api.task import Task

FILE = "seen.npy"
RUNS = (32, 16, 8, 4)  # words, longest first; a text of fewer than four is not judged
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Seen:
    """Hashes of all runs of words of these lengths in some documents, sorted."""

    runs: ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Seen":
        """Everything in these documents, chats included."""
        found: set[int] = set()
        for document in documents:
            for message in [{"content": document}] if isinstance(document, str) else document:
                words = _words(str(message.get("content") or ""))
                found.update(run for length in RUNS for run in _runs(words, length))
        return cls(np.array(sorted(found), dtype=np.uint64))

    def holds(self, text: str) -> bool:
        """Whether a text has been seen."""
        words = _words(text)
        length = next((length for length in RUNS if len(words) >= length), None)
        if length is None or not len(self.runs):
            return False
        wanted = np.fromiter(_runs(words, length), dtype=np.uint64)
        places = np.minimum(np.searchsorted(self.runs, wanted), len(self.runs) - 1)
        return bool((self.runs[places] == wanted).all())

    def save(self, folder: Path) -> None:
        """Write ``seen.npy``."""
        with new_file(folder / FILE) as temporary, temporary.open("wb") as file:
            np.save(file, self.runs, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "Seen":
        """Read what `save` wrote.

        Raises:
            StethoscopeError: the file is missing or damaged.
        """
        path = folder / FILE
        try:
            return cls(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            hint = "a run writes it when it selects layers"
            raise StethoscopeError(f"`{path}` cannot be read: {error}", hint=hint) from error


def seen_items(tasks: "Mapping[str, Task]", seen: Seen, *, limit: int | None = None) -> dict[str, tuple[int, ...]]:
    """Numbers of the items of each task whose question has been seen; tasks without any are left out."""
    found = {
        name: tuple(i for i, item in enumerate([*task.eval_docs][:limit]) if seen.holds(_question(task, item)))
        for name, task in tasks.items()
    }
    return {name: numbers for name, numbers in found.items() if numbers}


def refuse_seen(found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if there are any seen items.

    Raises:
        EvaluationError: there are; they are named.
    """
    if found:
        raise EvaluationError(
            "the evaluation would test on items that the choice of layers has seen",
            problems=[f"`{name}`: item {first_of(numbers, 5)}" for name, numbers in found.items()],
            hint="take other text for the diagnosis, or set `evaluate.exploratory: true`: the report will then say so",
        )


def _question(task: "Task", document: Mapping[str, Any]) -> str:
    """What an item asks: the longest field that stands in its prompt, else the prompt; without one, the longest."""
    prompt = task.doc_to_text(document)
    fields = [value.strip() for value in document.values() if isinstance(value, str)]
    if not isinstance(prompt, str) or not prompt.strip():  # the number of a choice; a whole text
        return max(fields, key=len, default="")
    return max((field for field in fields if field and field in prompt), key=len, default=prompt)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str], length: int) -> Iterator[int]:
    for start in range(len(words) - length + 1):
        run = " ".join(words[start : start + length])
        yield int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "little")
