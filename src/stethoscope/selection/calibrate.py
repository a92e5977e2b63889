"""How many layers, how much of the change, behind which filter: target loss gained per control loss paid.

    found = calibrate(model, edits, texts, z, seen=hashes, provenance=provenance, budget=0.01)
    EditPlan.for_layers(found.coefficients)

Sets are nested: the layers whose score's z, relative to its null, reaches a threshold. So a threshold means the same
in a model of any size. All is searched from coarse to fine, in memory, on the loss of calibration text itself.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.editing.layers import Amount, Filtered, LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.executor import Executor
from stethoscope.models.load import decoder_layers
from stethoscope.results.calibration import Calibration, CalibrationPoint
from stethoscope.selection.injection import Change, Gains, Progress, Texts, forwards, measure, standard_error
from stethoscope.selection.policies import depth_segments

COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MOST_FORWARDS = 60.0

Key = tuple[tuple[int, Amount], ...]  # an edit: layers in order, each with its coefficient, or that and the filter's
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
    in_nats: bool = False,
    keep: float | None = None,
    strengths: Sequence[float | None] = (None,),
    others: Sequence[Mapping[int, float]] = (),
    per_layer: bool = False,
    most_forwards: float = MOST_FORWARDS,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Find the threshold and the coefficient.

    The choice follows the one-standard-error rule: of the edits within the budget, the one with the fewest layers, then
    the least control cost, whose value is within one standard error (paired over documents) of the best's; with
    ``keep`` it is that of least cost with this share of the best's value. No edit is made that gains nothing certain.

    Args:
        texts: ``target`` and ``control`` calibration text, and any others on which an edit costs something.
        z: per layer that may be chosen, its score in standard deviations of its null; ties go to the lower layer.
        seen: corpus -> `documents_hash` of its documents.
        coefficients: those tried.
        budget: the share (0.01: 1 % worse) by which the loss on any other text may rise, with a standard error to
            spare; or the nats per token, on average, if ``in_nats``. The best is then the largest gain within it;
            without one it is the largest gain less cost.
        keep: a share of the largest value, such as 0.95.
        strengths: of the filters that ``edits`` has, from the strongest; None is the raw change. With others, sets that
            are spread over the stack are tried, too, and the search begins with all layers and with raw changes.
        others: edits to try first, layer -> coefficient, beside those of the search.
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

    def within(base: float, cost: float, error: float) -> bool:
        assert budget is not None
        return cost <= budget if in_nats else cost + error <= budget * base

    search = Search(
        measured=partial(measure, model, edits, texts, executor=executor),
        depth=depth,
        affordable=None if budget is None else within,
        keep=keep,
        most=most_forwards,
        progress=progress,
    )
    grid, order = sorted(set(coefficients)), sorted(z, key=lambda layer: (-z[layer], layer))
    search_sets(search, order, grid, strengths, [tuple(sorted(other.items())) for other in others])
    choice = search.choice()
    rule = "largest target gain less control cost"
    if budget is not None:
        worse = f"{budget:g} nats per token" if in_nats else f"{100 * budget:g} %"
        rule = f"largest target gain with control loss at most {worse} worse"
    within_error = "fewest layers and least cost within one standard error"
    rule += f", then the {within_error if keep is None else f'least cost with {keep:.0%} of it'}"
    if per_layer:
        choice = search_layers(search, choice, grid)
        rule += ", then one layer's coefficient at a time while that gains more than a standard error"
    keys = sorted(search.effects, key=lambda key: (len(key), str(key)))
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
    for name in dict.fromkeys(("target", "control", *texts)):
        if sum(len(batch.documents) for batch in texts.get(name, ())) < 2:
            problems.append(f"the {name} text has fewer than two documents")
        if name not in seen:
            problems.append(f"the {name} text has no hash")
    problems += [f"layer {layer} is not one of the model's {depth}" for layer in z if not 0 <= layer < depth]
    problems += [f"z of layer {layer} is {value}" for layer, value in z.items() if not math.isfinite(value)]
    problems += [f"the coefficient {c} is not a positive number" for c in coefficients if not 0 < c < math.inf]
    if not z or not coefficients:
        problems.append("there are no layers or no coefficients to choose from")
    if budget is not None and not 0 <= budget < math.inf:
        problems.append(f"the budget on control loss is {budget}, not a share such as 0.01")
    if problems:
        raise StethoscopeError("cannot calibrate", problems=problems, hint="calibration needs target and control text")


@dataclass(kw_only=True)
class Search:
    """The edits measured so far: what each does to every document, and which is best.

    Attributes:
        measured: the effects of some changes.
        affordable: whether an edit may be, by the base's loss on a text, its rise, and the standard error of that;
            without it a nat that is lost weighs as much as one that is gained.
        keep: see `calibrate`.
        most: forwards of the whole text.
        spent: those so far.
        effects: edit -> corpus -> nats by which each document's summed loss falls.
    """

    measured: Callable[[Sequence[Change]], Gains]
    depth: int
    affordable: Callable[[float, float, float], bool] | None
    keep: float | None
    most: float
    progress: Progress | None
    spent: float = 0.0
    effects: dict[Key, dict[str, Float64[np.ndarray, " documents"]]] = field(default_factory=dict)

    def add(self, keys: Sequence[Key]) -> bool:
        """Measure those that are new, as far as forwards are left; whether any was."""
        changes = [dict(key) for key in dict.fromkeys(keys) if key not in self.effects]
        while changes and self.spent + forwards(changes, self.depth) > self.most:
            changes.pop()
        if not changes:
            return False
        found = self.measured(changes)
        self.spent += forwards(changes, self.depth)
        self.tokens = found.tokens
        self.base = {name: float(found.losses[name].sum() / found.tokens[name].sum()) for name in found.tokens}
        self.effects.setdefault(BASE, {name: np.zeros(len(tokens)) for name, tokens in found.tokens.items()})
        for i, change in enumerate(changes):
            self.effects[tuple(change.items())] = {name: sums[:, i] for name, sums in found.sums.items()}
        if self.progress:
            self.progress(round(self.spent), round(self.most))
        return True

    def mean(self, key: Key, corpus: str) -> float:
        """Nats per token by which the loss falls."""
        return float(self.effects[key][corpus].sum() / self.tokens[corpus].sum())

    def error(self, key: Key, corpus: str, than: Key = BASE) -> float:
        """The standard error of `mean` less that of another edit, paired over documents."""
        difference = self.effects[key][corpus] - self.effects[than][corpus]
        return float(standard_error(difference[:, None], self.tokens[corpus])[0])

    @property
    def others(self) -> list[str]:
        """The texts on which an edit costs something."""
        return [name for name in self.tokens if name != "target"]

    def cost(self, key: Key) -> float:
        """Nats per token by which the loss rises on the other text that it rises most on."""
        return max(-self.mean(key, name) for name in self.others)

    def value(self, key: Key) -> float:
        """Gain on target, less cost where there is no budget; -inf beyond the budget."""
        gain, affordable = self.mean(key, "target"), self.affordable
        if affordable is None:
            return gain - self.cost(key)
        rises = ((self.base[name], -self.mean(key, name), self.error(key, name)) for name in self.others)
        return gain if not key or all(affordable(*rise) for rise in rises) else -math.inf

    def clearly_worse(self, key: Key, than: Key) -> bool:
        """Whether its value is less by more than a standard error of the difference."""
        errors = [self.error(key, "target", than)]
        if self.affordable is None:
            errors += [self.error(key, name, than) for name in self.others]
        return self.value(than) - self.value(key) > math.hypot(*errors)

    def best(self) -> Key:
        """The edit of largest value, the smaller of equals."""
        return max(self.effects, key=lambda key: (self.value(key), -len(key)))

    def choice(self) -> Key:
        """The simplest edit that is not clearly worse than the best, or the cheapest with a share of its value."""
        best = self.best()
        if self.keep is not None and self.clearly_worse(BASE, best):
            kept = [key for key in self.effects if self.value(key) >= self.keep * self.value(best)]
            return min(kept, key=lambda key: (self.cost(key), len(key), str(key)))
        alike = [key for key in self.effects if self.value(key) > -math.inf and not self.clearly_worse(key, best)]
        return min(alike, key=lambda key: (len(key), self.cost(key), str(key)))


class Place(NamedTuple):
    """An edit in the grid of a search: k layers, nested or spread, at a coefficient, behind a filter or none."""

    k: int
    coefficient: float
    strength: float | None = None
    spread: bool = False


def search_sets(
    search: Search,
    order: Sequence[int],
    grid: Sequence[float],
    strengths: Sequence[float | None] = (None,),
    others: Sequence[Key] = (),
) -> None:
    """k layers at one coefficient, raw or filtered: others and a coarse grid, then around the best and the choice."""

    def key_of(place: Place) -> Key:
        strength, c = place.strength, float(place.coefficient)
        amount: Amount = c if strength is None else Filtered(c, strength)
        best = (min(run, key=order.index) for run in depth_segments(order, place.k))
        return tuple((layer, amount) for layer in sorted(best if place.spread else order[: place.k]))

    sizes = [1, 2]  # 1, 2, 3, 5, 8, 13, ... and all
    while sizes[-1] < len(order):
        sizes.append(sizes[-1] + sizes[-2])
    sizes = [size for size in sizes if size < len(order)] + [len(order)]
    coarse = grid[1::2] if len(grid) > 3 else grid
    # the middle coefficient first: what no forwards are left for is dropped from the end
    start = [Place(k, c) for c in sorted(coarse, key=lambda c: c != coarse[len(coarse) // 2]) for k in sizes]
    if list(strengths) != [None]:
        start = [Place(sizes[-1], 1.0, strength) for strength in strengths]
        if None in strengths:  # what a filter has to beat: the raw change in the best layers, and all of it scaled
            start += [Place(k, 1.0) for k in sizes[1:-1:2]] + [Place(sizes[-1], c) for c in grid if c < 1]
        several = itertools.product(reversed(sizes[-3:-1]), (False, True), strengths[1::2] or strengths)
        start += [Place(k, 1.0, strength, spread) for k, spread, strength in several]
    tried = {place: key_of(place) for place in start}
    search.add([*others, *tried.values()])
    while True:
        near: dict[Place, Key] = {}
        ks = sorted({place.k for place in tried})
        measured = [place for place in tried if tried[place] in search.effects]
        best = sorted(measured, key=lambda place: -search.value(tried[place]))[:CENTRES]
        for centre in [*best, *(place for place in measured if tried[place] == search.choice())]:
            axes: dict[str, Sequence[Any]] = {"coefficient": grid, "k": ks, "strength": strengths}
            beside = {name: _neighbours(axis, getattr(centre, name)) for name, axis in axes.items()}
            places = [centre._replace(**{name: one}) for name, pair in beside.items() for some in pair for one in some]
            fewer, more = beside["k"]
            places += [centre._replace(k=(centre.k + n) // 2) for n in (*fewer, *more)]
            # more of one at less of another: the trades that a budget leaves
            for one, other in itertools.permutations(beside, 2):
                trades = itertools.product(beside[one][1], beside[other][0])
                places += [centre._replace(**{one: up, other: down}) for up, down in trades]
            near |= {place: key_of(place) for place in places if place not in tried}
        tried |= near
        if not search.add(list(near.values())):
            return


def _neighbours(axis: Sequence[Any], here: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """What is before and what is after a value, one or none each."""
    at = list(axis).index(here)
    return axis[max(0, at - 1) : at], axis[at + 1 : at + 2]


def search_layers(search: Search, start: Key, grid: Sequence[float]) -> Key:
    """One layer's coefficient at a time to a neighbour in the grid, or 0, while that gains more than an error."""
    current, steps = start, [0.0, *grid]
    while True:
        moves: list[Key] = []
        for layer, coefficient in current:
            at = steps.index(coefficient)  # type: ignore[arg-type]
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
    plane = np.array([[search.mean(key, "target"), search.cost(key)] for key in keys])
    gains, costs = plane.T
    points = []
    for key, (gain, cost) in zip(keys, plane.tolist(), strict=True):
        damage = {name: -search.mean(key, name) for name in search.others}
        worst = max(damage, key=lambda name: damage[name])
        points.append(
            CalibrationPoint(
                coefficients={n: a.coefficient if isinstance(a, Filtered) else a for n, a in key},
                strength=next((a.strength for _, a in key if isinstance(a, Filtered)), None),
                threshold=min((float(z[layer]) for layer, _ in key), default=None),
                damage=damage,
                target_gain=gain,
                target_error=search.error(key, "target"),
                control_cost=cost,
                control_error=search.error(key, worst),
                control_increase=cost / search.base[worst],
                on_front=not ((gains >= gain) & (costs <= cost) & ((gains > gain) | (costs < cost))).any(),
            )
        )
    return tuple(points)


def _reason(choice: CalibrationPoint, best: CalibrationPoint) -> str:
    def edit(point: CalibrationPoint) -> str:
        if not point.coefficients:
            return "no edit"
        if point.strength is not None:
            return f"layers {point.layers}"
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
    return f"{edit(choice)}: {figures}; the best found, {edit(best)}, gains {best.target_gain:.4f}"
