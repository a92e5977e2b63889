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
        key: what a worker must have at hand for it and keeps for the next of the same key, such as some SAEs; nothing
            if None.
        keep: so many values of its result stay where they are until other pieces are given them: the task returns
            what is told to all who ask, and these behind it.
        given: kept values of other pieces, which the task gets behind what is loaded. More of the same key are to
            come: such a piece waits for a worker that has its key, if there is one.
    """

    name: str
    load: Callable[[], Any]
    key: Hashable = None
    keep: int = 0
    given: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lost:
    """In place of a piece's result: whoever takes it up dies, or what it was given is gone."""

    why: str


@dataclass(frozen=True, kw_only=True)
class Means:
    """What workers have.

    Attributes:
        workers: how many pieces are worked on at once.
        device: on which they compute, ``cpu`` or ``cuda``.
        share: of a GPU, or threads of a CPU, for each.
        store: bytes of what is kept between pieces that a machine has room for; None if nothing is moved.
    """

    workers: int = 1
    device: str = "cpu"
    share: float = 1.0
    store: int | None = None


@runtime_checkable
class Run(Protocol):
    """Does the pieces of a task: yields each one's number and result as it is done, in any order."""

    @property
    def means(self) -> Means:
        """What those have who do them."""

    def __call__(self, task: Callable[..., Any], pieces: Sequence[Piece]) -> Iterator[tuple[int, Any]]:
        """Call ``task`` with a worker's tool, what each piece loads and what it is given.

        Args:
            pieces: may grow at its end between two results. A piece is not asked for again when its result is there.
        """


# Given what makes a tool of a worker's model and what else it has; see `scaling.Crew`.
Spread = Callable[[Callable[..., Any]], Run]


class Alone:
    """This process and a tool, piece by piece, in order."""

    def __init__(self, tool: Any) -> None:
        self.tool = tool

    @property
    def means(self) -> Means:
        """One process, which moves nothing."""
        return Means()

    def __call__(self, task: Callable[..., Any], pieces: Sequence[Piece]) -> Iterator[tuple[int, Any]]:
        for number, piece in enumerate(pieces):
            yield number, task(self.tool, piece.load(), *piece.given)
