"""diagnose: model, SAEs and two kinds of text in; each layer's specificity, judged against chance, out."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from stethoscope.artifacts import Artifact, Provenance
from stethoscope.diagnosis.listen import Listening
from stethoscope.diagnosis.scores import SCORES, mass_difference
from stethoscope.diagnosis.uncertainty import assess
from stethoscope.errors import StethoscopeError
from stethoscope.saes.health import DENSE_RATE, SAEHealth

# Below this an SAE does not describe the layer, and what it hears is not believed.
LEAST_VARIANCE_EXPLAINED = 0.5


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FeatureDifference(_Frozen):
    """One feature's firing rate and share of activation mass on target and control text."""

    feature: int
    target_rate: float
    control_rate: float
    target_mass: float
    control_mass: float


class LayerDiagnosis(_Frozen):
    """What one layer hears, and whether to believe it.

    Attributes:
        score: specificity as defined, without correction for chance.
        null: mean of the permutation null.
        excess: score less ``null``; ``interval`` is its 95 % block-bootstrap interval.
        z: excess in standard deviations of the null.
        p: permutation p; ``p_familywise`` is adjusted for all layers.
        increment: excess over that of the layer before, since ``resid_post`` accumulates.
        flag: why the layer should not be believed, or None.
        features: those that differ most toward the target.
    """

    layer: int
    score: float
    null: float
    excess: float
    interval: tuple[float, float]
    z: float
    p: float
    p_familywise: float
    increment: float
    health: dict[Literal["target", "control"], SAEHealth]
    flag: str | None
    features: tuple[FeatureDifference, ...]


class CorpusSummary(_Frozen):
    """Size of one corpus as listened to; sinks are the most that any layer left out."""

    documents: int
    blocks: int
    tokens: int
    sinks: int


class Diagnosis(Artifact):
    """Every layer's specificity for the target, in order of depth."""

    FILE: ClassVar[str] = "diagnosis.json"

    score: str
    corpora: dict[Literal["target", "control"], CorpusSummary]
    layers: tuple[LayerDiagnosis, ...]
    warnings: tuple[str, ...]


def diagnose(
    heard: Mapping[Literal["target", "control"], Listening],
    *,
    documents: Mapping[Literal["target", "control"], int],
    provenance: Provenance,
    score: str = "mass_shift",
    permutations: int = 200,
    resamples: int = 200,
    top_features: int = 64,
) -> Diagnosis:
    """Score every layer from what was heard on target and control text.

    Args:
        heard: `listen`'s result for each corpus.
        documents: how many documents each corpus has.
        provenance: its seed drives permutations and resamples.
        score: a name in ``SCORES``.
        top_features: features to keep per layer, those with the largest mass difference.

    Raises:
        StethoscopeError: unknown score, or too few blocks to know chance.
    """
    if score not in SCORES:
        raise StethoscopeError(f"unknown score `{score}`", hint=f"known scores: {', '.join(SCORES)}")
    target, control = heard["target"].statistics, heard["control"].statistics
    found = assess(
        target,
        control,
        SCORES[score],
        permutations=permutations,
        resamples=resamples,
        rng=np.random.default_rng(provenance.seed),
    )
    excess, z, p, familywise, interval = found.excess, found.z, found.p, found.p_familywise, found.interval()
    layers = []
    for i, layer in enumerate(found.layers):
        health = {name: _health(heard[name], layer) for name in heard}
        layers.append(
            LayerDiagnosis(
                layer=layer,
                score=float(found.score[i]),
                null=float(found.null[:, i].mean()),
                excess=float(excess[i]),
                interval=(float(interval[0, i]), float(interval[1, i])),
                z=float(z[i]),
                p=float(p[i]),
                p_familywise=float(familywise[i]),
                increment=float(excess[i] - (excess[i - 1] if i else 0.0)),
                health=health,
                flag=_flag(health),
                features=_features(heard, layer, top_features),
            )
        )
    summaries = {name: _summary(heard[name], documents[name]) for name in heard}
    return Diagnosis(
        provenance=provenance,
        score=score,
        corpora=summaries,
        layers=tuple(layers),
        warnings=_warnings(summaries),
    )


def _health(heard: Listening, layer: int) -> SAEHealth:
    rate = heard.statistics.layers[layer].rate
    return SAEHealth(
        tokens=int(heard.statistics.layers[layer].tokens.sum()),
        variance_explained=heard.variance_explained[layer],
        l0=float(rate.sum()),
        dead=float((rate == 0).mean()),
        dense=float((rate > DENSE_RATE).mean()),
    )


def _flag(health: Mapping[Literal["target", "control"], SAEHealth]) -> str | None:
    for name, measured in health.items():
        explained = measured.variance_explained
        if explained is None or explained < LEAST_VARIANCE_EXPLAINED:
            shown = "undefined" if explained is None else f"{explained:.2f}"
            return f"SAE variance explained {shown} on {name} text"
    return None


def _features(
    heard: Mapping[Literal["target", "control"], Listening], layer: int, count: int
) -> tuple[FeatureDifference, ...]:
    target, control = (heard[name].statistics.layers[layer] for name in ("target", "control"))
    difference = mass_difference(target.sums.sum(0), control.sums.sum(0))
    order = np.argsort(-difference, kind="stable")[:count]
    return tuple(
        FeatureDifference(
            feature=int(i),
            target_rate=float(target.rate[i]),
            control_rate=float(control.rate[i]),
            target_mass=float(target.mass[i]),
            control_mass=float(control.mass[i]),
        )
        for i in order
        if difference[i] > 0
    )


def _summary(heard: Listening, documents: int) -> CorpusSummary:
    layers = heard.statistics.layers.values()
    return CorpusSummary(
        documents=documents,
        blocks=heard.statistics.blocks,
        tokens=int(max((layer.tokens + layer.sinks).sum() for layer in layers)),
        sinks=int(max(layer.sinks.sum() for layer in layers)),
    )


def _warnings(corpora: Mapping[Literal["target", "control"], CorpusSummary]) -> tuple[str, ...]:
    lengths = {name: corpus.tokens / corpus.documents for name, corpus in corpora.items()}
    ratio = lengths["target"] / lengths["control"]
    if 2 / 3 <= ratio <= 3 / 2:
        return ()
    return (
        f"target documents have {lengths['target']:.0f} tokens on average and control documents"
        f" {lengths['control']:.0f}: length alone can explain a score",
    )
