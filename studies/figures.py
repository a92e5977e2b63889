"""The figures of the study of edits, from `outcomes/methods*.parquet`: queries of `results.py` for its first part.

A damage is the rise of loss against the base in nats per token; that on `unseen` text is the mean over the five public
texts that no method saw. Draws are the value on the documents as they are, then on resamples of them.
"""

from functools import cache

import numpy as np
import pandas as pd
from common import OUTCOMES, TEXTS, VECTORS
from scipy.stats import spearmanr

from stethoscope.evaluation.inference import adjust, mcnemar_exact, paired_difference
from stethoscope.evaluation.outcomes import PerDocument
from stethoscope.results.paired import PairedDifference
from stethoscope.results.tradeoff import BUDGET, SHARE
from stethoscope.tradeoff import Drawn, falls, interval, least_at, share_kept

TARGET, GENERAL = TEXTS
PUBLIC = ("wikitext", "Python", "chat", "GSM8K", "MMLU")
UNSEEN, FILTER = "unseen", "filter"
CONTROLS = ("stethoscope_word_sorting", "stethoscope_letter_counting")
# parts of two vectors, which measure their own ends: the other's target text, and the edit that has all of its gain
PAIRS = {"merge": ("target of words", ("words", 1.0)), "second": ("target of refusal", ("nothing, then refusal", 1.0))}
Key = tuple[str, float]  # method and value
Figures = dict[tuple[str, str], Drawn]  # ("damage" or "kept", text) -> draws


def there(part: str = "methods") -> list[str]:
    """The vectors that a part of the study has."""
    return [name for name in VECTORS if len(_rows(name, part))]


@cache
def _rows(vector: str, part: str) -> pd.DataFrame:
    found = pd.read_parquet(OUTCOMES / "methods.parquet")
    return found[(found.vector == vector) & (found.part == part)]


@cache
def effects(vector: str, part: str) -> dict[Key, dict[str, Drawn]]:
    """By edit: the share of the fine-tune's gain that is kept, and the damage on every text; draws of each."""
    ends = _rows(vector, part if part in PAIRS else "methods")
    rows = _rows(vector, part)
    both = pd.concat([rows, ends[ends.method.isin(["base", "tuned", vector])]]).drop_duplicates(
        ["method", "value", "text", "document"]
    )
    losses = {
        (str(method), float(value)): {
            str(text): PerDocument(sums=one.nats.to_numpy(float), tokens=one.tokens.to_numpy(int))
            for text, one in found.groupby("text", sort=False)
        }
        for (method, value), found in both.groupby(["method", "value"], sort=False)
    }
    found = falls(losses, losses["base", 0.0])
    whole = found["tuned", 1.0] if ("tuned", 1.0) in found else found[vector, 1.0]
    return {
        key: {
            "kept": share_kept(one[TARGET], whole[TARGET]),
            "gain": one[TARGET],
            UNSEEN: -np.mean([one[text] for text in PUBLIC], axis=0),
            **{text: -fall for text, fall in one.items()},
        }
        for key, one in found.items()
    }


def kept_beside(vector: str, part: str) -> dict[Key, Drawn]:
    """By edit of a part of two vectors, the share of the other's gain that is kept."""
    (text, whole), every = PAIRS[part], effects(vector, part)
    return {key: share_kept(-one[text], -every[whole][text]) for key, one in every.items()}


@cache
def curves(vector: str) -> dict[str, Figures]:
    """By method: damage with 95 % of the gain kept and the share kept at 0.01 nats of damage, on both kinds of text."""
    found: dict[str, Figures] = {}
    every = effects(vector, "methods")
    for method in dict.fromkeys(name for name, _ in every if name not in ("base", "tuned")):
        points = [one for (name, _), one in every.items() if name == method]
        kept = np.stack([one["kept"] for one in points], axis=1)
        for text in (GENERAL, UNSEEN):
            damage = np.stack([one[text] for one in points], axis=1)
            found.setdefault(method, {})["damage", text] = least_at(damage, kept, SHARE)
            found[method]["kept", text] = -least_at(-kept, -damage, -BUDGET)
    return found


def shown(draws: Drawn, spec: str = "+.3f", scale: int = 1) -> str:
    """A value with its interval; "never" where a method does not get there."""
    found = interval(draws)
    return "never" if found.value is None else found.shown(spec, scale)


def ahead(vector: str, rival: str, figure: str, text: str) -> Drawn:
    """By how much less damage the filter does than a rival, or more it keeps; infinite where it alone gets there."""
    ours, theirs = (curves(vector)[name][figure, text] for name in (FILTER, rival))
    with np.errstate(invalid="ignore"):
        return theirs - ours if figure == "damage" else ours - theirs


def over_rival(vector: str, rival: str, figure: str, text: str) -> str:
    """`ahead`, written."""
    return shown(ahead(vector, rival, figure, text), *(("+.3f", 1) if figure == "damage" else ("+.0f", 100)))


def better(rival: str, figure: str, text: str) -> list[str]:
    """The vectors on which the filter is better than a rival with an interval that excludes zero."""
    return [
        name
        for name in with_rival(rival)
        if np.quantile(ahead(name, rival, figure, text)[1:], 0.025, method="nearest") > 0
    ]


def nearest(vector: str, text: str) -> str:
    """The rival that does least damage at 95 % of the gain kept."""
    return min(rivals(vector), key=lambda name: curves(vector)[name]["damage", text][0])


