"""Every score of a layer against what injecting the layers truly does, on any model.

    found = validate_scores(model, edits, scores, texts, provenance=provenance)
    found.scores["mass_shift"].gain.rho

The truth is a layer's edit alone, in memory, and the loss on target and control text. Layers interact, so each score's
best layers are also injected together, beside random sets of as many and others of as much energy.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.stats import rankdata
from transformers import PreTrainedModel

from stethoscope.artifacts import Provenance
from stethoscope.editing.layers import LayerEdits
from stethoscope.errors import StethoscopeError
from stethoscope.executor import Executor
from stethoscope.models.load import decoder_layers
from stethoscope.results.validation import (
    Beaten,
    Correlation,
    Kind,
    Layers,
    RandomSets,
    ScoreValidation,
    SetEffect,
    ValidatedScore,
    ValidatedSet,
)
from stethoscope.selection.injection import Gains, Progress, Texts, forwards, measure

RESAMPLES = 1000
CANDIDATES = 4000  # random sets that those of equal energy are picked from


def validate_scores(
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
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> ScoreValidation:
    """Judge scores of layers by what injecting the layers truly does.

    Args:
        scores: name -> what it rests on, and a value for each of the same layers; ties go to the lower layer.
        texts: ``target`` and a control corpus, as batches.
        provenance: its seed drives the random sets.
        matched: scores whose best layers are compared with sets of equal energy as well.
        ks: sizes of sets; half of the layers is added. Sizes of all layers or more are left out.
        random_sets: of each size and kind.
        executor: runs the work; here if None.
        progress: called with about how many sets of layers are done, and in all.

    Raises:
        StethoscopeError: scores of different layers, or fewer than three.
    """
    layers = sorted(next(iter(scores.values()))[1]) if scores else []
    if uneven := [name for name, (_, values) in scores.items() if sorted(values) != layers]:
        raise StethoscopeError("the scores cover different layers", problems=[f"`{name}`" for name in uneven])
    if len(layers) < 3:
        raise StethoscopeError("scores are validated over three layers at least")
    both = {"target": texts["target"], "control": texts[control]}
    sizes = sorted({k for k in (*ks, len(layers) // 2) if 0 < k < len(layers)})
    # sets about as many as there will be: how many turn out to be the same is not known yet
    sets = len(sizes) * (1 + len(scores) + random_sets * (1 + len(matched)))

    def advance(begin: int, count: int) -> Progress:
        def told(done: int, total: int) -> None:
            if progress:
                progress(begin + count * done // total, len(layers) + sets)

        return told

    singles = [{layer: coefficient} for layer in layers]
    alone = measure(model, edits, both, singles, executor=executor, progress=advance(0, len(layers)))
    effects = _effects(alone)
    truth = {layer: effects[layer,].trade_off for layer in layers}
    judged: dict[str, tuple[Kind, Mapping[int, float]]] = {**scores, "injection": ("truth", truth)}
    energy = {n: e for n, e in edits.task_vector.energy_by_layer().items() if n in layers}
    rng = np.random.default_rng(provenance.seed)
    best = {name: {k: _best(values, k) for k in sizes} for name, (_, values) in judged.items()}
    drawn = {k: _random(layers, k, random_sets, rng) for k in sizes}
    alike = {
        k: {name: matched_sets(best[name][k], energy, random_sets, rng) for name in judged if name in matched}
        for k in sizes
    }
    wanted = sorted(
        {
            *(found for by_size in best.values() for found in by_size.values()),
            *(found for found_k in drawn.values() for found in found_k),
            *(found for by_name in alike.values() for found_k in by_name.values() for found in found_k),
        }
        - effects.keys()
    )
    changes = [dict.fromkeys(found, coefficient) for found in wanted]
    joint = measure(model, edits, both, changes, executor=executor, progress=advance(len(layers), sets))
    effects |= _effects(joint)
    random = {
        k: RandomSets(
            equal_size=tuple(effects[found] for found in drawn[k]),
            matched={name: tuple(effects[found] for found in found_k) for name, found_k in alike[k].items()},
        )
        for k in sizes
    }

    def validated(name: str, k: int) -> ValidatedSet:
        effect, others = effects[best[name][k]], random[k]
        return ValidatedSet(
            effect=effect,
            overlap=len(set(effect.layers) & set(best["injection"][k])) / k,
            beaten=_beaten(effect, others.equal_size),
            beaten_matched=_beaten(effect, others.matched[name]) if others.matched.get(name) else None,
        )

    gains = alone.mean("target")
    trade_offs = np.array(list(truth.values()))
    depth = len(decoder_layers(model))
    return ScoreValidation(
        provenance=provenance,
        scores={
            name: ValidatedScore(
                kind=kind,
                values={layer: float(values[layer]) for layer in layers},
                gain=_correlation([values[layer] for layer in layers], gains, rng),
                trade_off=_correlation([values[layer] for layer in layers], trade_offs, rng),
                sets={k: validated(name, k) for k in sizes},
            )
            for name, (kind, values) in judged.items()
        },
        injected=tuple(_effects(alone).values()),
        random=random,
        documents={name: sum(len(batch.documents) for batch in text) for name, text in both.items()},
        forwards=forwards(singles, depth) + forwards(changes, depth),
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


def _effects(gains: Gains) -> dict[Layers, SetEffect]:
    columns = zip(gains.changes, gains.mean("target").tolist(), gains.mean("control").tolist(), strict=True)
    found = [SetEffect(layers=tuple(change), target_gain=gain, control_cost=-less) for change, gain, less in columns]
    return {effect.layers: effect for effect in found}


def _beaten(effect: SetEffect, others: Sequence[SetEffect]) -> Beaten:
    return Beaten.of(effect.trade_off, [other.trade_off for other in others])


def _correlation(values: Sequence[float], truth: Float64[ndarray, " layers"], rng: np.random.Generator) -> Correlation:
    pair = np.stack([np.asarray(values, dtype=np.float64), truth])
    if not np.ptp(pair, axis=1).all():
        return Correlation(rho=None, low=None, high=None)
    drawn = np.empty(0)
    while len(drawn) < RESAMPLES:
        rows = rng.integers(len(truth), size=(RESAMPLES - len(drawn), len(truth)))
        drawn = np.append(drawn, _spearman(pair[:, rows]))
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Correlation(rho=_spearman(pair[:, None]).item(), low=low, high=high)


def _spearman(pairs: Float64[ndarray, "2 resamples layers"]) -> Float64[ndarray, " varied"]:
    """The rank correlation of each resample in which neither side is constant."""
    ranks = rankdata(pairs[:, np.ptp(pairs, axis=2).all(axis=0)], axis=2)
    ranks -= ranks.mean(axis=2, keepdims=True)
    one, other = ranks / np.linalg.norm(ranks, axis=2, keepdims=True)
    return np.clip((one * other).sum(axis=1), -1, 1)
