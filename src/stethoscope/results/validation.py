"""Every score judged against the true effects of layers."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from stethoscope.artifacts import Artifact, Frozen
from stethoscope.display import NONE, Rows, interval, listed, number, table_of

Kind = Literal["sae", "rival", "truth"]
Layers = tuple[int, ...]
KINDS: dict[Kind, str] = {"sae": "reads SAEs", "rival": "needs no SAE", "truth": "the truth itself"}


class Correlation(Frozen):
    """Spearman's rank correlation over layers, with a 95 % interval from layers drawn with replacement.

    All None where one of the two is constant.
    """

    rho: float | None
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """The correlation and its interval."""
        return "undefined" if self.rho is None else f"{self.rho:+.2f} ({interval(self.low, self.high, '+.2f')})"


class SetEffect(Frozen):
    """What a set of layers does when injected together, in nats per token against the base.

    Attributes:
        target_gain: by how much target loss falls.
        control_cost: by how much control loss rises.
    """

    layers: Layers
    target_gain: float
    control_cost: float

    @property
    def trade_off(self) -> float:
        """Target gain less control cost."""
        return self.target_gain - self.control_cost


class Beaten(Frozen):
    """The share of random sets that a set's trade-off exceeds, with its exact 95 % interval."""

    share: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """The share and its interval, in percent."""
        return f"{100 * self.share:.0f} % ({interval(self.low, self.high, '.0f', 100)})"

    @classmethod
    def of(cls, own: float, others: Sequence[float]) -> "Beaten":
        """From the trade-off of a set and of each random one."""
        from scipy.stats import binomtest

        count = sum(own > other for other in others)
        interval = binomtest(count, len(others)).proportion_ci(0.95)
        return cls(share=count / len(others), low=float(interval.low), high=float(interval.high))


class ValidatedSet(Frozen):
    """A score's best k layers, injected together.

    Attributes:
        overlap: share of them among the k layers of best single injection.
        beaten: random sets of as many layers.
        beaten_matched: those of about as much task vector energy, for the scores that are in question.
    """

    effect: SetEffect
    overlap: float
    beaten: Beaten
    beaten_matched: Beaten | None


class ValidatedScore(Frozen):
    """How well one score agrees with the truth.

    Attributes:
        kind: whether it rests on SAEs, is a rival that needs none, or the truth itself.
        values: a layer's score.
        gain: correlation with the target gain of each layer's injection.
        trade_off: correlation with target gain less control cost.
        sets: k -> its best k layers.
    """

    kind: Kind
    values: dict[int, float]
    gain: Correlation
    trade_off: Correlation
    sets: dict[int, ValidatedSet]


class RandomSets(Frozen):
    """Random sets of one size; ``matched`` maps a score to sets of about the energy of its own best."""

    equal_size: tuple[SetEffect, ...]
    matched: dict[str, tuple[SetEffect, ...]]


class ScoreValidation(Artifact):
    """All scores judged.

    Attributes:
        injected: the effect of each layer alone.
        forwards: of all text, that were spent.
        documents: of each corpus.
    """

    FILE: ClassVar[str] = "validation.json"

    scores: dict[str, ValidatedScore]
    injected: tuple[SetEffect, ...]
    random: dict[int, RandomSets]
    documents: dict[str, int]
    forwards: float

    def size(self, wanted: int) -> int:
        """The size of set that was judged and is nearest to the one wanted."""
        return min(self.random, key=lambda k: (abs(k - wanted), k))

    def table(self, k: int) -> Rows:
        """A row per score, best trade-off of its k layers first."""
        ranked = sorted(self.scores.items(), key=lambda item: -item[1].sets[k].effect.trade_off)
        return table_of(
            {
                "score": name,
                "kind": KINDS[found.kind],
                "correlation with gain": found.gain.text,
                "with gain less cost": found.trade_off.text,
                f"best {k} layers": listed(best.effect.layers),
                "gain": number(best.effect.target_gain, "+.3f"),
                "cost": number(best.effect.control_cost, "+.3f"),
                "shared with the truth": f"{100 * best.overlap:.0f} %",
                "beats random sets": best.beaten.text,
                "beats sets of equal energy": best.beaten_matched.text if best.beaten_matched else NONE,
            }
            for name, found in ranked
            for best in [found.sets[k]]
        )

    def verdict(self, score: str, k: int) -> str:
        """One sentence on a score's best k layers."""
        sets = {name: found.sets[k] for name, found in self.scores.items()}
        chosen, share = sets[score], sets[score].beaten
        rivals = [name for name, found in self.scores.items() if found.kind != "truth"]
        best = max(rivals, key=lambda name: sets[name].effect.trade_off)
        sentence = (
            f"`{score}` {'chooses' if share.low > 0.5 else 'does not choose clearly'} better than chance: its best {k}"
            f" layers beat {100 * share.share:.0f} % of random sets (95 % interval {100 * share.low:.0f} to"
            f" {100 * share.high:.0f} %), and gain {chosen.effect.trade_off:+.3f} nats per token more than they cost"
        )
        if sets[best].effect.trade_off <= chosen.effect.trade_off:
            return f"{sentence}; no other score does better."
        return f"{sentence}; `{best}` would have chosen layers that gain {sets[best].effect.trade_off:+.3f}."