def hurt_most(vector: str) -> str:
    """The unseen text to which the filter at strength 3 does most damage."""
    return max(PUBLIC, key=lambda text: effects(vector, "methods")[FILTER, 3.0][text][0])


def all_rivals() -> list[str]:
    """The methods beside the filter, on any vector."""
    return list(dict.fromkeys(rival for name in there() for rival in rivals(name)))


def with_rival(rival: str) -> list[str]:
    """The vectors on which a rival was measured."""
    return [name for name in there() if rival in curves(name)]


def rivals(vector: str) -> list[str]:
    """The methods beside the filter."""
    return [name for name in ordered(vector) if not name.startswith(FILTER)]


def ordered(vector: str) -> dict[str, Figures]:
    """The methods of a vector, those first whose damage on unseen text is least."""
    found = curves(vector)

    def place(method: str) -> tuple[float, float]:
        return found[method]["damage", UNSEEN][0], -found[method]["kept", UNSEEN][0]

    return {name: found[name] for name in sorted(found, key=place)}


# accuracy


def answered() -> list[str]:
    """The vectors whose methods have answered their tasks."""
    return _named("methods_tasks")


def with_sets() -> list[str]:
    """The vectors of which sets of layers were measured."""
    return _named("methods_sets")


def _named(study: str) -> list[str]:
    found = set(pd.read_parquet(OUTCOMES / f"{study}.parquet", columns=["vector"]).vector)
    return [name for name in VECTORS if name in found]


@cache
def answers(vector: str) -> pd.DataFrame:
    """Items by arm: 1 where the answer is right."""
    found = pd.read_parquet(OUTCOMES / "methods_tasks.parquet").query("vector == @vector")
    return found.pivot_table(index=["task", "item"], columns="arm", values="exact_match", sort=False)


def setting(vector: str, arm: str) -> float:
    """The value of a method's parameter that its curve on calibration text named."""
    found = pd.read_parquet(OUTCOMES / "methods_tasks.parquet").query("vector == @vector and arm == @arm")
    return float(found.value.iloc[0])


def right(vector: str, arm: str, control: str = "") -> float:
    """Mean accuracy in percent: over the vector's own tasks, or on one control."""
    by_task = answers(vector)[arm].groupby("task").mean()
    return 100 * float(by_task[control] if control else by_task.drop(list(CONTROLS)).mean())


def gained(vector: str, arm: str, before: str = "base") -> PairedDifference:
    """Points of accuracy on the vector's own tasks against another arm, paired over items."""
    rows = answers(vector).drop(list(CONTROLS), level="task")
    return paired_difference(rows[before], rows[arm], strata=rows.index.get_level_values("task").to_numpy())


def other_than_filter(vector: str, sign: int) -> list[str]:
    """The rivals that clearly gain more points on the vector's own tasks than the filter (1), or fewer (-1)."""
    found = {
        arm: gained(vector, arm, FILTER) for arm in answers(vector) if not arm.startswith((FILTER, "base", "tuned"))
    }
    return [arm for arm, one in found.items() if one.low is not None and min(sign * one.low, sign * one.high) > 0]


@cache
def worse(vector: str, control: str) -> dict[str, float | None]:
    """By arm: p of a control's change (exact McNemar), after Holm over arms."""
    rows = answers(vector).loc[control]
    arms = [arm for arm in rows if arm != "base"]
    p = [
        mcnemar_exact(
            int(((rows.base == 1) & (rows[arm] == 0)).sum()), int(((rows.base == 0) & (rows[arm] == 1)).sum())
        ).p_value
        for arm in arms
    ]
    return dict(zip(arms, adjust(p), strict=True))


# layers


@cache
def set_worth(vector: str) -> pd.Series:
    """Raw fives of layers: gain less cost in nats per token."""
    found = pd.read_parquet(OUTCOMES / "methods_sets.parquet").query("vector == @vector")
    totals = found.groupby(["method", "text"])[["nats", "tokens"]].sum()
    return (totals.nats / totals.tokens).groupby("method").sum()


def random_beaten(vector: str, method: str) -> float:
    """The share of 100 random fives that a choice beats."""
    worth = set_worth(vector)
    drawn = worth[worth.index.str.startswith("random")]
    return float((worth[method] > drawn).mean())


def along_layers(vector: str) -> dict[str, float]:
    """Spearman's rank correlations over layers, of what is known beforehand with what each raw change alone does."""
    found = pd.read_parquet(OUTCOMES / "methods_layers.parquet").query("vector == @vector and strength == 0")
    known = found.dropna(subset="layer").set_index("layer")
    alone = {layer: one for (name, layer), one in effects(vector, "inputs").items() if name == "layer alone"}
    done = pd.DataFrame({n: {"gain": one["gain"][0], UNSEEN: one[UNSEEN][0]} for n, one in alone.items()}).T
    done["worth"] = done.gain - done[UNSEEN]
    pairs = (("separability", UNSEEN), ("specificity", "gain"), ("specificity", "worth"))
    return {f"{one}, {other}": float(spearmanr(known[one], done[other][known.index]).statistic) for one, other in pairs}


def kept_by_all(vector: str, damage: float) -> Drawn:
    """The share of the gain that the filter in all layers keeps, at as much damage to unseen text."""
    points = [one for (name, _), one in effects(vector, "methods").items() if name in (FILTER, "base")]
    kept, costs = (np.stack([one[what] for one in points], axis=1) for what in ("kept", UNSEEN))
    return -least_at(-kept, -costs, -damage)
