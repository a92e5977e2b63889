"""How a metric's numbers are read: in which unit, and whether more is better. All that shows or judges one asks this.

>>> bits = scale_of("bits_per_byte", [0.9, 1.1])
>>> bits.text(0.9), bits.words(0.2), bits.label
('0.9', '+0.2 bits per byte', 'bits per byte, lower is better')
>>> scale_of("acc", [0.0, 1.0]).words(0.031)
'+3.1 points'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stethoscope.display import number, percent

SHARE = "%"
# Of a whole text, over its own words or bytes: a logarithm, whatever lm-evaluation-harness makes of all texts at last.
LIKELIHOODS = {
    "bits_per_byte": "bits per byte",
    "word_perplexity": "nats per word",
    "byte_perplexity": "nats per byte",
}
# Directions by name, where neither a task nor a results file tells them.
_HIGHER = {"acc", "acc_bytes", "acc_mutual_info", "acc_norm", "em", "exact_match", "f1", "math_verify", "mcc", "mrr"}
_LOWER = {*LIKELIHOODS, "brier_score", "ter", "wer"}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A metric's unit and direction.

    Attributes:
        unit: ``%`` for shares, whose differences are in points; a unit such as ``bits per byte``; or the metric's name.
        higher_is_better: None is not known; more is taken for better then, and that is said.
    """

    unit: str = SHARE
    higher_is_better: bool | None = True

    @property
    def is_share(self) -> bool:
        """Whether values are shares from 0 to 1."""
        return self.unit == SHARE

    @property
    def factor(self) -> int:
        """What a value is multiplied with to be in the unit in which it is written."""
        return 100 if self.is_share else 1

    @property
    def form(self) -> str:
        """The format of a gain in that unit."""
        return "+.1f" if self.is_share else "+.3g"

    @property
    def of_gains(self) -> str:
        """The unit of gains."""
        return "points" if self.is_share else self.unit

    @property
    def label(self) -> str:
        """Unit and direction in words; empty for a share of which more is better."""
        directions = {True: "", False: "lower is better", None: "more taken for better, not known"}
        said = [self.unit, directions[self.higher_is_better]]
        return "" if self == Scale() else ", ".join(filter(None, said))

    def named(self, name: str) -> str:
        """A task's name, with its unit and direction where they are not a share's."""
        return f"{name}, {self.label}" if self.label else name

    def text(self, value: float | None) -> str:
        """A value without its unit; ``-`` if there is none."""
        return percent(value) if self.is_share else number(value, ".4g")

    def gain(self, difference: float | None) -> str:
        """A gain without its unit, with its sign."""
        return number(difference if difference is None else self.factor * difference, self.form)

    def words(self, difference: float) -> str:
        """A gain with its unit."""
        return f"{self.gain(difference)} {self.of_gains}"


def scale_of(metric: str, values: Sequence[float], told: Mapping[str, bool | None] | None = None) -> Scale:
    """The scale of a metric as outcomes have it, per item.

    Args:
        metric: its name, with or without the name of a filter behind a comma.
        values: of all items that have one; all of them from 0 to 1 are shares.
        told: what the task or its results file says of directions, by name.
    """
    name = metric.partition(",")[0]
    if name == "perplexity" and max(values, default=0.0) <= 0:
        return Scale(unit="nats")  # the harness gives an item's log-likelihood, and makes it a perplexity at the end
    by_name = True if name in _HIGHER else False if name in _LOWER else None
    known = (told or {}).get(name)
    unit = LIKELIHOODS.get(name) or (SHARE if all(0 <= value <= 1 for value in values) else name)
    return Scale(unit=unit, higher_is_better=by_name if known is None else known)
