"""The order of the work: parts by themselves, or blocks that are forwarded once for several groups of layers.

Such a block goes batch by batch: one is forwarded, each group of layers reads its streams and adds to its sums, then
the next is forwarded. So no block has more than one batch's streams out, and few blocks are under way. Nothing is a
worker's own: streams and sums are values that the object store holds, so whoever dies, what it had in hand is done
again by another. A block in which anything else goes wrong is heard by each group by itself, as if never shared.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from stethoscope.diagnosis.listener import HeardBlock
from stethoscope.diagnosis.streams import Forward, Reading
from stethoscope.results.hearing import Layers
from stethoscope.text.documents import Document
from stethoscope.text.tokens import TokenBatch
from stethoscope.work import Lost, Piece


@dataclass(frozen=True, kw_only=True)
class Part:
    """A block of a corpus, or the samples of all (``corpus`` None), to be heard by the SAEs of a group of layers."""

    group: Layers
    corpus: str | None = None
    number: int = 0
    places: range = range(0)


@dataclass(kw_only=True)
class _Block:
    """A block under way, for the groups that are fed.

    Attributes:
        parts: by group, those not heard.
        batches: that are still to be forwarded.
        sums: each group's so far.
        out: groups that have yet to read the batch.
    """

    name: str
    parts: dict[Layers, Part]
    groups: tuple[Layers, ...]
    batches: deque[TokenBatch] = field(default_factory=deque)
    silent: int = 0
    sums: dict[Layers, Any] = field(default_factory=dict)
    out: int = 0
    given_up: bool = False


Results = list[tuple[Part, Any]]
_DONE = Piece(name="done", load=tuple)  # holds nothing


class Agenda:
    """Pieces of work, and what follows from each one's result.

    Attributes:
        pieces: grow as results come in.
    """

    def __init__(
        self,
        piece: Callable[[Part], Piece],
        documents: Callable[[Part], Mapping[int, Document]],
        *,
        parts: Sequence[Part] = (),
        waves: Sequence[Sequence[Part]] = (),
        blocks: int = 1,
    ) -> None:
        """
        Args:
            piece: a part as work by itself.
            documents: of a part.
            parts: done by themselves.
            waves: parts that are done one wave after another, those of a block of documents together.
            blocks: that may be under way at once.
        """
        self.pieces: list[Piece] = []
        self._then: list[Callable[[Any], Results] | None] = []
        self._piece, self._documents, self._most = piece, documents, blocks
        self._waves = iter(waves)
        self._waiting: Iterator[list[Part]] = iter(())
        self._blocks = self._out = 0
        for part in parts:
            self._alone(part)
        self._begin()

    def settle(self, number: int, found: Any) -> Results:
        """Take a piece's result, and add what follows.

        Returns:
            the parts that are heard with it.
        """
        then, self._then[number], self.pieces[number] = self._then[number], None, _DONE
        assert then is not None
        self._out -= 1
        heard = then(found)
        self._begin()
        return heard

    def _add(self, piece: Piece, then: Callable[[Any], Results]) -> None:
        self.pieces.append(piece)
        self._then.append(then)
        self._out += 1

    def _alone(self, part: Part) -> None:
        self._add(self._piece(part), lambda found: [(part, found)])

    def _begin(self) -> None:
        """Begin blocks as far as there is room, and the next wave when all of one is done."""
        while True:
            while self._blocks < self._most and (parts := next(self._waiting, None)):
                self._blocks += 1
                block = _Block(
                    name=self._piece(parts[0]).name,
                    parts={part.group: part for part in parts},
                    groups=tuple(part.group for part in parts),
                )
                self._forward(block, partial(self._first, block.groups, parts[0]))
            if self._out or (wave := next(self._waves, None)) is None:
                return
            of_block: dict[tuple[str, int], list[Part]] = {}
            for part in wave:
                if part.corpus is None:
                    self._alone(part)
                else:
                    of_block.setdefault((part.corpus, part.number), []).append(part)
            self._waiting = iter(of_block.values())

    def _first(self, groups: tuple[Layers, ...], part: Part) -> Forward:
        return Forward(groups=groups, documents=self._documents(part))

    def _forward(self, block: _Block, load: Callable[[], Forward]) -> None:
        block.out = len(block.groups)
        piece = Piece(name=f"forward of {block.name}", load=load, keep=len(block.groups))
        self._add(piece, partial(self._forwarded, block))

    def _forwarded(self, block: _Block, found: Any) -> Results:
        """Give the streams to every group."""
        if isinstance(found, Lost) or isinstance(found[0], Lost):
            return self._give_up(block)
        said, *streams = found
        if said is not None:
            block.batches, block.silent = deque(said.batches), said.silent
        for group, stream in zip(block.groups, streams, strict=True):
            self._give(block, group, stream)
        return []

    def _give(self, block: _Block, group: Layers, stream: Any) -> None:
        work = Reading(layers=group, last=not block.batches)
        name = f"layers {group[0]} to {group[-1]} on {block.name}"
        given = (stream, block.sums[group]) if group in block.sums else (stream,)
        piece = Piece(name=name, key=group, load=lambda: work, keep=1, given=given)
        self._add(piece, partial(self._read, block, group))

    def _read(self, block: _Block, group: Layers, found: Any) -> Results:
        """Keep a group's sums; when all have read, go on with the next batch, or end."""
        if block.given_up:
            return []
        if isinstance(found, Lost) or isinstance(found[0], Lost):
            return self._give_up(block)
        statistics, block.sums[group] = found
        block.out -= 1
        heard: Results = []
        if statistics is not None:
            part = block.parts.pop(group)
            places = frozenset(part.places)
            heard = [(part, HeardBlock(statistics=statistics, places=places, silent=block.silent))]
        if not block.out and block.batches:
            work = Forward(groups=block.groups, batch=block.batches.popleft())
            self._forward(block, lambda: work)
        elif not block.out:
            self._blocks -= 1
        return heard

    def _give_up(self, block: _Block) -> Results:
        """Let each group hear the block by itself: what is wrong shows there, and is named."""
        block.given_up = True
        block.sums.clear()
        self._blocks -= 1
        for part in block.parts.values():
            self._alone(part)
        return []
