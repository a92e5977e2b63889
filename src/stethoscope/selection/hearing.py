"""Does the stethoscope hear right? Every score against what injecting the layers truly does, on any model.

    found = judge_hearing(model, edits, scores, texts, provenance=provenance)
    found.scores["mass_shift"].spearman

The truth is `injection`: a layer's edit alone, in memory, and the loss on target and control text. Layers interact, so
each score's best layers are also injected together, beside random sets of as many and others of as much energy.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.stats import binomtest, spearmanr
from transformers import PreTrainedModel

from stethoscope.artifacts import Artifact, Frozen, Provenance
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.models import decoder_layers
from stethoscope.selection.rivals import Gains, Texts, forwards, injection, measure
from stethoscope.work import Spread

RESAMPLES = 1000
CANDIDATES = 4000  # random sets that those of equal energy are picked from
Kind = Literal["sae", "rival", "truth"]
Layers = tuple[int, ...]


class Correlation(Frozen):
    """Spearman's rank correlation over layers, with a 95 % interval from layers drawn with replacement.

    All None where one of the two is constant.
    """

    rho: float | None
    low: float | None
    high: float | None


class SetEffect(Frozen):
    """What a set of layers does when injected together, in nats per token against the base.

    Attributes:
        target_gain: by how much target loss falls.
        control_cost: by how much control loss rises.
    """

    layers: Layers
    target_gain: float
    control_cost: float

    @property
    def trade_off(self) -> float:
        """Target gain less control cost."""
        return self.target_gain - self.control_cost


class Beaten(Frozen):
    """The share of random sets that a set's trade-off exceeds, with its exact 95 % interval."""

    share: float
    low: float
    high: float

    @classmethod
    def of(cls, worth: float, others: Sequence[float]) -> "Beaten":
        """From what a set and each random one is worth."""
        count = sum(worth > other for other in others)
        interval = binomtest(count, len(others)).proportion_ci(0.95)
        return cls(share=count / len(others), low=float(interval.low), high=float(interval.high))


class SetHearing(Frozen):
    """A score's best k layers, injected together.

    Attributes:
        overlap: share of them among the k layers of best single injection.
        beaten: random sets of as many layers.
        beaten_matched: those of about as much task vector energy, for the scores that are in question.
    """

    effect: SetEffect
    overlap: float
    beaten: Beaten
    beaten_matched: Beaten | None


class ScoreHearing(Frozen):
    """How well one score hears.

    Attributes:
        kind: whether it rests on SAEs, is a rival that needs none, or the truth itself.
        values: a layer's score.
        gain: correlation with the target gain of each layer's injection.
        trade_off: correlation with target gain less control cost.
        sets: k -> its best k layers.
    """

    kind: Kind
    values: dict[int, float]
    gain: Correlation
    trade_off: Correlation
    sets: dict[int, SetHearing]


class RandomSets(Frozen):
    """Random sets of one size; ``matched`` maps a score to sets of about the energy of its own best."""

    equal_size: tuple[SetEffect, ...]
    matched: dict[str, tuple[SetEffect, ...]]


