"""Selections choose the best believable layers and say why."""

import pytest

from stethoscope.artifacts import Provenance
from stethoscope.diagnosis.diagnose import CorpusSummary, Diagnosis, LayerDiagnosis
from stethoscope.errors import StethoscopeError
from stethoscope.saes.health import SAEHealth
from stethoscope.selection.policies import select


def diagnosis(excesses: list[float], flagged: tuple[int, ...] = ()) -> Diagnosis:
    healthy = SAEHealth(tokens=100, variance_explained=0.9, l0=10.0, dead=0.0, dense=0.0)
    return Diagnosis(
        provenance=Provenance(),
        score="mass_shift",
        corpora=dict.fromkeys(("target", "control"), CorpusSummary(documents=8, blocks=4, tokens=100, sinks=0)),
        layers=tuple(
            LayerDiagnosis(
                layer=i,
                score=e + 0.1,
                null=0.1,
                excess=e,
                interval=(e - 0.1, e + 0.1),
                z=10 * e,
                p=0.01,
                p_familywise=0.02,
                increment=e,
                health={"target": healthy, "control": healthy},
                flag="SAE variance explained 0.31 on target text" if i in flagged else None,
                features=(),
            )
            for i, e in enumerate(excesses)
        ),
        warnings=(),
    )


def choose(*args, **kwargs):
    return select(diagnosis(*args), policy="top_k", provenance=Provenance(), **kwargs)


def test_top_k_takes_the_largest_and_explains_every_layer():
    made = choose([0.1, 0.5, 0.2, 0.4], k=2)
    assert made.layers == (1, 3)
    assert [choice.reason for choice in made.choices] == [
        "left out: excess 0.100, z 1.0",
        "chosen: excess 0.500, z 5.0, rank 1 of 4",
        "left out: excess 0.200, z 2.0",
        "chosen: excess 0.400, z 4.0, rank 2 of 4",
    ]


def test_ties_break_toward_the_lower_layer():
    assert choose([0.3, 0.3, 0.3], k=2).layers == (0, 1)


def test_a_flagged_layer_is_left_out_unless_the_user_insists():
    assert choose([0.1, 0.9, 0.2], (1,), k=1).layers == (2,)
    assert choose([0.1, 0.9, 0.2], (1,), k=1, include_flagged=True).layers == (1,)
    assert (
        choose([0.1, 0.9, 0.2], (1,), k=1).choices[1].reason == "left out: SAE variance explained 0.31 on target text"
    )


def test_impossible_requests_say_what_is_there():
    with pytest.raises(StethoscopeError, match="cannot choose 3 layers: 2 of 3") as error:
        choose([0.1, 0.9, 0.2], (1,), k=3)
    assert "layer 1: SAE variance explained 0.31" in str(error.value)
    with pytest.raises(StethoscopeError, match="unknown policy"):
        select(diagnosis([0.1]), policy="best", k=1, provenance=Provenance())
