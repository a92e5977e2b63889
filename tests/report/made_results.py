"""Results made by the stages' own classes: thirty layers, six arms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stethoscope.artifacts import Provenance
from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.outcomes import Outcomes, PerDocument
from stethoscope.results.comparison import Comparison
from stethoscope.results.diagnosis import CorpusSummary, Diagnosis, FeatureDifference, LayerDiagnosis, SAEHealth
from stethoscope.results.evidence import Context, Evidence, FeatureEvidence, LayerEvidence
from stethoscope.results.selection import LayerChoice, Selection

SUBJECTS = {
    "algebra": 0.35,
    "counting_and_probability": 0.2,
    "geometry": 0.15,
    "intermediate_algebra": 0.25,
    "number_theory": 0.3,
    "prealgebra": 0.5,
    "precalculus": 0.1,
}
CONTROLS = {"word_sorting": 0.5, "spell_backward": 0.4}
ARMS = {
    "base": (0.0, 0.0),
    "tuned": (0.25, 0.21),
    "selected": (0.14, 0.05),
    "random_layers_1": (0.06, 0.06),
    "random_layers_2": (0.05, 0.055),
    "projected": (0.01, 0.01),
}


@dataclass(frozen=True)
class Results:
    diagnosis: Diagnosis
    selection: Selection
    comparison: Comparison
    recipe: str
    evidence: Evidence | None = None

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        self.diagnosis.save(folder)
        self.selection.save(folder)
        self.comparison.save(folder / "comparison.json")
        if self.evidence:
            self.evidence.save(folder)
        (folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")
        return folder


def make_layer(
    layer: int, rng: np.random.Generator, *, controls: Sequence[str] = ("control",), flag: str | None = None
) -> LayerDiagnosis:
    excess = 0.05 + 0.2 * np.exp(-(((layer - 17) / 5) ** 2)) + rng.normal(0, 0.008)
    health = {
        name: SAEHealth(
            tokens=180_000, variance_explained=0.3 if flag else 0.93 - 0.006 * layer - extra,
            l0=40 + layer + 60 * extra, dead=0.1, dense=0.02,
        )
        for name, extra in (("target", 0.03), *((control, 0.0) for control in controls))
    }  # fmt: skip
    features = tuple(
        FeatureDifference(
            feature=100 * layer + i, target_rate=0.4 / (i + 1), control_rate=0.02,
            target_mass=0.05 / (i + 1), control_mass=0.0005,
        )
        for i in range(40)
    )  # fmt: skip
    return LayerDiagnosis(
        layer=layer, score=excess + 0.06, null=0.06, excess=excess, interval=(excess - 0.02, excess + 0.02),
        z=excess / 0.008, p=1 / 201, p_familywise=1 / 201, rank=layer + 1, stability=0.9, increment=0.001,
        increment_z=0.5, against=controls[layer % len(controls)], health=health, flag=flag, features=features,
    )  # fmt: skip


def make_diagnosis(*, layers: int = 30, controls: Sequence[str] = ("control",)) -> Diagnosis:
    rng = np.random.default_rng(0)
    size = CorpusSummary(documents=512, blocks=8, tokens=180_000, sinks=512)
    flags = {layers - 1: "SAE variance explained 0.30 on target text"}
    return Diagnosis(
        provenance=Provenance(seed=0, inputs={"base": "ab" * 32, "tuned": "cd" * 32}),
        score="mass_shift",
        increments=False,
        corpora=dict.fromkeys(("target", *controls), size),
        layers=tuple(make_layer(i, rng, controls=controls, flag=flags.get(i)) for i in range(layers)),
        warnings=(),
    )


def make_evidence(diagnosis: Diagnosis, *, features: int = 8, length: int = 60) -> Evidence:
    """Contexts that name their layer, feature, corpus and place."""

    def context(where: str, i: int) -> Context:
        text = f"{where} number {i} " + "m" * length
        return Context(document=i, before=f"before {text} ", token=f"<{where}>", after=f"\n{text}", activation=50.0 - i)

    def feature(layer: int, number: int) -> FeatureEvidence:
        return FeatureEvidence(
            feature=number,
            contexts={
                name: tuple(context(f"{name}-{layer}-{number}", i) for i in range(4)) for name in diagnosis.corpora
            },
            promotes=tuple(f" promoted-{layer}-{i}" for i in range(8)),
            link=f"https://www.neuronpedia.org/model/{layer}-res/{number}",
        )

    return Evidence(
        provenance=Provenance(inputs={"diagnosis": "ab" * 32}),
        documents=dict.fromkeys(diagnosis.corpora, 64),
        layers=tuple(
            LayerEvidence(layer=d.layer, features=tuple(feature(d.layer, f.feature) for f in d.features[:features]))
            for d in diagnosis.layers
        ),
    )


def make_selection(diagnosis: Diagnosis, *, k: int = 5) -> Selection:
    able = sorted((d for d in diagnosis.layers if d.flag is None), key=lambda d: -d.excess)
    chosen = sorted(d.layer for d in able[:k])
    choices = tuple(
        LayerChoice(layer=d.layer, chosen=d.layer in chosen, reason=f"excess {d.excess:.3f}") for d in diagnosis.layers
    )
    provenance = Provenance(inputs={"diagnosis": "ef" * 32})
    return Selection(provenance=provenance, policy="top_k", layers=tuple(chosen), choices=choices)


def make_comparison(
    *,
    arms: dict[str, tuple[float, float]] = ARMS,
    items: int = 120,
    loss: bool = True,
    subjects: dict[str, float] = SUBJECTS,
    target: dict[str, float] | None = None,
    pairs: Sequence[tuple[str, str]] | None = (),
) -> Comparison:
    """Outcomes of arms with a given gain on target tasks and harm to control text, compared by the real code.

    ``target`` is what each takes off the loss of held-out target text; of wrong answers one in four was not found.
    """
    rng = np.random.default_rng(1)
    rows = []
    for task, share in {**subjects, **CONTROLS}.items():
        luck = rng.random(items)
        for arm, (gain, harm) in arms.items():
            right = luck + rng.normal(0, 0.03, items) < share + (gain if task in subjects else -harm)
            rows += [
                {
                    "arm": arm, "task": task, "item": i, "item_hash": f"{task}-{i}", "prompt_hash": "p",
                    "exact_match": float(right[i]), "extracted": bool(right[i] or i % 4), "truncated": False,
                    "generated_tokens": 20, "response": "", "answer": "", "target": "",
                }
                for i in range(items)
            ]  # fmt: skip
    tokens = np.full(64, 200)
    documents = rng.normal(3.2, 0.3, 64)
    losses = {
        arm: PerDocument(sums=tokens * (documents + harm + rng.normal(0, 0.02, 64) * (harm > 0)), tokens=tokens)
        for arm, (_, harm) in arms.items()
    }
    gains = {
        arm: PerDocument(sums=tokens * (documents - gain + rng.normal(0, 0.02, 64) * (gain > 0)), tokens=tokens)
        for arm, gain in (target or {}).items()
    }
    if pairs is not None and not pairs:
        pairs = [("base", arm) for arm in arms if arm != "base"]
        pairs += [(arm, "selected") for arm in arms if arm.startswith("random")]
    return compare(
        Outcomes(frame=pd.DataFrame(rows)),
        family=list(subjects),
        pairs=pairs,
        losses=losses if loss else None,
        target_losses=gains or None,
    )
