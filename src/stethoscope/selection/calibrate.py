"""How many layers and how much of the change, found on calibration text: target loss gained per control loss paid.

    found = calibrate(model, edits, texts, z, seen=hashes, provenance=provenance, budget=0.01)
    EditPlan.for_layers(found.coefficients)

Sets are nested: the layers whose score's z, relative to its null, reaches a threshold. So a threshold means the same
in a model of any size. Sets and coefficients are searched from coarse to fine, in memory, on the loss itself.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.executor import Executor
from stethoscope.models.load import decoder_layers
from stethoscope.results.calibration import Calibration, CalibrationPoint
from stethoscope.selection.injection import Change, Gains, Progress, Texts, forwards, measure, standard_error

COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_FORWARDS = 60.0

Key = tuple[tuple[int, float], ...]  # an edit: layers in order, each with its coefficient
BASE: Key = ()
CENTRES = 3  # the best edits so far, around each of which the search goes on


def calibrate(
    model: PreTrainedModel,
    edits: LayerEdits,
    texts: Texts,
    z: Mapping[int, float],
    *,
    seen: Mapping[str, str],
    provenance: Provenance,
    coefficients: Sequence[float] = COEFFICIENTS,
    budget: float | None = None,
    per_layer: bool = False,
    most_forwards: float = MOST_FORWARDS,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find the threshold and the coefficient.

    The choice follows the one-standard-error rule: of the edits within the budget, the one with the fewest layers, then
    the least control cost, whose value is within one standard error (paired over documents) of the best's. The base
    itself is among them, so an edit that gains nothing certain is not made.

    Args:
        texts: ``target`` and ``control`` calibration text.
        z: per layer that may be chosen, its score in standard deviations of its null; ties go to the lower layer.
        seen: corpus -> `documents_hash` of its documents.
        coefficients: those tried.
        budget: the share by which control loss may rise, with a standard error to spare (0.01: 1 % worse). The best is
            then the largest gain within it; without one it is the largest gain less cost.
        per_layer: go on from the choice by coordinate search, one layer's coefficient at a time.
        most_forwards: of the whole text; see `stethoscope.selection.injection.forwards`.
        executor: runs the work; here if None.
        progress: called with forwards spent and ``most_forwards``, both rounded.

    Raises:
        StethoscopeError: a corpus is missing or has one document, or layers, coefficients or budget make no sense.
    """
    depth = len(decoder_layers(model))
    _check(texts, z, seen, coefficients, budget, depth)
    if most_forwards < 2:
        raise StethoscopeError(f"`{most_forwards}` forwards are too few to try any edit", hint="allow 60")

    def measured(changes: Sequence[Change]) -> Gains:
        return measure(model, edits, texts, changes, executor=executor)

    search = Search(measured, depth=depth, budget=budget, most=most_forwards, progress=progress)
    grid = sorted(set(coefficients))
    search_nested(search, sorted(z, key=lambda layer: (-z[layer], layer)), grid)
    choice = search.choice()
    rule = "largest target gain less control cost"
    if budget is not None:
        rule = f"largest target gain with control loss at most {100 * budget:g} % worse"
    rule += ", then the fewest layers and least cost within one standard error"
    if per_layer:
        choice = search_layers(search, choice, grid)
        rule += ", then one layer's coefficient at a time while that gains more than a standard error"
    keys = sorted(search.effects, key=lambda key: (len(key), key))
    points = _points(search, keys, z)
    best = keys.index(search.best())
    return Calibration(
        provenance=provenance,
        z={layer: float(value) for layer, value in sorted(z.items())},
        budget=budget,
        base_loss=search.base,
        points=points,
        best=best,
        choice=keys.index(choice),
        rule=rule,
        reason=_reason(points[keys.index(choice)], points[best]),
        forwards=search.spent,
        seen=dict(seen),
    )


def _check(
    texts: Texts,
    z: Mapping[int, float],
    seen: Mapping[str, str],
    coefficients: Sequence[float],
    budget: float | None,
    depth: int,
) -> None:
    problems = []
    for name in ("target", "control"):
        if sum(len(batch.documents) for batch in texts.get(name, ())) < 2:
            problems.append(f"the {name} text has fewer than two documents")
        if name not in seen:
            problems.append(f"the {name} text has no hash")
    problems += [f"`{name}` is neither target nor control" for name in texts if name not in ("target", "control")]
    problems += [f"layer {layer} is not one of the model's {depth}" for layer in z if not 0 <= layer < depth]
    problems += [f"z of layer {layer} is {value}" for layer, value in z.items() if not math.isfinite(value)]
    problems += [f"the coefficient {c} is not a positive number" for c in coefficients if not 0 < c < math.inf]
    if not z or not coefficients:
        problems.append("there are no layers or no coefficients to choose from")
    if budget is not None and not 0 <= budget < math.inf:
        problems.append(f"the budget on control loss is {budget}, not a share such as 0.01")
    if problems:
        raise StethoscopeError("cannot calibrate", problems=problems, hint="calibration needs target and control text")


