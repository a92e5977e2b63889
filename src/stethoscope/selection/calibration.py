"""How many layers and how much of the change, found on calibration text: target loss gained per control loss paid.

    found = calibrate(model, edits, texts, z, seen=hashes, provenance=provenance, budget=0.01)
    EditPlan.for_layers(found.coefficients)

Sets are nested: the layers whose score's z, relative to its null, reaches a threshold. So a threshold means the same
in a model of any size. Sets and coefficients are searched from coarse to fine, in memory, on the loss itself.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from stethoscope.artifacts import Artifact, Provenance
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.models import decoder_layers
from stethoscope.selection.rivals import Progress, Texts, forwards, measure, standard_error

COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_FORWARDS = 60.0
CENTRES = 3  # the best edits so far, around each of which the search goes on
Key = tuple[tuple[int, float], ...]  # layers in order, each with its coefficient
EMPTY: Key = ()


class CalibrationPoint(BaseModel):
    """One edit and its true effect on calibration text, in nats per token against the base.

    Attributes:
        coefficients: layer -> coefficient; empty is the base itself.
        threshold: the least z among its layers.
        target_gain: by how much the target loss falls; errors are standard errors, paired over documents.
        control_cost: by how much the control loss rises; ``control_increase`` is that as a share of the base's.
        on_front: no other point gains as much for less, or more for as little.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    coefficients: dict[int, float]
    threshold: float | None
    target_gain: float
    target_error: float
    control_cost: float
    control_error: float
    control_increase: float
    on_front: bool


class Calibration(Artifact):
    """Every edit that was tried, and the one to make.

    Attributes:
        z: each layer's score relative to its null, as it was given.
        budget: by what share control loss may rise; None weighs a nat of control against a nat of target.
        base_loss: nats per token of each corpus.
        best: the point of largest worth; ``choice`` is the simplest that is not clearly worse.
        forwards: of the whole calibration text, that were spent.
        seen: corpus -> hash of its documents, which no claim may be tested on.
    """

    FILE: ClassVar[str] = "calibration.json"

    z: dict[int, float]
    budget: float | None
    base_loss: dict[str, float]
    points: tuple[CalibrationPoint, ...]
    best: int
    choice: int
    rule: str
    reason: str
    forwards: float
    seen: dict[str, str]

    @property
    def coefficients(self) -> dict[int, float]:
        """Layer -> coefficient of the chosen edit; empty where nothing is worth its cost."""
        return self.points[self.choice].coefficients

    @property
    def threshold(self) -> float | None:
        """The least z that a chosen layer has."""
        return self.points[self.choice].threshold

    @property
    def front(self) -> tuple[CalibrationPoint, ...]:
        """The points that no other is better than, by rising cost."""
        return tuple(sorted((p for p in self.points if p.on_front), key=lambda p: p.control_cost))


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
    progress: Progress | None = None,
) -> Calibration:
    """Find the threshold and the coefficient.

    The choice follows the one-standard-error rule: of the edits within the budget, the one with the fewest layers, then
    the least control cost, whose worth is within one standard error (paired over documents) of the best's. The base
    itself is among them, so an edit that gains nothing certain is not made.

    Args:
        texts: ``target`` and ``control`` calibration text.
        z: per layer that may be chosen, its score in standard deviations of its null; ties go to the lower layer.
        seen: corpus -> `documents_hash` of its documents.
        coefficients: those tried.
        budget: the share by which control loss may rise, with a standard error to spare (0.01: 1 % worse). The best is
            then the largest gain within it; without one it is the largest gain less cost.
        per_layer: go on from the choice by coordinate search, one layer's coefficient at a time.
        most_forwards: of the whole text; see `stethoscope.selection.rivals.forwards`.
        progress: called with forwards spent and ``most_forwards``, both rounded.

    Raises:
        StethoscopeError: a corpus is missing or has one document, or layers, coefficients or budget make no sense.
    """
    depth = len(decoder_layers(model))
    _check(texts, z, seen, coefficients, budget, depth)
    if most_forwards < 2:
        raise StethoscopeError(f"`{most_forwards}` forwards are too few to try any edit", hint="allow 60")
    order = sorted(z, key=lambda layer: (-z[layer], layer))
    search = _Search(model, edits, texts, depth=depth, budget=budget, most=most_forwards, progress=progress)
    grid = sorted(coefficients)
    _search_nested(search, order, grid)
    choice = search.choice()
    if per_layer:
        choice = _search_layers(search, choice, grid)
    return search.freeze(choice, z=z, seen=seen, provenance=provenance, moved=per_layer)


