"""The layers that a policy chose, and the reason for each layer."""

from typing import ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.shown import Rows, Shown


class LayerChoice(Frozen):
    """One layer's fate and the reason for it."""

    layer: int
    chosen: bool
    reason: str


class Selection(Shown, Artifact):
    """The layers chosen, in ascending order, and the reason for every layer.

    Attributes:
        coefficients: layer -> coefficient, where the policy chose them too.
        warnings: what a reader should know before believing the choice.
    """

    FILE: ClassVar[str] = "selection.json"

    policy: str
    layers: tuple[int, ...]
    coefficients: dict[int, float] | None = None
    choices: tuple[LayerChoice, ...]
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One sentence: how many layers by which policy, and which."""
        layers = ", ".join(map(str, self.layers))
        return f"`{self.policy}` chooses {len(self.layers)} of {len(self.choices)} layers: {layers}."

    def _shown(self) -> tuple[str, Rows]:
        rows = [[str(choice.layer), choice.reason] for choice in self.choices]
        return self.verdict, [["layer", "reason"], *rows]
