"""What a selection or calibration has seen, so that no claim is tested on it.

    seen = Seen.of([*target, *control])
    seen.save(folder)
    Seen.load(folder).holds("Solve $x + 3 = 5$ for $x$.")

A text is taken for seen if all of its runs of 32 words occur in the documents seen, whatever stands around it; a text
of fewer words is judged by runs of 16, 8 or 4, so that templates with other numbers in them are told apart.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy import ndarray

from stethoscope.errors import StethoscopeError
from stethoscope.text.documents import Document

FILE = "seen.npy"
# Runs of words, longest first: a text too short for one is judged by the next, and one of fewer than four words not.
RUNS = (32, 16, 8, 4)
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Seen:
    """Hashes of all runs of words of these lengths in some documents, sorted."""

    runs: ndarray

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Seen":
        """Everything in these documents, chats included."""
        found = {
            run
            for document in documents
            for text in _texts(document)
            for length in RUNS
            for run in _runs(_words(text), length)
        }
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
        np.save(folder / FILE, self.runs, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "Seen":
        """Read what `save` wrote.

        Raises:
            StethoscopeError: the file is missing or damaged.
        """
        try:
            return cls(np.load(folder / FILE, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise StethoscopeError(
                f"`{folder / FILE}` cannot be read: {error}", hint="a run writes it when it selects layers"
            ) from error


def _texts(document: Document) -> list[str]:
    return [document] if isinstance(document, str) else [str(message.get("content") or "") for message in document]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str], length: int) -> Iterator[int]:
    for start in range(len(words) - length + 1):
        run = " ".join(words[start : start + length])
        yield int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "little")