class _Search:
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
        progress: Progress | None,
    ) -> None:
        self.depth, self.budget, self.most = depth, budget, most
        self.spent = 0.0
        self._measure = lambda changes: measure(model, edits, texts, changes)
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
        return float(self.gains[key][corpus].sum() / self.tokens[corpus].sum())

    def error(self, key: Key, corpus: str, than: Key = EMPTY) -> float:
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
        return max(self.gains, key=lambda key: (self.worth(key), -len(key)))

    def choice(self) -> Key:
        best = self.best()
        alike = [key for key in self.gains if self.worth(key) > -math.inf and not self.clearly_worse(key, best)]
        return min(alike, key=lambda key: (len(key), -self.mean(key, "control"), key))

    def freeze(
        self,
        choice: Key,
        *,
        z: Mapping[int, float],
        seen: Mapping[str, str],
        provenance: Provenance,
        moved: bool,
    ) -> Calibration:
        keys = sorted(self.gains, key=lambda key: (len(key), key))
        plane = np.array([[self.mean(key, "target"), -self.mean(key, "control")] for key in keys])
        points = tuple(
            CalibrationPoint(
                coefficients=dict(key),
                threshold=min((float(z[layer]) for layer, _ in key), default=None),
                target_gain=gain,
                target_error=self.error(key, "target"),
                control_cost=cost,
                control_error=self.error(key, "control"),
                control_increase=cost / self.base["control"],
                on_front=not (
                    (plane[:, 0] >= gain) & (plane[:, 1] <= cost) & ((plane[:, 0] > gain) | (plane[:, 1] < cost))
                ).any(),
            )
            for key, (gain, cost) in zip(keys, plane.tolist(), strict=True)
        )
        if self.budget is None:
            rule = "largest target gain less control cost"
        else:
            rule = f"largest target gain with control loss at most {100 * self.budget:g} % worse"
        rule += ", then the fewest layers and least cost within one standard error"
        if moved:
            rule += ", then one layer's coefficient at a time while that gains more than a standard error"
        return Calibration(
            provenance=provenance,
            z={layer: float(value) for layer, value in sorted(z.items())},
            budget=self.budget,
            base_loss=self.base,
            points=points,
            best=keys.index(self.best()),
            choice=keys.index(choice),
            rule=rule,
            reason=_reason(points[keys.index(choice)], points[keys.index(self.best())]),
            forwards=self.spent,
            seen=dict(seen),
        )


def _search_nested(search: _Search, order: Sequence[int], grid: Sequence[float]) -> None:
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


def _search_layers(search: _Search, start: Key, grid: Sequence[float]) -> Key:
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


def _reason(choice: CalibrationPoint, best: CalibrationPoint) -> str:
    def said(point: CalibrationPoint) -> str:
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
        return f"{said(choice)} is the best found: {figures}"
    return (
        f"{said(choice)}: {figures}; not clearly worse than the best found, {said(best)} (gain {best.target_gain:.4f})"
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
    problems += [f"there is no text called `{name}` to calibrate on" for name in texts if name not in seen]
    problems += [f"layer {layer} is not one of the model's {depth}" for layer in z if not 0 <= layer < depth]
    problems += [f"z of layer {layer} is {value}" for layer, value in z.items() if not math.isfinite(value)]
    problems += [f"the coefficient {c} is not a positive number" for c in coefficients if not 0 < c < math.inf]
    if not z or not coefficients:
        problems.append("there are no layers or no coefficients to choose from")
    if budget is not None and not 0 <= budget < math.inf:
        problems.append(f"the budget on control loss is {budget}, not a share such as 0.01")
    if problems:
        raise StethoscopeError("cannot calibrate", problems=problems, hint="calibration needs target and control text")
