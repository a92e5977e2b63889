"""The write-up: every number in `RESULTS.md` from the raw outcomes in `outcomes/`.

    python studies/results.py [--check]

`RESULTS.md.j2` has the words and the tables' headings; it asks for figures through the queries and formats below.
`--check` writes nothing and fails where the text would change.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import altair as alt
import figures
import jinja2
import numpy as np
import pandas as pd
from common import NAMES, OUTCOMES, TEXTS
from scipy.stats import linregress, spearmanr

from stethoscope.evaluation.comparison import compare
from stethoscope.evaluation.inference import ratio_difference
from stethoscope.evaluation.outcomes import Outcomes, PerDocument
from stethoscope.results.comparison import Comparison, Contrast
from stethoscope.results.paired import PairedDifference
from stethoscope.results.validation import Beaten

HERE = Path(__file__).parent
PRIMARY, K = "mass_shift", 5
TARGET, GENERAL = TEXTS
CONTROL_TASKS = ("stethoscope_word_sorting", "stethoscope_letter_counting")
ONE_A_SEGMENT = "random, one a stretch"
Edit = tuple[str, str]  # its kind and name among those calibrated


# formats


def form(value: float | None, spec: str) -> str:
    """A number, or nothing where there is none."""
    return "" if value is None or np.isnan(value) else format(value, spec)


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.0f} %"


def beaten(found: Beaten) -> str:
    """A share of random sets, with its interval."""
    return f"{percent(found.share)} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def nats(found: PairedDifference | None, *, falls: bool = False) -> str:
    """A change of loss, or by how much it falls, with its interval."""
    return _difference(found, -1 if falls else 1, "+.3f")


def points(found: PairedDifference | None, *, flip: bool = False) -> str:
    """A difference of accuracy in points, or the same the other way round, with its interval."""
    return _difference(found, -100 if flip else 100, "+.1f")


def _difference(found: PairedDifference | None, scale: float, spec: str) -> str:
    if found is None:
        return ""
    ends = sorted(scale * end for end in (found.low, found.high) if end is not None)
    return f"{scale * found.difference:{spec}}" + (f" ({ends[0]:{spec}} to {ends[1]:{spec}})" if ends else "")


def said(messages: Any) -> str:
    """The first clause of each message, which names what is wrong before it lists where."""
    return "; ".join(re.split(", layer |: |; |\n", str(text))[0] for text in messages) or "nothing"


def those(found: Mapping[str, Beaten], what: str) -> str:
    """The vectors whose share beaten is better or worse than a half, as far as is shown."""
    shown = [name for name, one in found.items() if (one.low > 0.5 if what == "better" else one.high < 0.5)]
    return ", ".join(f"`{vector}`" for vector in shown) or "none"


# queries of any study


@cache
def table(name: str) -> pd.DataFrame:
    """A study's outcomes; sets of layers with their worth, gain less cost."""
    found = pd.read_parquet(OUTCOMES / f"{name}.parquet")
    return found.assign(worth=found.gain - found.cost) if "cost" in found else found


def pick(study: str, **where: Any) -> pd.DataFrame:
    """A study's rows with these values in these columns; a list stands for any of its values."""
    found = table(study)
    for column, value in where.items():
        found = found[found[column].isin(value) if isinstance(value, list) else found[column] == value]
    return found


def vectors_of(study: str) -> list[str]:
    """The vectors of a study."""
    there = set(table(study).vector)
    return [name for name in NAMES if name in there]


def change(
    found: pd.DataFrame, after: str, before: str = "base", *, text: str = TARGET, by: str = "arm"
) -> PairedDifference:
    """The change of loss on a text from one arm to another, or between other things that a column tells apart."""
    here = found[(found.text == text) & (found.tokens > 0)]
    one, other = (here[here[by] == name].sort_values("document") for name in (before, after))
    return ratio_difference(one.nats, other.nats, one.tokens)


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Spearman's, over the layers of the first."""
    return float(spearmanr(one, other[one.index]).statistic)


# 1: sets of layers beside chance


@cache
def chances(study: str, chance: str, score: str = PRIMARY, k: int = K) -> dict[str, Beaten]:
    """By vector: the share of a kind of random sets that a score's set beats.

    The set is the score's best `k` in the study `choice`, the best of each of `k` depth segments in `spread`.
    """
    found = {}
    for vector in vectors_of(study):
        own = pick(study, vector=vector, set="score", score=score, k=k).worth.item()
        drawn = pick("spread" if chance == ONE_A_SEGMENT else "choice", vector=vector, set=chance, k=k).worth
        found[vector] = Beaten.of(own, drawn.tolist())
    return found


