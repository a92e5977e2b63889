"""diagnose: model, SAEs and two kinds of text in; each layer's specificity, judged against chance, out."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float64
from numpy import ndarray

from stethoscope.artifacts import Artifact, Frozen, Provenance
from stethoscope.diagnosis.listen import Listening
from stethoscope.diagnosis.scores import SCORES, positive_difference
from stethoscope.diagnosis.statistics import FeatureStatistics
from stethoscope.diagnosis.uncertainty import ScoreUncertainty, assess
from stethoscope.errors import StethoscopeError
from stethoscope.recipe import ATTRIBUTION
from stethoscope.saes.health import SAEHealth
from stethoscope.shown import Rows, Shown, first_of, text_rows

# Below this an SAE does not describe the layer, and what it hears is not believed.
LEAST_VARIANCE_EXPLAINED = 0.5
ALPHA = 0.05  # of the family-wise p-value at which a layer is said to stand out
NAMED = 8  # layers that a sentence names
# Of the frame, those that a table shows, by heading and with their formats.
_COLUMNS = {
    "layer": ("layer", "d"),
    "excess": ("excess", "+.3f"),
    "from": ("low", "+.3f"),
    "to": ("high", "+.3f"),
    "z": ("z", ".1f"),
    "p, all layers": ("p_familywise", ".3f"),
    "rank": ("rank", "d"),
    "stability": ("stability", ".0%"),
    "explained": ("variance_explained_target", ".2f"),
    "L0": ("l0_target", ".0f"),
    "not believed": ("flag", "s"),
}


class FeatureDifference(Frozen):
    """One feature's firing rate and share of activation mass on target and control text."""

    feature: int
    target_rate: float
    control_rate: float
    target_mass: float
    control_mass: float


class LayerDiagnosis(Frozen):
    """What one layer hears, and whether to believe it.

    Attributes:
        score: specificity as defined, without correction for chance.
        null: mean of the permutation null.
        excess: score less ``null``; ``interval`` is its 95 % block-bootstrap interval.
        z: excess in standard deviations of the null.
        p: permutation p; ``p_familywise`` is adjusted for all layers.
        rank: place by excess, from 1; ``stability`` is the share of resamples that place it as high or higher.
        increment: excess over that of the layer before, since ``resid_post`` accumulates.
        increment_z: in standard deviations of the increment's own null.
        against: the control that the layer stands out least against; all figures above are those against it.
        health: by corpus.
        flag: why the layer should not be believed, or None.
        features: those that differ most toward the target, or are worth most to it.
    """

    layer: int
    score: float
    null: float
    excess: float
    interval: tuple[float, float]
    z: float
    p: float
    p_familywise: float
    rank: int
    stability: float
    increment: float
    increment_z: float
    against: str
    health: dict[str, SAEHealth]
    flag: str | None
    features: tuple[FeatureDifference, ...]


class CorpusSummary(Frozen):
    """Size of one corpus as listened to.

    Attributes:
        sinks: the most that any layer left out.
        broken: places of documents that could not be heard and do not count among ``documents``.
    """

    documents: int
    blocks: int
    tokens: int
    sinks: int
    broken: tuple[int, ...] = ()


class Diagnosis(Shown, Artifact):
    """Every layer's specificity for the target, in order of depth."""

    FILE: ClassVar[str] = "diagnosis.json"

    score: str
    increments: bool
    corpora: dict[str, CorpusSummary]
    layers: tuple[LayerDiagnosis, ...]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One sentence: which layers are specific to the target beyond chance, and which are not believed."""
        found = [layer for layer in self.layers if layer.flag is None and layer.p_familywise <= ALPHA]
        found.sort(key=lambda layer: layer.rank)
        whole = f"{len(self.layers)} layers"
        if found:
            names = first_of([str(layer.layer) for layer in found], NAMED)
            said = f"{len(found)} of {whole} stand out from chance by `{self.score}`, strongest first: {names}"
        else:
            said = f"No evidence by `{self.score}` that any of {whole} is specific to the target"
        flagged = sum(layer.flag is not None for layer in self.layers)
        return f"{said}; {flagged} are not believed." if flagged else f"{said}."

    def to_frame(self) -> pd.DataFrame:
        """A row per layer, with ``variance_explained`` and ``l0`` of every corpus in columns of their own."""
        return pd.DataFrame(
            [
                {
                    **layer.model_dump(exclude={"interval", "health", "features", "flag"}),
                    "low": layer.interval[0],
                    "high": layer.interval[1],
                    **{
                        f"variance_explained_{name}": health.variance_explained for name, health in layer.health.items()
                    },
                    **{f"l0_{name}": health.l0 for name, health in layer.health.items()},
                    "flag": layer.flag or "",
                }
                for layer in self.layers
            ]
        )

    def plot(self, selection: Any = None, *, width: int = 640) -> Any:
        """The layer profile, an Altair chart: excess over chance per layer, and the SAEs' health below.

        Args:
            selection: a `Selection`, whose layers are marked.
            width: of the plotting area in pixels.
        """
        from stethoscope.report.profile import layer_profile

        return layer_profile(self, selection or {"policy": "", "layers": (), "choices": ()}, width=width)

    def _shown(self) -> tuple[str, Rows]:
        return self.verdict, text_rows(self.to_frame().to_dict("records"), _COLUMNS)


def diagnose(
    heard: Mapping[str, Listening],
    *,
    documents: Mapping[str, int],
    provenance: Provenance | None = None,
    score: str = "mass_shift",
    worth: Mapping[str, FeatureStatistics] | None = None,
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
        worth: for ``attribution``, what the edit is worth by feature (`Attribution.statistics`), on the same corpora.
        increments: judge what each layer adds to the one before it, for sites that accumulate.
        top_features: features to keep per layer, those with the largest mass difference.

    Raises:
        StethoscopeError: unknown score, no control, or too few blocks to know chance.
    """
    provenance = provenance or Provenance()
    if score == ATTRIBUTION and worth is None:
        raise StethoscopeError("`attribution` needs what the features are worth", hint="see `attribute`")
    if score not in (*SCORES, ATTRIBUTION):
        near = get_close_matches(score, SCORES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known scores: {', '.join(SCORES)}"
        raise StethoscopeError(f"unknown score `{score}`", hint=hint)
    controls = [name for name in heard if name != "target"]
    if not controls:
        raise StethoscopeError("there is no control text to compare the target with")
    scored = worth if worth is not None else {name: one.statistics for name, one in heard.items()}
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
    """How much more each feature is the target's: by worth, or by its share of activation mass."""
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