class Search:
    """The edits measured so far: what each does to every document, and which is best.

    Attributes:
        effects: edit -> corpus -> nats by which each document's summed loss falls.
        spent: forwards of the whole text so far.
    """

    def __init__(
        self,
        measured: Callable[[Sequence[Change]], Gains],
        *,
        depth: int,
        budget: float | None,
        most: float,
        progress: Progress | None,
    ) -> None:
        self._measured, self._depth, self._budget, self._most = measured, depth, budget, most
        self._progress = progress
        self.spent = 0.0
        self.effects: dict[Key, dict[str, Float64[np.ndarray, " documents"]]] = {}

    def add(self, keys: Sequence[Key]) -> bool:
        """Measure those that are new, as far as forwards are left; whether any was."""
        changes = [dict(key) for key in dict.fromkeys(keys) if key not in self.effects]
        while changes and self.spent + forwards(changes, self._depth) > self._most:
            changes.pop()
        if not changes:
            return False
        found = self._measured(changes)
        self.spent += forwards(changes, self._depth)
        self.tokens = found.tokens
        self.base = {name: float(found.losses[name].sum() / found.tokens[name].sum()) for name in found.tokens}
        self.effects.setdefault(BASE, {name: np.zeros(len(tokens)) for name, tokens in found.tokens.items()})
        for i, change in enumerate(changes):
            self.effects[tuple(change.items())] = {name: sums[:, i] for name, sums in found.sums.items()}
        if self._progress:
            self._progress(round(self.spent), round(self._most))
        return True

    def mean(self, key: Key, corpus: str) -> float:
        """Nats per token by which the loss falls."""
        return float(self.effects[key][corpus].sum() / self.tokens[corpus].sum())

    def error(self, key: Key, corpus: str, than: Key = BASE) -> float:
        """The standard error of `mean` less that of another edit, paired over documents."""
        difference = self.effects[key][corpus] - self.effects[than][corpus]
        return float(standard_error(difference[:, None], self.tokens[corpus])[0])

    def value(self, key: Key) -> float:
        """Gain on target, less cost on control where there is no budget; -inf beyond the budget."""
        gain, cost = self.mean(key, "target"), -self.mean(key, "control")
        if self._budget is None:
            return gain - cost
        affordable = not key or cost + self.error(key, "control") <= self._budget * self.base["control"]
        return gain if affordable else -math.inf

    def clearly_worse(self, key: Key, than: Key) -> bool:
        """Whether its value is less by more than a standard error of the difference."""
        errors = [self.error(key, "target", than)]
        if self._budget is None:
            errors.append(self.error(key, "control", than))
        return self.value(than) - self.value(key) > math.hypot(*errors)

    def best(self) -> Key:
        """The edit of largest value, the smaller of equals."""
        return max(self.effects, key=lambda key: (self.value(key), -len(key)))

    def choice(self) -> Key:
        """The edit with the fewest layers, then the least cost, that is not clearly worse than the best."""
        best = self.best()
        alike = [key for key in self.effects if self.value(key) > -math.inf and not self.clearly_worse(key, best)]
        return min(alike, key=lambda key: (len(key), -self.mean(key, "control"), key))


def search_nested(search: Search, order: Sequence[int], grid: Sequence[float]) -> None:
    """The first k layers of ``order`` at one coefficient: a coarse grid, then around the best and the choice."""

    def key_of(k: int, coefficient: float) -> Key:
        return tuple((layer, float(coefficient)) for layer in sorted(order[:k]))

    sizes = [1, 2]  # 1, 2, 3, 5, 8, 13, ... and all
    while sizes[-1] < len(order):
        sizes.append(sizes[-1] + sizes[-2])
    sizes = [size for size in sizes if size < len(order)] + [len(order)]
    coarse = grid[1::2] if len(grid) > 3 else grid
    tried = {(k, c): key_of(k, c) for c in coarse for k in sizes}
    # the middle coefficient first: what no forwards are left for is dropped from the end
    middle = coarse[len(coarse) // 2]
    search.add(sorted(tried.values(), key=lambda key: key[0][1] != middle))
    while True:
        near: dict[tuple[int, float], Key] = {}
        ks = sorted({k for k, _ in tried})
        measured = [place for place in tried if tried[place] in search.effects]
        best = sorted(measured, key=lambda place: -search.value(tried[place]))[:CENTRES]
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
        better = [key for key in moves if key in search.effects and search.clearly_worse(current, key)]
        if not better:
            return current
        current = max(better, key=search.value)


def _points(search: Search, keys: Sequence[Key], z: Mapping[int, float]) -> tuple[CalibrationPoint, ...]:
    plane = np.array([[search.mean(key, "target"), -search.mean(key, "control")] for key in keys])
    gains, costs = plane.T
    return tuple(
        CalibrationPoint(
            coefficients=dict(key),
            threshold=min((float(z[layer]) for layer, _ in key), default=None),
            target_gain=gain,
            target_error=search.error(key, "target"),
            control_cost=cost,
            control_error=search.error(key, "control"),
            control_increase=cost / search.base["control"],
            on_front=not ((gains >= gain) & (costs <= cost) & ((gains > gain) | (costs < cost))).any(),
        )
        for key, (gain, cost) in zip(keys, plane.tolist(), strict=True)
    )


def _reason(choice: CalibrationPoint, best: CalibrationPoint) -> str:
    def edit(point: CalibrationPoint) -> str:
        if not point.coefficients:
            return "no edit"
        amounts = sorted(set(point.coefficients.values()))
        amount = f"{amounts[0]:g}" if len(amounts) == 1 else f"{amounts[0]:g} to {amounts[-1]:g}"
        return f"{len(point.coefficients)} layers of z >= {point.threshold:.1f} at {amount}"

    figures = (
        f"target loss falls by {choice.target_gain:.4f} ± {choice.target_error:.4f} nats per token,"
        f" control loss rises by {choice.control_cost:.4f} ± {choice.control_error:.4f}"
        f" ({100 * choice.control_increase:+.2f} %)"
    )
    if choice == best:
        return f"{edit(choice)} is the best found: {figures}"
    return (
        f"{edit(choice)}: {figures}; not clearly worse than the best found, {edit(best)} (gain {best.target_gain:.4f})"
    )