def ranked(study: str, chance: str, k: int = K) -> dict[str, dict[str, Beaten]]:
    """`chances` of every score, those first that beat most on average."""
    scores = sorted(set(pick(study, set="score", k=k).score))
    found = {score: chances(study, chance, score, k) for score in scores}
    return dict(sorted(found.items(), key=lambda item: -float(np.mean([one.share for one in item[1].values()]))))


def nearest(found: Mapping[str, Mapping[str, Beaten]]) -> str:
    """The score, but for the truth, whose least lower end is highest."""
    lows = {score: min(one.low for one in by.values()) for score, by in found.items() if score != "injection"}
    return max(lows, key=lambda score: lows[score])


def segments_beat(vector: str, k: int = K) -> float:
    """The share of random layers that random ones of each depth segment beat, on average."""
    segmented = pick("spread", vector=vector, set=ONE_A_SEGMENT, k=k).worth.to_numpy()
    anywhere = pick("choice", vector=vector, set="random, equal size", k=k).worth.to_numpy()
    return float((segmented[:, None] > anywhere).mean())


def adjusted(k: int) -> pd.DataFrame:
    """By score and vector: the share beaten after the straight line of worth on energy over all random sets is taken
    off; exploratory.
    """
    shares: dict[str, dict[str, float]] = {}
    for vector in vectors_of("choice"):
        here = pick("choice", vector=vector, k=k)
        drawn, judged = here[here.set.str.startswith("random")], here[here.set == "score"]
        line = linregress(drawn.energy, drawn.worth)
        rest = (drawn.worth - line.slope * drawn.energy).to_numpy()
        for one in judged.itertuples():
            own = one.worth - line.slope * one.energy
            shares.setdefault(one.score, {})[vector] = float((own > rest).mean())
    return pd.DataFrame(shares).T


def correlations() -> pd.DataFrame:
    """Scores by vectors: each score's rank correlation with what layers gain alone; the best on average first."""
    found = pick("choice", set="score", k=K).pivot_table(index="score", columns="vector", values="rho", dropna=False)
    found = found[vectors_of("choice")]
    return found.loc[(-found.mean(axis=1)).sort_values(kind="stable").index]


def alone(vector: str) -> pd.Series:
    """What each layer gains alone."""
    found = pick("choice", set="alone", vector=vector)
    return found.set_index(found.layers.map(lambda layers: int(layers[0]))).gain


def excess(vector: str, saes: str, score: str) -> pd.Series:
    """Each layer's score by a set of SAEs."""
    return pick("sites", vector=vector, saes=saes, score=score).set_index("layer").excess


# 1: the frozen choice on tasks


@cache
def compared(vector: str, pairs: tuple[tuple[str, str], ...] | None = None) -> Comparison:
    """The product's own comparison, from the raw outcomes."""
    frame = pick("proof", vector=vector).drop(columns="vector").reset_index(drop=True).dropna(axis=1, how="all")
    losses = {
        text: {
            arm: PerDocument(sums=one.nats.to_numpy(), tokens=one.tokens.to_numpy())
            for arm, one in found.sort_values("document").groupby("arm", sort=False)
        }
        for text, found in pick("proof_losses", vector=vector).groupby("text")
    }
    family = [task for task in dict.fromkeys(frame.task) if task not in CONTROL_TASKS]
    return compare(
        Outcomes(frame=frame), pairs=pairs, family=family, losses=losses[GENERAL], target_losses=losses[TARGET]
    )


def accuracy(vector: str, arm: str) -> float:
    """An arm's mean accuracy over a vector's tasks, in percent."""
    found = compared(vector)
    rows = [row for row in found.accuracy if row["task"] in found.family and row["arm"] == arm]
    return 100 * float(np.mean([row["accuracy"] for row in rows]))


def tuned() -> dict[str, Contrast]:
    """Each whole fine-tune against its base."""
    return {vector: compared(vector).contrast("tuned") for vector in vectors_of("proof")}


def against(vector: str, arm: str) -> dict[str, Contrast]:
    """An arm's layers against other choices of as many, and the same energy in all, paired over items."""
    there = set(pick("proof", vector=vector).arm)
    others = ("random_layers_1", "random_layers_2", "scaled", "selected")
    pairs = tuple((other, arm) for other in others if other != arm and {other, arm} <= there)
    return {one.a: one for one in compared(vector, pairs).contrasts}


# 2: the scalpel


@cache
def _prices(vector: str) -> tuple[list[float], list[float]]:
    """Falls of target loss and their costs, of the whole change at smaller coefficients."""
    here = pick("scalpel", vector=vector)
    arms = [arm for arm in here.arm.unique() if arm.startswith("all at") or arm == "tuned"]
    curve = sorted((-change(here, arm).difference, change(here, arm, text=GENERAL).difference) for arm in arms)
    gains, costs = zip((0.0, 0.0), *curve, strict=True)
    return gains, costs


