"""What says whether a choice of layers was good, made by the stages' own classes."""

from pathlib import Path

import numpy as np

from stethoscope.artifacts import Provenance
from stethoscope.results.calibration import Calibration, CalibrationPoint
from stethoscope.results.comparison import Claim
from stethoscope.results.validation import (
    Beaten,
    Correlation,
    RandomSets,
    ScoreValidation,
    SetEffect,
    ValidatedScore,
    ValidatedSet,
)

GAINS = {"mass_shift": 0.1, "attribution": 0.32, "gradient": 0.34, "norm": 0.2, "injection": 0.36}


def make_validation(*, k: int = 5) -> ScoreValidation:
    rng = np.random.default_rng(0)
    random = tuple(
        SetEffect(layers=tuple(sorted(rng.choice(30, k, replace=False).tolist())), target_gain=gain, control_cost=cost)
        for gain, cost in zip(rng.normal(0.15, 0.05, 50).tolist(), rng.normal(0.02, 0.01, 50).tolist(), strict=True)
    )
    scores = {}
    for number, (name, gain) in enumerate(GAINS.items()):
        kind = "truth" if name == "injection" else "rival" if name in ("gradient", "norm") else "sae"
        correlation = Correlation(rho=gain * 2, low=gain, high=min(1.0, gain * 3))
        effect = SetEffect(layers=tuple(range(number, number + k)), target_gain=gain, control_cost=0.02)
        share = Beaten(share=0.96, low=0.86, high=0.995)
        beaten = ValidatedSet(effect=effect, overlap=0.4, beaten=share, beaten_matched=share if number == 0 else None)
        scores[name] = ValidatedScore(
            kind=kind, values=dict.fromkeys(range(30), gain), gain=correlation, trade_off=correlation, sets={k: beaten}
        )
    return ScoreValidation(
        provenance=Provenance(),
        scores=scores,
        injected=random[:3],
        random={k: RandomSets(equal_size=random, matched={"mass_shift": random[:5]})},
        documents={"target": 32, "control": 32},
        forwards=500.0,
    )


def make_calibration() -> Calibration:
    rows = [((), 0.0, 0.0), ((3,), 0.1, 0.01), ((3, 8), 0.2, 0.015), ((3, 8, 9), 0.21, 0.05), ((9,), 0.05, 0.06)]
    points = tuple(
        CalibrationPoint(
            coefficients=dict.fromkeys(layers, 1.0), strength=None, threshold=5.0 if layers else None,
            damage={"control": cost}, target_gain=gain, target_error=0.01, control_cost=cost, control_error=0.005,
            control_increase=cost / 3,
            on_front=layers != (9,),
        )
        for layers, gain, cost in rows
    )  # fmt: skip
    return Calibration(
        provenance=Provenance(), z={3: 9.0, 8: 7.0, 9: 5.0}, budget=0.01, base_loss={"target": 3.0, "control": 3.0},
        points=points, best=2, choice=2, rule="largest target gain with control loss at most 1 % worse",
        reason="2 layers of z >= 5.0 at 1 is the best found", forwards=31.0,
        seen={"target": "ab" * 32, "control": "cd" * 32},
    )  # fmt: skip


def make_claim(*, seen: tuple[int, ...] = ()) -> Claim:
    return Claim(
        provenance=Provenance(),
        kind="exploratory" if seen else "confirmatory",
        seen_items={"algebra": seen} if seen else {},
        seen_texts={"target": "ab" * 32},
    )


def save_choice(folder: Path, *, seen: tuple[int, ...] = ()) -> None:
    (folder / "validation/control").mkdir(parents=True)
    make_validation().save(folder / "validation/control")
    make_calibration().save(folder)
    make_claim(seen=seen).save(folder)
