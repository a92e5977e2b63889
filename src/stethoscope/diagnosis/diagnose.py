"""diagnose: model, SAEs and two kinds of text in; each layer's specificity, judged against chance, out."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.listen import Listening
from stethoscope.diagnosis.scores import SCORES, positive_difference
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.diagnosis.uncertainty import ScoreUncertainty, assess
from stethoscope.display import first_of
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import ATTRIBUTION
from stethoscope.results.diagnosis import NAMED, CorpusSummary, Diagnosis, FeatureDifference, LayerDiagnosis, SAEHealth

# Below this an SAE does not describe the layer, and what it hears is not believed.
LEAST_VARIANCE_EXPLAINED = 0.5


def diagnose(
    heard: Mapping[str, Listening],
    *,
    documents: Mapping[str, int],
    provenance: Provenance | None = None,
    score: str = "mass_shift",
    attribution: Mapping[str, FeatureStatistics] | None = None,
    increments: bool = False,
    permutations: int = 200,
    resamples: int = 200,
    top_features: int = 64,
) -> Diagnosis:
    """Score every layer from what was heard on target and control text.

    Args:
        heard: `listen`'s result for the corpus ``target``; every other is a control, and a layer has to stand out
            against each of them.
        documents: how many documents each corpus has.
        provenance: what the result is saved with; its seed drives permutations and resamples, and is 0 if None.
        score: a name in ``SCORES``, or ``attribution``.
        attribution: for that score, the features' attribution (`Attribution.statistics`), on the same corpora.
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
    controls = [name for name in heard if name != "target"]
    if not controls:
        raise StethoscopeError("there is no control text to compare the target with")
    scored = attribution if attribution is not None else {name: one.statistics for name, one in heard.items()}
    found = {
        name: {
            form: assess(
                scored["target"],
                scored[name],
                SCORES.get(score, positive_difference),
                increments=form,
                permutations=permutations,
                resamples=resamples,
                rng=np.random.default_rng(provenance.seed),
            )
            for form in (False, True)
        }
        for name in controls
    }
    layers = []
    figures = {name: {form: _figures(one) for form, one in forms.items()} for name, forms in found.items()}
    for i, layer in enumerate(found[controls[0]][False].layers):
        against = min(controls, key=lambda name: figures[name][increments][i]["z"])
        health = {name: heard[name].health[layer] for name in heard}
        added = figures[against][True][i]
        layers.append(
            LayerDiagnosis(
                layer=layer,
                **figures[against][increments][i],
                increment=added["excess"],
                increment_z=added["z"],
                against=against,
                health=health,
                flag=_flag(health),
                features=_features(
                    heard["target"], heard[against], layer, top_features, _difference(scored, against, layer, score)
                ),
            )
        )
    summaries = {name: _summary(heard[name], documents[name]) for name in heard}
    return Diagnosis(
        provenance=provenance,
        score=score,
        increments=increments,
        corpora=summaries,
        layers=tuple(layers),
        warnings=_warnings(summaries, layers),
    )


def _figures(found: ScoreUncertainty) -> list[dict[str, Any]]:
    """A layer's own figures, by place."""
    low, high = found.interval().tolist()
    columns = {
        "score": found.score.tolist(),
        "null": found.null.mean(0).tolist(),
        "excess": found.excess.tolist(),
        "interval": list(zip(low, high, strict=True)),
        "z": found.z.tolist(),
        "p": found.p.tolist(),
        "p_familywise": found.p_familywise.tolist(),
        "rank": found.rank.tolist(),
        "stability": found.stability.tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _flag(health: Mapping[str, SAEHealth]) -> str | None:
    for name, measured in health.items():
        explained = measured.variance_explained
        if explained is None or explained < LEAST_VARIANCE_EXPLAINED:
            shown = "undefined" if explained is None else f"{explained:.2f}"
            return f"SAE variance explained {shown} on {name} text"
    return None


def _difference(
    scored: Mapping[str, FeatureStatistics], control: str, layer: int, score: str
) -> Float64[ndarray, " width"]:
    """How much more each feature is the target's: by attribution, or by its share of activation mass."""
    ours, theirs = scored["target"].layers[layer], scored[control].layers[layer]
    return ours.mean - theirs.mean if score == ATTRIBUTION else ours.mass - theirs.mass


def _features(
    target: Listening, control: Listening, layer: int, count: int, difference: Float64[ndarray, " width"]
) -> tuple[FeatureDifference, ...]:
    """The features of largest positive difference, and what they do on both texts."""
    ours, theirs = target.statistics.layers[layer], control.statistics.layers[layer]
    order = np.argsort(-difference, kind="stable")[:count]
    return tuple(
        FeatureDifference(
            feature=int(i),
            target_rate=float(ours.rate[i]),
            control_rate=float(theirs.rate[i]),
            target_mass=float(ours.mass[i]),
            control_mass=float(theirs.mass[i]),
        )
        for i in order
        if difference[i] > 0
    )


def _summary(heard: Listening, documents: int) -> CorpusSummary:
    layers = heard.statistics.layers.values()
    return CorpusSummary(
        documents=documents - len(heard.broken),
        blocks=heard.statistics.blocks,
        tokens=int(max((layer.tokens + layer.sinks).sum() for layer in layers)),
        sinks=int(max(layer.sinks.sum() for layer in layers)),
        broken=tuple(heard.broken),
    )


def _warnings(corpora: Mapping[str, CorpusSummary], layers: Sequence[LayerDiagnosis]) -> tuple[str, ...]:
    left_out = (
        f"{len(corpus.broken)} {name} documents could not be heard and were left out, counted from 0:"
        f" {', '.join(map(str, corpus.broken))}"
        for name, corpus in corpora.items()
        if corpus.broken
    )
    return (*left_out, *_flagged(layers), *_lengths(corpora))


def _flagged(layers: Sequence[LayerDiagnosis]) -> Iterator[str]:
    flagged = [f"layer {layer.layer} ({layer.flag})" for layer in layers if layer.flag]
    if flagged:
        yield (
            f"{len(flagged)} of {len(layers)} layers are not believed, {first_of(flagged, NAMED)}: SAEs of another"
            " model or layer look like this, and so does text unlike what they were trained on"
        )


def _lengths(corpora: Mapping[str, CorpusSummary]) -> tuple[str, ...]:
    lengths = {name: corpus.tokens / corpus.documents for name, corpus in corpora.items()}
    return tuple(
        f"target documents have {lengths['target']:.0f} tokens on average and {name} documents {length:.0f}:"
        " length alone can explain a score"
        for name, length in lengths.items()
        if not 2 / 3 <= lengths["target"] / length <= 3 / 2
    )
