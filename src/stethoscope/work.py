"""Work in pieces that do not depend on each other: a loop in this process, or the workers of a cluster (`scaling`).

    for number, result in Alone(tool)(Tool.use, pieces):
        ...

What is cut into pieces, and how, never depends on who does them; whoever asked puts the results in order.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of work.

    Attributes:
        name: what it is, for a person.
        load: gives what has to be worked on; called when its turn comes, so that not all of it lies in memory.
        key: what a worker must have at hand for it and keeps for the next of the same key, such as some SAEs.
    """

    name: str
    load: Callable[[], Any]
    key: Hashable = None


@dataclass(frozen=True, kw_only=True)
class Lost:
    """In place of a piece's result: whoever takes it up dies."""

    why: str


@runtime_checkable
class Run(Protocol):
    """Does the pieces of a task: yields each one's number and result as it is done, in any order.

    Attributes:
        workers: how many pieces are worked on at once.
    """

    workers: int

    def __call__(self, task: Callable[[Any, Any], Any], pieces: Sequence[Piece]) -> Iterator[tuple[int, Any]]:
        """Call ``task`` with a worker's tool and what each piece loads."""


# Given what makes a tool of a worker's model and what else it has; see `scaling.Crew`.
Spread = Callable[[Callable[..., Any]], Run]


class Alone:
    """This process and a tool, piece by piece, in order."""

    def __init__(self, tool: Any) -> None:
        self.tool, self.workers = tool, 1

    def __call__(self, task: Callable[[Any, Any], Any], pieces: Sequence[Piece]) -> Iterator[tuple[int, Any]]:
        for number, piece in enumerate(pieces):
            yield number, task(self.tool, piece.load())
