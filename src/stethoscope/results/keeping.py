"""What a filtered edit kept of a fine-tune's skill and cost on protected text, beside its rivals."""

from typing import ClassVar

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import Display, Rows, interval, number, table_of

EDIT, SCALED, TUNED, BASE = "filtered", "scaled", "tuned", "base"


class Measured(Frozen):
    """A value with a 95 % interval over documents; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def shown(self, form: str, scale: int = 1) -> str:
        """The value, and its interval in parentheses where it has one."""
        if self.value is None or self.low == self.high:
            return number(self.value and scale * self.value, form)
        return f"{number(scale * self.value, form)} ({interval(self.low, self.high, form, scale)})"


class Variant(Frozen):
    """One model on documents that nothing was chosen by, in nats per token against the base.

    Attributes:
        gain: by how much the target loss falls.
        kept: that as a share of the fine-tune's.
        damage: protected text -> by how much its loss rises.
    """

    gain: Measured
    kept: Measured
    damage: dict[str, Measured]


class Keeping(Display, Artifact):
    """A filtered edit of a whole fine-tune, its strength chosen on held-back documents and measured on others.

    Attributes:
        strength: of the filter; ``chosen`` if it was not given.
        share: of the fine-tune's gain that the chosen strength had to keep.
        coefficient: of the plain scaling that gains as much.
        gains: strength -> gain on the documents that it was chosen by, of those tried, from the strongest on.
        documents: text -> documents that made the filter, chose the strength, and are measured here.
        variants: ``base``, ``tuned``, ``scaled`` and ``filtered``.
    """

    FILE: ClassVar[str] = "keeping.json"

    strength: float
    chosen: bool
    share: float
    coefficient: float
    gains: dict[float, float]
    documents: dict[str, tuple[int, int, int]]
    variants: dict[str, Variant]

    @property
    def verdict(self) -> str:
        """The share of the gain kept, and the damage beside the fine-tune's."""
        edit, tuned = self.variants[EDIT], self.variants[TUNED]
        if tuned.gain.low is None or tuned.gain.low <= 0:
            nothing = "No evidence that the fine-tune is better on the target text, so there is nothing to keep."
            return f"{nothing} If the skill shows in answers alone, `--prompt` names the field before them."
        costs = [
            f"{damage.shown('+.3f')} on {name} (fine-tune {tuned.damage[name].shown('+.3f')})"
            for name, damage in edit.damage.items()
        ]
        kept = edit.kept.shown(".0f", 100)
        return f"The edit keeps {kept} % of the fine-tune's gain; loss in nats per token changes by {', '.join(costs)}."

    def table(self) -> Rows:
        """A row per model."""
        labels = {
            SCALED: f"scaled by {self.coefficient:.2f}, equal gain",
            EDIT: f"filtered, strength {self.strength:g}",
        }
        return table_of(
            {
                "model": labels.get(name, name),
                "target gain": one.gain.shown("+.3f"),
                "kept, %": one.kept.shown(".0f", 100),
                **{f"loss on {text}": damage.shown("+.3f") for text, damage in one.damage.items()},
            }
            for name, one in self.variants.items()
        )