class Hearing(Artifact):
    """All scores judged.

    Attributes:
        injected: the effect of each layer alone.
        forwards: of all text, that were spent.
        documents: of each corpus.
    """

    FILE: ClassVar[str] = "hearing.json"

    scores: dict[str, ScoreHearing]
    injected: tuple[SetEffect, ...]
    random: dict[int, RandomSets]
    documents: dict[str, int]
    forwards: float

    def size(self, wanted: int) -> int:
        """The size of set that was judged and is nearest to the one wanted."""
        return min(self.random, key=lambda k: (abs(k - wanted), k))

    def table(self, k: int) -> list[list[str]]:
        """A row per score, best trade-off of its k layers first, with a header row."""
        rows = [["score", "rank correlation, gain", "with cost", f"best {k}: gain", "cost", "beats random", "energy"]]
        for name, found in sorted(self.scores.items(), key=lambda item: -item[1].sets[k].effect.trade_off):
            chosen = found.sets[k]
            rows.append(
                [
                    name,
                    _shown(found.gain),
                    _shown(found.trade_off),
                    f"{chosen.effect.target_gain:+.3f}",
                    f"{chosen.effect.control_cost:+.3f}",
                    f"{100 * chosen.beaten.share:.0f} %",
                    f"{100 * chosen.beaten_matched.share:.0f} %" if chosen.beaten_matched else "",
                ]
            )
        return rows

    def verdict(self, score: str, k: int) -> str:
        """One sentence on a score's best k layers."""
        chosen = self.scores[score].sets[k]
        best = max(
            (name for name, found in self.scores.items() if found.kind != "truth"),
            key=lambda name: self.scores[name].sets[k].effect.trade_off,
        )
        heard = "hears better than chance" if chosen.beaten.low > 0.5 else "gives no evidence of hearing"
        sentence = (
            f"`{score}` {heard}: its best {k} layers beat {100 * chosen.beaten.share:.0f} % of random sets"
            f" (95 % interval {100 * chosen.beaten.low:.0f} to {100 * chosen.beaten.high:.0f} %),"
            f" worth {chosen.effect.trade_off:+.3f} nats per token"
        )
        if best == score:
            return f"{sentence}; no other score does better."
        worth = self.scores[best].sets[k].effect.trade_off
        return f"{sentence}; `{best}` would have chosen layers worth {worth:+.3f}."


