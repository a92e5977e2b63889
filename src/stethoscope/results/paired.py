"""What `evaluation.inference` finds of two arms on the same items: tests, intervals, bounds."""

from dataclasses import dataclass

from stethoscope.display import interval


@dataclass(frozen=True, kw_only=True)
class UnpairedZ:
    """Two proportions compared as if their items were unrelated."""

    statistic: float | None
    p_value: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Exact McNemar test: ``b`` items that only arm a got right, ``c`` that only arm b did."""

    b: int
    c: int
    p_value: float
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean gain of b over a on ``n`` items, above 0 where b is better, with an interval; of a loss, its change.

    ``clusters`` counts the units resampled. The p-value of a bootstrap's is a t-test's with the standard error, which
    holds its level where units are few and the interval does not.
    """

    n: int
    clusters: int
    difference: float
    low: float | None
    high: float | None
    standard_error: float | None
    confidence: float
    method: str
    reason: str | None = None
    p_value: float | None = None

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and self.high < 0

    def text(self, form: str = "+.1f", scale: int = 1) -> str:
        """The interval as text; ``-`` without one."""
        return interval(self.low, self.high, form, scale)


@dataclass(frozen=True, kw_only=True)
class NonInferiority:
    """Whether b is shown not to be worse than a by ``margin`` or more; ``shown`` is None where undefined.

    ``margin`` is None where none is given in the metric's unit. ``smallest_margin`` is the smallest one
    for which these data would have shown it.
    """

    n: int
    margin: float | None
    difference: float
    low: float | None
    p_value: float | None
    shown: bool | None
    smallest_margin: float | None
    confidence: float
    reason: str | None = None
