"""Every arm's edit plan as JSON, and the energy of the task vector by layer."""

from typing import Any, ClassVar

from stethoscope.artifacts import Artifact, Frozen


class LayerEnergy(Frozen):
    """One layer's task vector: squared Frobenius norm, and its share of the whole."""

    layer: int
    energy: float
    share: float


class Edits(Artifact):
    """The arms' plans and where the task vector's energy lies; the bases that plans cut along lie beside it."""

    FILE: ClassVar[str] = "edits.json"

    plans: dict[str, dict[str, Any] | None]
    energy: tuple[LayerEnergy, ...]
    warnings: tuple[str, ...] = ()
