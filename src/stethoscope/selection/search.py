"""The search for an edit that is worth its cost: from coarse to fine, on the loss itself, within so many forwards."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedModel

from stethoscope.editing.layers import LayerEdits
from stethoscope.executor import Executor
from stethoscope.selection.rivals import Progress, Texts, forwards, measure, standard_error

Key = tuple[tuple[int, float], ...]  # layers in order, each with its coefficient
EMPTY: Key = ()
CENTRES = 3  # the best edits so far, around each of which the search goes on


class Search:
    """The edits measured so far, with their effect on every document."""

    def __init__(
        self,
        model: PreTrainedModel,
        edits: LayerEdits,
        texts: Texts,
        *,
        depth: int,
        budget: float | None,
        most: float,
        executor: Executor | None,
        progress: Progress | None,
    ) -> None:
        self.depth, self.budget, self.most = depth, budget, most
        self.spent = 0.0
        self._measure = lambda changes: measure(model, edits, texts, changes, executor=executor)
        self._progress = progress
        self.gains: dict[Key, dict[str, Float64[np.ndarray, " documents"]]] = {}

    def add(self, keys: Sequence[Key]) -> bool:
        """Measure those that are new, as far as forwards are left; whether any was."""
        new = [key for key in dict.fromkeys(keys) if key not in self.gains]
        while new and self.spent + forwards([dict(key) for key in new], self.depth) > self.most:
            new.pop()
        if not new:
            return False
        changes = [dict(key) for key in new]
        found = self._measure(changes)
        self.spent += forwards(changes, self.depth)
        self.tokens = found.tokens
        self.base = {name: float(found.losses[name].sum() / found.tokens[name].sum()) for name in found.tokens}
        self.gains.setdefault(EMPTY, {name: np.zeros(len(tokens)) for name, tokens in found.tokens.items()})
        for i, key in enumerate(new):
            self.gains[key] = {name: sums[:, i] for name, sums in found.sums.items()}
        if self._progress:
            self._progress(round(self.spent), round(self.most))
        return True

    def mean(self, key: Key, corpus: str) -> float:
        """Nats per token by which the loss falls."""
        return float(self.gains[key][corpus].sum() / self.tokens[corpus].sum())

    def error(self, key: Key, corpus: str, than: Key = EMPTY) -> float:
        """The standard error of `mean` less that of another edit, paired over documents."""
        difference = self.gains[key][corpus] - self.gains[than][corpus]
        return float(standard_error(difference[:, None], self.tokens[corpus])[0])

    def worth(self, key: Key) -> float:
        """Gain on target, less cost on control where no budget speaks of it; -inf beyond the budget."""
        gain, cost = self.mean(key, "target"), -self.mean(key, "control")
        if self.budget is None:
            return gain - cost
        affordable = not key or cost + self.error(key, "control") <= self.budget * self.base["control"]
        return gain if affordable else -math.inf

    def clearly_worse(self, key: Key, than: Key) -> bool:
        """Whether its worth is less by more than a standard error of the difference."""
        errors = [self.error(key, "target", than)]
        if self.budget is None:
            errors.append(self.error(key, "control", than))
        return self.worth(than) - self.worth(key) > math.hypot(*errors)

    def best(self) -> Key:
        """The edit of largest worth, the smaller of equals."""
        return max(self.gains, key=lambda key: (self.worth(key), -len(key)))

    def choice(self) -> Key:
        """The edit with the fewest layers, then the least cost, that is not clearly worse than the best."""
        best = self.best()
        alike = [key for key in self.gains if self.worth(key) > -math.inf and not self.clearly_worse(key, best)]
        return min(alike, key=lambda key: (len(key), -self.mean(key, "control"), key))


def search_nested(search: Search, order: Sequence[int], grid: Sequence[float]) -> None:
    """The first k layers of ``order`` at one coefficient: a coarse grid, then around the best and the choice."""

    def key_of(k: int, coefficient: float) -> Key:
        return tuple((layer, float(coefficient)) for layer in sorted(order[:k]))

    sizes = _ladder(len(order))
    coarse = grid[1::2] if len(grid) > 3 else grid
    tried = {(k, c): key_of(k, c) for c in coarse for k in sizes}
    # the middle coefficient first: what no forwards are left for is dropped from the end
    middle = coarse[len(coarse) // 2]
    search.add(sorted(tried.values(), key=lambda key: key[0][1] != middle))
    while True:
        near: dict[tuple[int, float], Key] = {}
        ks = sorted({k for k, _ in tried})
        measured = [place for place in tried if tried[place] in search.gains]
        best = sorted(measured, key=lambda place: -search.worth(tried[place]))[:CENTRES]
        for k, c in [*best, *(place for place in measured if tried[place] == search.choice())]:
            at, here = grid.index(c), ks.index(k)
            less, more = grid[max(0, at - 1) : at], grid[at + 1 : at + 2]
            fewer, further = ks[max(0, here - 1) : here], ks[here + 1 : here + 2]
            places = [(k, other) for other in (*less, *more)]
            places += [(size, c) for n in (*fewer, *further) for size in (n, (k + n) // 2)]
            # more layers at less, fewer at more: the trades that a budget leaves
            places += [*itertools.product(further, less), *itertools.product(fewer, more)]
            near |= {place: key_of(*place) for place in places if place not in tried}
        tried |= near
        if not search.add(list(near.values())):
            return


def search_layers(search: Search, start: Key, grid: Sequence[float]) -> Key:
    """One layer's coefficient at a time to a neighbour in the grid, or 0, while that gains more than an error."""
    current, steps = start, [0.0, *grid]
    while True:
        moves = []
        for layer, coefficient in current:
            at = steps.index(coefficient)
            for i in (at - 1, at + 1):
                if 0 <= i < len(steps):
                    changed = dict(current) | {layer: steps[i]}
                    moves.append(tuple((n, c) for n, c in changed.items() if c))
        search.add(moves)
        better = [key for key in moves if key in search.gains and search.clearly_worse(current, key)]
        if not better:
            return current
        current = max(better, key=search.worth)


def _ladder(count: int) -> list[int]:
    """1, 2, 3, 5, 8, 13, ... and all."""
    sizes = [1, 2]
    while sizes[-1] < count:
        sizes.append(sizes[-1] + sizes[-2])
    return [size for size in sizes if size < count] + [count]
