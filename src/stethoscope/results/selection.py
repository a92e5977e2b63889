"""The layers that a policy chose, and the reason for each layer."""

from typing import ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import Display, Rows, listed, table_of


class LayerChoice(Frozen):
    """One layer's fate and the reason for it."""

    layer: int
    chosen: bool
    reason: str


class Selection(Display, Artifact):
    """The layers chosen, in ascending order, and the reason for every layer.

    Attributes:
        coefficients: layer -> coefficient, where the policy chose them too.
        specific: how many of the layers chosen stand out from chance; None in a selection of before.
        warnings: what a reader should know before believing the choice.
    """

    FILE: ClassVar[str] = "selection.json"

    policy: str
    layers: tuple[int, ...]
    coefficients: dict[int, float] | None = None
    choices: tuple[LayerChoice, ...]
    specific: int | None = None
    warnings: tuple[str, ...] = ()

    def amounts(self, coefficient: float) -> dict[int, float]:
        """Layer -> coefficient: the policy's own, or ``coefficient`` for each layer chosen."""
        return self.coefficients or dict.fromkeys(self.layers, coefficient)

    @property
    def verdict(self) -> str:
        """One sentence: how many layers by which policy, which, and whether none of them stands out from chance."""
        said = f"`{self.policy}` chooses {len(self.layers)} of {len(self.choices)} layers: {listed(self.layers)}"
        return said + ("; none of them stands out from chance." if self.specific == 0 else ".")

    def table(self) -> Rows:
        """A row per layer: whether it was chosen, and why."""
        return table_of(
            {"layer": str(c.layer), "chosen": "yes" if c.chosen else "no", "reason": c.reason} for c in self.choices
        )
