"""Every arm's edit plan as JSON, and the energy of the task vector by layer."""

from typing import Any, ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import Rows, percent, table_of


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

    def table(self) -> Rows:
        """A row per layer: its share of the task vector's energy."""
        return table_of({"layer": str(e.layer), "energy of the change, %": percent(e.share)} for e in self.energy)