def price(vector: str, gain: float) -> float | None:
    """What the whole change, at a smaller coefficient, costs for a fall of target loss; None where it falls short."""
    gains, costs = _prices(vector)
    return float(np.interp(gain, gains, costs)) if gain <= max(gains) else None


# 3: calibration


@cache
def _gains(vector: str) -> list[pd.DataFrame]:
    """For target and control text, documents x edits of gains and of tokens."""
    return [
        pick("calibration", vector=vector, text=text).pivot_table(
            index="document", columns=["kind", "edit"], values=["gain", "tokens"]
        )
        for text in ("target", "control")
    ]


def worths(vector: str) -> pd.Series:
    """The worth on held-out text, target gain less control cost, by an edit's kind and name."""
    return sum(side["gain"].sum() / side["tokens"].sum() for side in _gains(vector))


def ahead(vector: str, one: Edit, other: Edit | None = None) -> tuple[float, float]:
    """By how much an edit is worth more than another, or than none, and the standard error."""
    difference, variance = 0.0, 0.0
    for side in _gains(vector):
        gains, tokens = side["gain"], side["tokens"][one]
        before = gains[other] if other else np.zeros(len(gains))
        found = ratio_difference(before, gains[one], tokens, resamples=2)
        difference += found.difference
        variance += (found.standard_error or 0.0) ** 2
    return difference, float(np.sqrt(variance))


# 4: what breaks


@cache
def diagnosed(case: str, setting: str = "120 documents") -> dict[str, Any]:
    """The diagnosis of a case, with its `agreement` with the case "as it is" and the `target` and `general`
    changes of loss that injecting its layers makes.
    """
    (one,) = pick("listening", case=case, setting=setting).to_dict("records")
    (usual,) = pick("listening", case="as it is").to_dict("records")
    layers, losses = sorted(one["best"].tolist()), table("listening_losses")
    losses = losses.assign(arm=losses.layers.map(lambda edited: str(edited.tolist())))
    return {
        **one,
        "layers": layers,
        "target": change(losses, str(layers), "[]"),
        "general": change(losses, str(layers), "[]", text=GENERAL),
        "stay": len({*layers} & {*usual["best"].tolist()}),
        "agreement": spearmanr(one["excess"], usual["excess"]).statistic,
    }


# the picture and the text


def chance_picture() -> alt.Chart:
    """The chosen five among random fives, by vector."""
    found = pick("choice", k=K, set=["random, equal size", "score"])
    found = found[(found.set != "score") | (found.score == PRIMARY)]
    base = alt.Chart(found.assign(what=np.where(found.set == "score", PRIMARY, "random fives"))).encode(
        x=alt.X("cost:Q", title="rise of control loss, nats per token"),
        y=alt.Y("gain:Q", title="fall of target loss"),
    )
    colours = alt.Scale(domain=[PRIMARY, "random fives"], range=["#0072b2", "#b6babf"])
    points = base.mark_circle(opacity=0.8).encode(
        color=alt.Color("what:N", scale=colours, title=None),
        size=alt.Size("what:N", scale=alt.Scale(domain=[PRIMARY, "random fives"], range=[120, 22]), legend=None),
        order=alt.Order("what:N", sort="descending"),
    )
    return (
        points.properties(width=170, height=150)
        .facet(alt.Facet("vector:N", sort=list(NAMES), title=None), columns=4)
        .resolve_scale(x="independent", y="independent")
    )


def render() -> str:
    """The whole text."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    formats = (form, percent, beaten, nats, points, said)
    queries = (
        table, pick, vectors_of, change, rank_correlation, chances, ranked, nearest, segments_beat, adjusted,
        correlations, alone, excess, compared, accuracy, tuned, against, price, worths, ahead, diagnosed,
    )  # fmt: skip
    environment.filters.update({one.__name__: one for one in formats}, mean=np.mean)
    environment.globals.update({one.__name__: one for one in (*queries, those)}, combinations=combinations)
    environment.globals.update(NAMES=NAMES, TARGET=TARGET, GENERAL=GENERAL, ONE_A_SEGMENT=ONE_A_SEGMENT, edits=figures)
    source = (HERE / "RESULTS.md.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render().rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text, path = render(), HERE / "RESULTS.md"
    if options.check:
        sys.exit(None if path.read_text(encoding="utf-8") == text else "RESULTS.md does not follow from the outcomes")
    path.write_text(text, encoding="utf-8")
    chance_picture().save(HERE / "chance.svg")
