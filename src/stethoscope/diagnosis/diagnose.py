"""diagnose: from collected activations to each layer's specificity, compared with chance."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.collect import CollectedActivations
from stethoscope.diagnosis.scores import SCORES, positive_difference
from stethoscope.diagnosis.statistics import FeatureStatistics, LayerStatistics
from stethoscope.diagnosis.uncertainty import ScoreUncertainty, assess
from stethoscope.display import first_of
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import ATTRIBUTION
from stethoscope.results.diagnosis import NAMED, CorpusSummary, Diagnosis, FeatureDifference, LayerDiagnosis, SAEHealth

# Below this an SAE does not describe the layer, and the layer is excluded.
LEAST_VARIANCE_EXPLAINED = 0.5
UNKNOWN = "not measured"


def diagnose(
    collected: Mapping[str, CollectedActivations],
    *,
    provenance: Provenance | None = None,
    score: str = "mass_shift",
    attribution: Mapping[str, FeatureStatistics] | None = None,
    increments: bool = False,
    permutations: int = 200,
    resamples: int = 200,
    top_features: int = 64,
) -> Diagnosis:
    """Score every layer from the activations collected on target and control text.

    Args:
        collected: by corpus, from `collect_activations`. All corpora but ``target`` are controls, and a layer has to
            stand out against each of them.
        provenance: what the result is saved with; its seed drives permutations and resamples, and is 0 if None.
        score: a name in ``SCORES``, or ``attribution``.
        attribution: for that score, the features' attribution (`Attribution.features`), on the same corpora.
        increments: judge what each layer adds to the one before it, for sites that accumulate.
        top_features: features to keep per layer, those with the largest mass difference.

    Raises:
        StethoscopeError: unknown score, no control, or too few blocks to know chance.
    """
    provenance = provenance or Provenance()
    if score == ATTRIBUTION and attribution is None:
        raise StethoscopeError("the score `attribution` needs the features' attribution", hint="see `attribute`")
    if score not in (*SCORES, ATTRIBUTION):
        near = get_close_matches(score, SCORES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known scores: {', '.join(SCORES)}"
        raise StethoscopeError(f"unknown score `{score}`", hint=hint)
    controls = [name for name in collected if name != "target"]
    if not controls:
        raise StethoscopeError("there is no control text to compare the target with")
    statistics = {name: one.statistics for name, one in collected.items()}
    scored = (attribution if score == ATTRIBUTION else None) or statistics
    figures: dict[str, list[dict[str, Any]]] = {}
    for name in controls:
        found = assess(
            scored["target"],
            scored[name],
            SCORES.get(score, positive_difference),
            permutations=permutations,
            resamples=resamples,
            rng=np.random.default_rng(provenance.seed),
        )
        added = found.increments()
        figures[name] = _figures(added if increments else found)
        for own, increment, increment_z in zip(figures[name], added.excess.tolist(), added.z.tolist(), strict=True):
            own |= {"increment": increment, "increment_z": increment_z, "against": name}
    layers = []
    for layer, rivals in zip(scored["target"].layers, zip(*figures.values(), strict=True), strict=True):
        least = min(rivals, key=lambda own: own["z"])
        health = {name: one.health[layer] for name, one in collected.items()}
        ours, theirs = (scored[name].layers[layer] for name in ("target", least["against"]))
        difference = ours.mean - theirs.mean if score == ATTRIBUTION else ours.mass - theirs.mass
        order = np.argsort(-difference, kind="stable")[:top_features]
        pair = [statistics[name].layers[layer] for name in ("target", least["against"])]
        features = _features(order[difference[order] > 0].tolist(), *pair)
        layers.append(LayerDiagnosis(layer=layer, **least, health=health, flag=_flag(health), features=features))
    summaries = {name: _summary(one) for name, one in collected.items()}
    return Diagnosis(
        provenance=provenance,
        score=score,
        increments=increments,
        corpora=summaries,
        layers=tuple(layers),
        warnings=_warnings(summaries, layers),
    )


def _figures(found: ScoreUncertainty) -> list[dict[str, Any]]:
    """Each layer's own figures."""
    low, high = found.interval().tolist()
    columns = {
        "score": found.score.tolist(),
        "null": found.null.mean(0).tolist(),
        "interval": list(zip(low, high, strict=True)),
        **{n: getattr(found, n).tolist() for n in ("excess", "z", "p", "p_familywise", "rank", "stability")},
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _flag(health: Mapping[str, SAEHealth]) -> str | None:
    for name, measured in health.items():
        explained = measured.variance_explained
        if explained is None or explained < LEAST_VARIANCE_EXPLAINED:
            return f"SAE variance explained {UNKNOWN if explained is None else f'{explained:.2f}'} on {name} text"
    return None


def _features(
    chosen: Sequence[int], target: LayerStatistics, control: LayerStatistics
) -> tuple[FeatureDifference, ...]:
    columns = [values[chosen].tolist() for values in (target.rate, control.rate, target.mass, control.mass)]
    return tuple(
        FeatureDifference(feature=i, target_rate=p_t, control_rate=p_c, target_mass=m_t, control_mass=m_c)
        for i, p_t, p_c, m_t, m_c in zip(chosen, *columns, strict=True)
    )


def _summary(collected: CollectedActivations) -> CorpusSummary:
    layers = collected.statistics.layers.values()
    return CorpusSummary(
        documents=collected.documents,
        blocks=collected.statistics.blocks,
        tokens=int(max((layer.tokens + layer.sinks).sum() for layer in layers)),
        sinks=int(max(layer.sinks.sum() for layer in layers)),
        broken=tuple(collected.broken),
    )


def _warnings(corpora: Mapping[str, CorpusSummary], layers: Sequence[LayerDiagnosis]) -> tuple[str, ...]:
    found = [
        f"{len(corpus.broken)} {name} documents could not be processed and were left out, counted from 0:"
        f" {', '.join(map(str, corpus.broken))}"
        for name, corpus in corpora.items()
        if corpus.broken
    ]
    for unknown, why in (
        (False, "SAEs of another model or layer look like this, and so does text unlike what they were trained on"),
        (True, "of transcoders it never is; to use these layers all the same, set `include_flagged`"),
    ):
        flags = {layer.layer: layer.flag for layer in layers if layer.flag and (UNKNOWN in layer.flag) == unknown}
        if flags:
            named = first_of([f"layer {layer} ({flag})" for layer, flag in flags.items()], NAMED)
            found.append(f"{len(flags)} of {len(layers)} layers are excluded, {named}: {why}")
    lengths = {name: corpus.tokens / corpus.documents for name, corpus in corpora.items()}
    return (
        *found,
        *(
            f"target documents have {lengths['target']:.0f} tokens on average and {name} documents {length:.0f}:"
            " length alone can explain a score"
            for name, length in lengths.items()
            if not 2 / 3 <= lengths["target"] / length <= 3 / 2
        ),
    )