def judge_hearing(
    model: PreTrainedModel,
    edits: LayerEdits,
    scores: Mapping[str, tuple[Kind, Mapping[int, float]]],
    texts: Texts,
    *,
    provenance: Provenance,
    control: str = "control",
    matched: Collection[str] = ("mass_shift",),
    ks: Sequence[int] = (1, 3, 5, 8),
    random_sets: int = 50,
    coefficient: float = 1.0,
    spread: Spread | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Hearing:
    """Judge scores of layers by what injecting the layers truly does.

    Args:
        scores: name -> what it rests on, and a value for each of the same layers; ties go to the lower layer.
        texts: ``target`` and a control corpus, as batches.
        provenance: its seed drives the random sets.
        matched: scores whose best layers are compared with sets of equal energy as well.
        ks: sizes of sets; half of the layers is added. Sizes of all layers or more are left out.
        random_sets: of each size and kind.
        spread: where the work is done; here if None.
        progress: called with about how many sets of layers are done, and in all.

    Raises:
        StethoscopeError: scores of different layers, or fewer than three.
    """
    layers = sorted(next(iter(scores.values()))[1]) if scores else []
    if uneven := [name for name, (_, values) in scores.items() if sorted(values) != layers]:
        raise StethoscopeError("the scores cover different layers", problems=[f"`{name}`" for name in uneven])
    if len(layers) < 3:
        raise StethoscopeError("hearing is tested over three layers at least")
    both = {"target": texts["target"], "control": texts[control]}
    sizes = sorted({k for k in (*ks, len(layers) // 2) if 0 < k < len(layers)})
    # sets about as many as there will be: how many turn out to be the same is not known yet
    sets = len(sizes) * (1 + len(scores) + random_sets * (1 + len(matched)))

    def advance(begin: int, end: int) -> Callable[[int, int], None]:
        def told(done: int, total: int) -> None:
            if progress:
                progress(begin + (end - begin) * done // total, len(layers) + sets)

        return told

    alone = injection(
        model, edits, both, coefficient=coefficient, layers=layers, spread=spread, progress=advance(0, len(layers))
    )
    gain, cost = alone.mean("target"), -alone.mean("control")
    judged: dict[str, tuple[Kind, Mapping[int, float]]] = {
        **scores,
        "injection": ("truth", dict(zip(layers, (gain - cost).tolist(), strict=True))),
    }
    energy = {n: e for n, e in edits.task_vector.energy_by_layer().items() if n in layers}
    rng = np.random.default_rng(provenance.seed)
    chosen = {name: {k: _best(values, k) for k in sizes} for name, (_, values) in judged.items()}
    drawn = {k: _random(layers, k, random_sets, rng) for k in sizes}
    alike = {
        k: {name: matched_sets(chosen[name][k], energy, random_sets, rng) for name in judged if name in matched}
        for k in sizes
    }
    singles: list[Layers] = [(layer,) for layer in layers]
    effects = dict(zip(singles, _effects(singles, alone), strict=True))
    wanted = sorted(
        (
            {layers for sets in chosen.values() for layers in sets.values()}
            | {layers for sets in drawn.values() for layers in sets}
            | {layers for named in alike.values() for sets in named.values() for layers in sets}
        )
        - effects.keys()
    )
    changes = [dict.fromkeys(found, coefficient) for found in wanted]
    joint = measure(model, edits, both, changes, spread=spread, progress=advance(len(layers), len(layers) + sets))
    effects |= dict(zip(wanted, _effects(wanted, joint), strict=True))
    random = {
        k: RandomSets(
            equal_size=tuple(effects[found] for found in drawn[k]),
            matched={name: tuple(effects[found] for found in sets) for name, sets in alike[k].items()},
        )
        for k in sizes
    }
    depth = len(decoder_layers(model))
    return Hearing(
        provenance=provenance,
        scores={
            name: ScoreHearing(
                kind=kind,
                values={layer: float(values[layer]) for layer in layers},
                gain=_correlation([values[layer] for layer in layers], gain, rng),
                trade_off=_correlation([values[layer] for layer in layers], gain - cost, rng),
                sets={
                    k: SetHearing(
                        effect=effects[chosen[name][k]],
                        overlap=len(set(chosen[name][k]) & set(_best(judged["injection"][1], k))) / k,
                        beaten=_beaten(effects[chosen[name][k]], random[k].equal_size),
                        beaten_matched=(
                            _beaten(effects[chosen[name][k]], random[k].matched[name]) if name in matched else None
                        ),
                    )
                    for k in sizes
                },
            )
            for name, (kind, values) in judged.items()
        },
        injected=tuple(effects[layer,] for layer in layers),
        random=random,
        documents={name: sum(len(batch.documents) for batch in text) for name, text in both.items()},
        forwards=forwards([{layer: 1.0} for layer in layers], depth) + forwards(changes, depth),
    )


def _best(values: Mapping[int, float], k: int) -> Layers:
    return tuple(sorted(sorted(values, key=lambda layer: (-values[layer], layer))[:k]))


def _random(layers: Sequence[int], k: int, count: int, rng: np.random.Generator) -> list[Layers]:
    """Different sets of k layers, as many as there are and as are wanted."""
    if comb(len(layers), k) <= count:
        return list(combinations(layers, k))
    found: dict[Layers, None] = {}
    for _ in range(20 * count):
        found.setdefault(tuple(sorted(rng.choice(layers, k, replace=False).tolist())))
        if len(found) == count:
            break
    return list(found)


def matched_sets(chosen: Layers, energy: Mapping[int, float], count: int, rng: np.random.Generator) -> list[Layers]:
    """The random sets of as many layers whose task vector energy comes closest, the chosen one left out."""
    wanted = sum(energy.get(layer, 0.0) for layer in chosen)
    others = {s for s in _random(sorted(energy), len(chosen), CANDIDATES, rng) if s != chosen}
    return sorted(others, key=lambda s: (abs(sum(energy[layer] for layer in s) - wanted), s))[:count]


def _effects(sets: Iterable[Layers], gains: Gains) -> tuple[SetEffect, ...]:
    target, control = gains.mean("target").tolist(), gains.mean("control").tolist()
    return tuple(
        SetEffect(layers=found, target_gain=g, control_cost=-c)
        for found, g, c in zip(sets, target, control, strict=True)
    )


def _beaten(effect: SetEffect, others: Sequence[SetEffect]) -> Beaten:
    return Beaten.of(effect.trade_off, [other.trade_off for other in others])


def _correlation(values: Sequence[float], truth: Float64[ndarray, " layers"], rng: np.random.Generator) -> Correlation:
    given = np.asarray(values, dtype=np.float64)
    if np.ptp(given) == 0 or np.ptp(truth) == 0:
        return Correlation(rho=None, low=None, high=None)
    drawn: list[float] = []
    while len(drawn) < RESAMPLES:
        rows = rng.integers(len(given), size=len(given))
        if np.ptp(given[rows]) and np.ptp(truth[rows]):
            drawn.append(spearmanr(given[rows], truth[rows]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Correlation(rho=float(spearmanr(given, truth).statistic), low=low, high=high)


def _shown(found: Correlation) -> str:
    return "undefined" if found.rho is None else f"{found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
