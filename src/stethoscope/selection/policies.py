"""Which layers: a policy turns a diagnosis into a selection that says why each layer is in or out."""

from collections.abc import Callable
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from stethoscope.artifacts import Artifact, Provenance
from stethoscope.diagnosis.diagnose import Diagnosis, LayerDiagnosis
from stethoscope.errors import StethoscopeError


class LayerChoice(BaseModel):
    """One layer's fate and the reason for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    chosen: bool
    reason: str


class Selection(Artifact):
    """The layers chosen, in ascending order, and the reason for every layer."""

    FILE: ClassVar[str] = "selection.json"

    policy: str
    layers: tuple[int, ...]
    choices: tuple[LayerChoice, ...]


def top_k(diagnosis: Diagnosis, *, k: int, include_flagged: bool = False) -> dict[int, str]:
    """The k layers of largest excess; ties go to the lower layer. Returns the reason for each layer chosen.

    Raises:
        StethoscopeError: fewer than k layers may be chosen.
    """
    able = [layer for layer in diagnosis.layers if include_flagged or layer.flag is None]
    if len(able) < k:
        raise StethoscopeError(
            f"cannot choose {k} layers: {len(able)} of {len(diagnosis.layers)} can be believed",
            problems=[f"layer {layer.layer}: {layer.flag}" for layer in diagnosis.layers if layer.flag],
            hint="choose a smaller `k`, better SAEs, or set `include_flagged: true`",
        )
    ranked = sorted(able, key=lambda layer: (-layer.excess, layer.layer))[:k]
    return {layer.layer: f"rank {rank} of {len(able)}" for rank, layer in enumerate(ranked, 1)}


POLICIES: dict[str, Callable[..., dict[int, str]]] = {"top_k": top_k}


def select(
    diagnosis: Diagnosis, *, policy: str, k: int, include_flagged: bool = False, provenance: Provenance
) -> Selection:
    """Apply a policy and explain every layer's fate.

    Raises:
        StethoscopeError: unknown policy, or one that cannot be satisfied.
    """
    if policy not in POLICIES:
        raise StethoscopeError(f"unknown policy `{policy}`", hint=f"known policies: {', '.join(POLICIES)}")
    reasons = POLICIES[policy](diagnosis, k=k, include_flagged=include_flagged)
    return Selection(
        provenance=provenance,
        policy=policy,
        layers=tuple(sorted(reasons)),
        choices=tuple(_choice(layer, reasons) for layer in diagnosis.layers),
    )


def _choice(layer: LayerDiagnosis, reasons: dict[int, str]) -> LayerChoice:
    figures = f"excess {layer.excess:.3f}, z {layer.z:.1f}"
    if layer.layer in reasons:
        return LayerChoice(layer=layer.layer, chosen=True, reason=f"chosen: {figures}, {reasons[layer.layer]}")
    why = layer.flag or figures
    return LayerChoice(layer=layer.layer, chosen=False, reason=f"left out: {why}")
